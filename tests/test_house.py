"""The house: which way imports point, that the training step stays in the recipes, and how long things may be."""

import ast
import re
from pathlib import Path

import pytest
from conftest import PIPELINES, RECIPES, ROOT

# From the ground up: a module imports its own level and lower ones.
LEVELS = ["errors", "cache", "progress", "settings", "distributed", "data", "models", "run", "scores"]
BESIDE = ["compare", "launch"]  # they may import all of these, and compare may import launch
MODULES = sorted((ROOT / "lib").rglob("*.py"))
OURS = [recipe for recipe in RECIPES if (ROOT / "docs" / "recipes" / f"{recipe}.md").is_file()]
PAGES = sorted(
    page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "ds_configs").rglob("*.md")]
)
CODE = sorted(
    file
    for folder in ("lib", "recipes", "tests")
    for file in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in file.parts
)

OTHER_FILES = [ROOT / "launch.sh", ROOT / ".ci" / "run", ROOT / "pyproject.toml", *sorted(ROOT.glob("recipes/*.yaml"))]


def name_of(module: Path) -> str:
    return ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(module: Path) -> set[str]:
    """The modules of lib that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            for alias in node.names:
                inner = ROOT / Path(*node.module.split(".")) / f"{alias.name}.py"
                found.add(f"{node.module}.{alias.name}" if inner.is_file() else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "lib"}
    return found


def level(name: str) -> tuple[int, str]:
    folder = name.split(".")[1]
    return (LEVELS.index(folder) if folder in LEVELS else len(LEVELS) + ["launch", "compare"].index(folder)), folder


def test_every_module_has_a_level() -> None:
    assert {path.stem for path in (ROOT / "lib").iterdir()} - {"__init__", "__pycache__"} == {*LEVELS, *BESIDE}


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_point_down(module: Path) -> None:
    if name_of(module) == "lib":
        return
    for imported in imports_of(module):
        assert level(imported) <= level(name_of(module)), f"{name_of(module)} imports {imported}, which is above it"


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_no_import_of_lib_is_delayed(module: Path) -> None:
    """It would hide a circle. Nothing imports the commands in launch, which say a mistake before they import torch."""
    if name_of(module).startswith("lib.launch."):
        return
    body = ast.parse(module.read_text()).body
    at_top = [node.lineno for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in ast.walk(ast.parse(module.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "lib" for name in names):
            assert getattr(node, "lineno", 0) in at_top, names


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name_of(module): imports_of(module) for module in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


WRAPPERS = {  # functions that take the place of the engine's, and call those
    "lib.compare.measure": {"meter.initialize", "self.backward", "self.step"},
    "lib.distributed.pipeline": {"model"},  # without gradients, to check its stages
    "lib.distributed.repairs": {"backward", "step"},
    "lib.settings.ds_config": {"model"},  # pydantic's
}
STEP = re.compile(r"(^|\.)(\w*engine|engine\.module|model|backward|initialize)$|(^|\.)(step|train_batch)$")


def calls_of_a_step(tree: ast.AST) -> set[str]:
    """What belongs to a training step: calls of the engine or model, of a backward, a step or an initialize."""
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {call for call in calls if STEP.search(call)}


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_the_training_step_is_in_the_recipe(module: Path) -> None:
    assert calls_of_a_step(ast.parse(module.read_text())) <= WRAPPERS.get(name_of(module), set())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_step_in_plain_sight(recipe: str) -> None:
    tree = ast.parse((ROOT / "recipes" / f"{recipe}.py").read_text())
    step = {"engine.train_batch"} if recipe in PIPELINES else {"engine", "engine.backward", "engine.step"}
    assert {"deepspeed.initialize", *step} <= set(calls_of_a_step(tree))
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("recipes" in line for line in imports)


@pytest.mark.parametrize("recipe", OURS)
def test_a_recipe_is_short(recipe: str) -> None:
    """A user's copy may be longer."""
    source = (ROOT / "recipes" / f"{recipe}.py").read_text()
    tree = ast.parse(source)
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    loop = next(node for node in ast.walk(main) if isinstance(node, ast.For) and "run.steps" in ast.unparse(node.iter))
    lengths = {"the recipe": len(source.splitlines())}
    lengths |= {what: (node.end_lineno or 0) - node.lineno + 1 for what, node in (("main", main), ("the loop", loop))}
    assert lengths["the recipe"] <= 250 and lengths["main"] <= 45 and lengths["the loop"] <= 12, lengths
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("recipes" in line for line in imports)


@pytest.mark.parametrize("file", [*CODE, *OTHER_FILES], ids=lambda file: str(file.relative_to(ROOT)))
def test_code_is_not_wide_and_classes_not_long(file: Path) -> None:
    text = file.read_text()
    wide = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120]
    assert not wide
    for node in ast.walk(ast.parse(text if file.suffix == ".py" else "")):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < 150, node.name


def test_sys_path_is_changed_by_what_is_started_as_a_script_alone() -> None:
    changing = [name_of(file) for file in CODE if re.search(r"^ *sys\.path[.\[]", file.read_text(), re.MULTILINE)]
    assert [name for name in changing if not name.startswith(("recipes.", "tests.by_hand."))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_not_wide_and_their_links_lead_somewhere(page: Path) -> None:
    """But for tables, and what programs print."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > 120 and not line.lstrip().startswith("|")]
    wide = [number for number in wide if "](" not in lines[number - 1] and " " in lines[number - 1].strip()]
    assert not wide
    for target in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"\s]+)", page.read_text()):
        link = "".join(target)
        if not re.match(r"https?:|mailto:|#", link):
            assert (page.parent / link.split("#")[0]).exists(), link
