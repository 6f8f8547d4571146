"""Settings: a recipe's YAML file and the command line become one checked dataclass.

The YAML holds what can change the loss curve; the DeepSpeed JSON holds what may only change memory and speed
(lib/settings/ds_config.py). Every field of a recipe's `Config` must have a value. An unknown key, a key that is given
twice, and a value of the wrong type or out of range are each an error of one line that names the file and the key.
Types and ranges are checked by pydantic.
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from lib.errors import ROOT, UserError, did_you_mean, display_path, from_home

Seed = typing.Annotated[int, Field(ge=0, lt=2**32)]
Probability = typing.Annotated[float, Field(ge=0, lt=1)]
Betas = typing.Annotated[  # written 0.9,0.999 on the command line, and as a list in YAML and JSON
    list[Probability],
    Field(min_length=2, max_length=2),
    BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value),
]
LengthPenalty = typing.Annotated[float, Field(ge=0, le=10)]
Precision = typing.Literal["fp32", "tf32", "bf16", "fp16"]  # tf32: fp32, whose matrices a GPU multiplies in TF32
LearningRateSchedule = typing.Literal["linear", "cosine", "constant"]
Minutes = typing.Annotated[float, Field(gt=0, lt=1e6)]
Text = typing.Annotated[str, Field(min_length=1)]
C = TypeVar("C")  # a recipe's Config


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that stands twice in a mapping is an error (PyYAML keeps the last in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if it cannot be read or is no mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(
            f"{display_path(path)}: no such file; a recipe's settings stand beside it, under the same name"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{display_path(path)}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{display_path(path)}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{display_path(path)}: expected 'key: value' lines, found {type(values).__name__}")
    return values


def check_value(value: Any, kind: Any, where: str, text: bool) -> Any:
    """Check that `value` fits the type `kind`, and return it in that type.

    text: whether the value comes from the command line, where every value is text. Values from YAML must have the type
    itself, with one exception: PyYAML reads 3e-4 as text, so text in this form passes as a number. In a plain str, the
    type of paths, a leading ~ stands for the home folder; a text that is no path, such as a prompt, is a `Text`.
    Raises UserError, whose message begins with `where`.
    """
    adapter = TypeAdapter(kind)
    if isinstance(value, str) and kind in (str, str | None):
        value = from_home(value)
    try:
        if text:
            if value.lower() in ("null", "none") and type(None) in typing.get_args(kind):
                return None
            return adapter.validate_strings(value)
        try:
            return adapter.validate_python(value, strict=True)
        except ValidationError:
            if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
                return adapter.validate_python(float(value), strict=True)
            raise
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        if isinstance(value, bool | int | float) and "string" in problem:
            problem += f" (YAML reads this as {type(value).__name__}; write it in quotes)"
        raise UserError(f"{where}: {value!r}: {problem[0].lower()}{problem[1:]}") from None


def comments(config_class: type) -> dict[str, str]:
    """{field: its trailing comment, which is its help}. The recipe's own settings come first, then inherited ones."""
    found: dict[str, str] = {}
    for base_class in inspect.getmro(config_class)[:-1]:
        lines = re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(base_class), re.MULTILINE)
        found = {**found, **{name: text for name, text in lines if name not in found}}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    return {name: _with_default(text, defaults[name]) for name, text in found.items()}


def _with_default(text: str, default: Any = dataclasses.MISSING) -> str:
    """The help text of a setting, with its default as YAML has it, unless it has none."""
    return text if default is dataclasses.MISSING else f"{text} (default: {json.dumps(default).strip(chr(34))})"


def load(config_class: type[C], yaml_path: Path, given: dict[str, str], quick: bool = False) -> C:
    """Make a `config_class` from the YAML file and from `given`, the settings on the command line, which win.

    quick: whether the file's `quick:` section wins over the rest of the file. Raises UserError.
    """
    values = read_yaml(yaml_path)
    overlay = values.pop("quick", None) or {}
    if not isinstance(overlay, dict):
        raise UserError(f"{display_path(yaml_path)}: 'quick' must be a section of settings, not {overlay!r}")
    kinds = typing.get_type_hints(config_class, include_extras=True)
    for key in [*values, *overlay]:
        if key not in kinds:
            raise UserError(f"{display_path(yaml_path)}: unknown key '{key}'{did_you_mean(key, kinds)}")
    if quick and not overlay:
        raise UserError(
            f"{display_path(yaml_path)}: --quick needs a 'quick:' section there, with the settings of a short run"
        )
    merged: dict[str, Any] = {}
    for key, kind in kinds.items():
        if key in given:
            merged[key] = check_value(given[key], kind, f"--{key}", text=True)
        elif quick and key in overlay:
            merged[key] = check_value(overlay[key], kind, f"{display_path(yaml_path)}: quick: {key}", text=False)
        elif key in values:
            merged[key] = check_value(values[key], kind, f"{display_path(yaml_path)}: {key}", text=False)
        elif hasattr(config_class, key):  # a default, which stands in the line that documents the setting
            merged[key] = getattr(config_class, key)
        else:
            raise UserError(
                f"{display_path(yaml_path)}: '{key}' is missing"
                f" ({comments(config_class).get(key, 'a required setting')})"
            )
    # There are two ways to say how long to train. The one on the command line replaces the other one in the YAML.
    for chosen, replaced in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if chosen in given and replaced not in given and merged[chosen] is not None:
            merged[replaced] = None
    return config_class(**merged)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser_of(recipe_path: Path, doc: str | None, settings: dict[str, tuple[bool, str]]) -> Parser:
    """The parser of a recipe's arguments. settings: {name: (whether it is a bool, help text)}, in the help's order."""
    parser = Parser(
        prog=display_path(recipe_path),
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--deepspeed_config", metavar="JSON", help="the DeepSpeed config: what may only change memory and speed"
    )
    parser.add_argument(
        "--config", metavar="YAML", help=f"the settings (default: {display_path(recipe_path.with_suffix('.yaml'))})"
    )
    parser.add_argument(
        "--quick", action="store_true", help="overlay the YAML's 'quick:' section: a short run, to see that all works"
    )
    # Other DeepSpeed scripts take --deepspeed together with --deepspeed_config, so it is accepted here.
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by DeepSpeed's launcher
    group = parser.add_argument_group("settings (they win over the YAML)")
    for name, (is_bool, text) in settings.items():
        # A bool needs no value: --resume means --resume true.
        optional_value: dict[str, Any] = {"nargs": "?", "const": "true"} if is_bool else {}
        group.add_argument(f"--{name}", metavar="", help=text.replace("%", "%%"), **optional_value)
    return parser


def known_arguments(parser: Parser, arguments: list[str], also: Iterable[str] = ()) -> argparse.Namespace:
    """Parse the arguments. Raises UserError for an unknown one, and names the nearest that the parser or `also` has."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [*(name.removeprefix("--") for name in parser._option_string_actions), *also]
        word = unknown[0].split("=")[0].lstrip("-")
        raise UserError(
            f"unknown argument '{unknown[0]}'{did_you_mean(word, known).replace(chr(39), chr(39) + '--', 1)}"
        )
    return options


def settings_in_source(file: Path, class_name: str = "Config") -> dict[str, tuple[bool, str]]:
    """The settings of a recipe for parser_of, read from the source of its Config and of the classes that it extends.

    Nothing is imported, because importing a recipe takes seconds. Raises LookupError where a class cannot be found.
    """
    source = file.read_text(encoding="utf-8")
    body, lines = ast.parse(source).body, source.splitlines()
    class_node = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if class_node is None:
        modules = [
            node.module
            for node in body
            if isinstance(node, ast.ImportFrom) and class_name in (name.asname or name.name for name in node.names)
        ]
        file = ROOT / f"{modules[0].replace('.', '/')}.py" if modules and modules[0] else Path()
        if not file.is_file():
            raise LookupError(class_name)
        return settings_in_source(file, class_name)
    settings = {}
    for field in class_node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            comment = (
                lines[(field.end_lineno or 1) - 1]
                .encode()[field.end_col_offset :]
                .decode()
                .strip()
                .removeprefix("#")
                .strip()
            )
            default: Any = dataclasses.MISSING
            with contextlib.suppress(ValueError, TypeError):  # it is computed: the recipe alone knows its value
                default = default if field.value is None else ast.literal_eval(field.value)
            settings[field.target.id] = ast.unparse(field.annotation) == "bool", _with_default(comment, default)
    for base in class_node.bases:
        inherited = settings_in_source(file, ast.unparse(base))
        settings |= {name: setting for name, setting in inherited.items() if name not in settings}
    return settings


def parser_from_source(recipe_path: Path) -> Parser | None:
    """The parser of a recipe's arguments, made without importing the recipe, which takes seconds.

    None where the source cannot be read in this way; then only the recipe itself can parse its arguments.
    """
    try:
        doc = ast.get_docstring(ast.parse(recipe_path.read_text(encoding="utf-8")), clean=False)
        return parser_of(recipe_path, doc, settings_in_source(recipe_path))
    except (LookupError, OSError, SyntaxError, UnicodeDecodeError):
        return None


def parse(config_class: type[C], recipe: str, argv: list[str]) -> tuple[C, Path]:
    """(settings, path of the DeepSpeed JSON) from a recipe's arguments. Raises UserError."""
    recipe_path = Path(recipe).resolve()
    help_texts = comments(config_class)
    kinds = typing.get_type_hints(config_class, include_extras=True)
    names = sorted(kinds, key=lambda name: list(help_texts).index(name) if name in help_texts else -1)
    parser = parser_of(
        recipe_path,
        sys.modules[config_class.__module__].__doc__,
        {name: (kinds[name] is bool, help_texts.get(name, "")) for name in names},
    )
    options = known_arguments(parser, argv)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    yaml_path = Path(from_home(options.config)) if options.config else recipe_path.with_suffix(".yaml")
    cfg = load(config_class, yaml_path, given, options.quick)
    if options.deepspeed_config is None:
        folder = ROOT / "ds_configs" / recipe_path.stem
        raise UserError(
            f"--deepspeed_config is missing; for example --deepspeed_config {display_path(folder / 'zero2.json')}"
        )
    return cfg, Path(from_home(options.deepspeed_config))
