"""What chat, generate, merge and export share: the model that a command is given, and how a command ends.

It is checked before torch is imported, so that a misspelt name is reported at once.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import UserError, did_you_mean, display_path, from_home
from lib.launch import devices
from lib.settings.config import Parser, known_arguments

OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints")  # what a run folder has before its model is there


def parser_of(command: str, doc: str | None) -> Parser:
    """A parser with what all of these commands take: the model first, and --trust_remote_code."""
    parser = Parser(
        prog=f"./launch.sh {command}",
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a run folder, a model folder, a hub id, or smollm2")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let code beside the model run, if you trust its source"
    )
    return parser


def add_answer_options(parser: Parser, default_tokens: int) -> None:
    """The options of commands in which the model answers."""
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter (or its run) to put on the model")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=default_tokens,
        metavar="N",
        help=f"the most tokens of an answer (default: {default_tokens})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most probable token each time (default); above 0 tokens are drawn, the higher the wilder",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of the weights on the device (default: fp32; bf16 needs half the memory)",
    )


def parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """The options. Raises UserError for an unknown one, and for values that cannot be."""
    options = known_arguments(parser, arguments)
    if getattr(options, "max_new_tokens", 1) < 1:
        raise UserError(f"--max_new_tokens is {options.max_new_tokens}; set 1 or more")
    if not 0 <= getattr(options, "temperature", 0.0) < float("inf"):
        raise UserError(f"--temperature is {options.temperature}; set 0 or more")
    return options


def find_model(name: str) -> str:
    """The folder, hub id or built-in name to load for what a user gave as a model.

    Of a run folder that is its model/. Raises UserError where there is none.
    """
    path = Path(from_home(name))
    if path.is_dir():
        if (path / "model").is_dir() and not _has_model(path):
            path = path / "model"
        if _has_model(path):
            check_folder(path)
            return str(path)
        if any((path / file).exists() for file in OF_A_RUN):
            raise UserError(f"run {display_path(path)} has no model/ yet; a run leaves it when it has finished")
        raise UserError(f"{display_path(path)} is neither a run nor a model: it has no config.json")
    if path.exists():
        raise UserError(f"{display_path(path)} is a file; give the folder of a run or of a model")
    # What begins with the name of a folder that is here, such as runs/, is a path and not a hub id.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parts[0] in _here()):
        runs = [str(found) for found in path.parent.glob("*") if found.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"there is no folder {name}{did_you_mean(name, runs)}")
    if "/" not in name and name not in ("smollm2", "smollm2-tiny") and did_you_mean(name, ["smollm2"]):
        raise UserError(f"there is no model {name}; did you mean 'smollm2'?")
    return name


def _here() -> list[str]:
    return [path.name for path in Path().iterdir() if path.is_dir()]


def _has_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def check_folder(path: Path) -> dict[str, Any]:
    """The config of a model folder (of the adapter, if it is one). Raises UserError where the folder is damaged."""
    file, weights = ("adapter_config.json", "adapter_model") if is_adapter(path) else ("config.json", "model")
    try:
        config = json.loads((path / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{display_path(path / file)} cannot be read ({error}); is the folder damaged?") from None
    if not isinstance(config, dict):
        raise UserError(f"{display_path(path / file)} is no JSON object; is the folder damaged?")
    classes = config.get("architectures") or []
    decoders = [name for name in classes if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if classes and not decoders and "auto_map" not in config:
        raise UserError(
            f"{display_path(path)} has a {classes[0]}, which is no language model of a decoder (ForCausalLM)"
        )
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise UserError(f"{display_path(path)} has no weights ({weights}.safetensors)")
    return config


def is_adapter(path: Path | str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def find_adapter(name: str | None) -> str | None:
    """The folder of the adapter that a user gave, or the model/ of its run. Raises UserError where there is none."""
    if name is None:
        return None
    found = find_model(name) if Path(from_home(name)).is_dir() else name
    if not is_adapter(found):
        raise UserError(f"--adapter {name}: no folder with an adapter (adapter_config.json)")
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What libraries print while they are imported and load a model stays out of the command's output."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that wait for each other sleep meanwhile. By default they spin, and beside a training run on the same
    # cores an answer then takes ten times as long (measured: 6.0 s, and 0.6 s so).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def device() -> str:
    """The name by which torch knows the device to use: the first GPU, if there is one."""
    found = devices.find()
    return found.accelerator
