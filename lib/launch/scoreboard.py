"""./launch.sh results: train every recipe at its defaults, and make one table of the scores.

    ./launch.sh results                          all recipes, one after the other
    ./launch.sh results translation causal_lm    these
    ./launch.sh results --readme                 all, and put their rows into the table of README.md
    ./launch.sh results translation --readme     one, and put its row there; the other rows stay
    ./launch.sh results --quick                  with the settings of --quick, to see that all works

Each recipe leaves its run in runs/results/<recipe> (runs/results-quick). What has finished there, at the settings that
are in the recipe's YAML now, is not run again (delete its folder to run it anew); what was interrupted goes on from its
newest checkpoint. A recipe's first score is the one in the table. Each row says on which device and when its run was
made: the run folder keeps both in made_on.json.
"""

import argparse
import ast
import dataclasses
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lib.errors import MISTAKE, ROOT, STOPPED, Stopped, UserError, did_you_mean
from lib.launch import devices
from lib.settings.config import Parser, load
from lib.settings.run_settings import MAY_CHANGE

BEGIN, END = "<!-- made by ./launch.sh results --readme -->", "<!-- end -->"
COLUMNS = ["recipe", "task", "data", "metric", "score", "baselines", "minutes", "device", "date", "deepspeed, torch"]
MADE_ON = "made_on.json"  # in the run folder: the device, and the date of the last step or score
FOOTER = "*Test scores; minutes from start to end, with the baseline. Each row says where and when it was measured.*"


def all_recipes() -> list[str]:
    """Every recipe that has a YAML, by name."""
    return sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def chosen_recipes(names: list[str]) -> list[str]:
    """These recipes, or all where none is named. Raises UserError for a name that is no recipe."""
    known = all_recipes()
    for name in names:
        if name not in known:
            raise UserError(f"there is no recipe {name}{did_you_mean(name, known)}; recipes: {', '.join(known)}")
    return names or known


def is_current(recipe: str, run: Path, quick: bool) -> bool:
    """Whether the run in this folder was made with what the recipe's YAML says now. False where there is no run."""
    path = run / "config.yaml"
    if not path.is_file():
        return False
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    now: Any = load(importlib.import_module(f"recipes.{recipe}").Config, ROOT / "recipes" / f"{recipe}.yaml", {}, quick)
    result_depends_on = {
        name: value
        for name, value in dataclasses.asdict(now).items()
        if name not in MAY_CHANGE or name in ("dataset", "max_steps", "epochs")
    }
    return result_depends_on == {name: before.get(name) for name in result_depends_on}


def train(recipe: str, run: Path, quick: bool) -> None:
    """Run a recipe to its end, unless that was done. Raises UserError if it does not get there."""
    how = "--resume" if is_current(recipe, run, quick) else "--overwrite"
    metrics = run / "metrics.jsonl"
    written_before = metrics.stat().st_mtime_ns if metrics.exists() else None
    print(f"\n== {recipe}", flush=True)
    process = subprocess.Popen([ROOT / "launch.sh", recipe, "--run_dir", run, how, *(["--quick"] if quick else [])])
    # A signal to stop is the run's to handle, which saves; Ctrl-C has reached it already.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    if metrics.exists() and metrics.stat().st_mtime_ns != written_before:  # it has trained, and was not found finished
        write_made_on(run, device_name())
    if code == STOPPED:
        raise Stopped(f"{recipe} has stopped and is saved; ./launch.sh results goes on with it", STOPPED)
    if code:
        raise UserError(f"{recipe} ended with exit code {code}; ./launch.sh results goes on with it")


def device_name() -> str:
    """What a run on this machine takes by default, such as "2 CPU cores" or "1 x NVIDIA H100 80GB HBM3"."""
    found = devices.find()
    if not found.ids:
        return f"{len(os.sched_getaffinity(0))} CPU cores"
    name = found.accelerator
    if name == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    return f"{len(found.ids)} x {name}"


def write_made_on(run: Path, device: str) -> None:
    """Note the device and the date of the run. One that was interrupted and finished on another device names both."""
    path = run / MADE_ON  # which a run that was overwritten has deleted
    before = json.loads(path.read_text(encoding="utf-8"))["device"] if path.is_file() else device
    after = before if before.endswith(device) else f"{before}, then {device}"
    path.write_text(json.dumps({"device": after, "date": date_of(run)}, indent=2) + "\n", encoding="utf-8")


def date_of(run: Path) -> str:
    """The day on which metrics.jsonl was last written. (result.json is touched whenever its run is found finished.)"""
    return str(datetime.date.fromtimestamp((run / "metrics.jsonl").stat().st_mtime))


def row(recipe: str, run: Path) -> list[str]:
    """The cells of a finished run, one for each of COLUMNS."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    versions = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    made_on = run / MADE_ON
    if made_on.is_file():
        made = json.loads(made_on.read_text(encoding="utf-8"))
    else:  # a run from before these notes, or one that was started by hand
        made = {"device": "not recorded", "date": date_of(run)}
    (_, scores), *baselines = result["scores"].items()
    metric, score = next(iter(scores.items()))
    return [
        f"[`{recipe}`](recipes/{recipe}.py)",
        task_of(recipe),
        settings["dataset"],
        metric,
        shown_score(score),
        "; ".join(f"{name} {shown_score(values[metric])}" for name, values in baselines),
        f"{result['seconds'] / 60:.1f}",
        made["device"],
        made["date"],
        f"{versions['deepspeed']}, {versions['torch']}",
    ]


def task_of(recipe: str) -> str:
    """The first line of the recipe's docstring, as the middle of a sentence."""
    source = (ROOT / "recipes" / f"{recipe}.py").read_text(encoding="utf-8")
    first_line = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return first_line.rstrip(".").lower()


def shown_score(score: float | None) -> str:
    """Three digits, or all before the point; None: not a number."""
    return "-" if score is None else f"{score:,.0f}" if abs(score) >= 100 else f"{score:.3g}"


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(lines: list[str]) -> str:
    """The Markdown table with these rows, and what its figures are."""
    return "\n".join([table_line(COLUMNS), table_line(["---"] * len(COLUMNS)), *lines, "", FOOTER])


def with_table(readme: str, lines: dict[str, str]) -> str:
    """The README with these rows in its table: {recipe: row}. Rows of other recipes stay as they are.

    Raises UserError where the README has no place for the table, or has a row to keep in a table of other columns.
    """
    before, _, rest = readme.partition(BEGIN)
    old_table, end, after = rest.partition(END)
    if not end:
        raise UserError(f"README.md has no place for the table, between '{BEGIN}' and '{END}'")
    old_lines = old_table.splitlines()
    starts = {name: f"| [`{name}`]" for name in all_recipes() if name not in lines}
    kept = {name: line for name, start in starts.items() for line in old_lines if line.startswith(start)}
    if kept and table_line(COLUMNS) not in old_lines:
        raise UserError(
            f"the table in README.md has other columns than {', '.join(COLUMNS)}; run all: ./launch.sh results --readme"
        )
    rows = {**kept, **lines}
    return f"{before}{BEGIN}\n{table([rows[name] for name in sorted(rows)])}\n{END}{after}"


def main() -> None:
    parser = Parser(
        prog="./launch.sh results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", help="which (default: all)")
    parser.add_argument("--readme", action="store_true", help="put the rows into the table of README.md")
    parser.add_argument("--quick", action="store_true", help="with the settings of --quick")
    try:
        options = parser.parse_args()
        if options.quick and options.readme:
            raise UserError("--quick and --readme: the scores of quick runs say nothing; leave one of them out")
        folder = ROOT / "runs" / ("results-quick" if options.quick else "results")
        runs = {name: folder / name for name in chosen_recipes(options.recipes)}
        for name, run in runs.items():
            train(name, run, options.quick)
        lines = {name: table_line(row(name, run)) for name, run in runs.items()}
        print(f"\n{table(list(lines.values()))}")
        if options.readme:
            readme = ROOT / "README.md"
            readme.write_text(with_table(readme.read_text(encoding="utf-8"), lines), encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)


if __name__ == "__main__":
    main()
