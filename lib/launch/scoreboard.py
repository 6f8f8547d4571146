"""./launch.sh results: train every recipe at its defaults, and make one table of the scores.

    ./launch.sh results                          all recipes, one after the other
    ./launch.sh results translation causal_lm    these
    ./launch.sh results --readme                 and put the table into README.md
    ./launch.sh results --quick                  with the settings of --quick, to see that all works

Each recipe leaves its run in runs/results/<recipe> (runs/results-quick). What has finished there, at the settings that are in the recipe's YAML now, is not run
again (delete its folder to run it anew); what was interrupted goes on from its newest checkpoint. A recipe's first score is
the one in the table.
"""

import argparse
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

from lib.errors import ROOT, STOPPED, Stopped, UserError, did_you_mean, display_path
from lib.settings.config import Parser, load
from lib.settings.run_settings import MAY_CHANGE

BEGIN, END = "<!-- made by ./launch.sh results --readme -->", "<!-- end -->"


def recipes(asked: list[str]) -> list[str]:
    """Those asked for, or all. Raises UserError for one that is not there."""
    there = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    for name in asked:
        if name not in there:
            raise UserError(f"there is no recipe {name}{did_you_mean(name, there)}; recipes: {', '.join(there)}")
    return asked or there


def is_current(recipe: str, run: Path, quick: bool) -> bool:
    """Whether the run that is there was made with what the recipe's YAML says now. False where there is none."""
    path = run / "config.yaml"
    if not path.is_file():
        return False
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    now: Any = load(importlib.import_module(f"recipes.{recipe}").Config, ROOT / "recipes" / f"{recipe}.yaml", {}, quick)
    decides = {
        name: value
        for name, value in dataclasses.asdict(now).items()
        if name not in MAY_CHANGE or name in ("dataset", "max_steps", "epochs")
    }
    return decides == {name: before.get(name) for name in decides}


def train(recipe: str, run: Path, quick: bool) -> None:
    """Run a recipe to its end, unless that was done. Raises UserError if it does not get there."""
    how = "--resume" if is_current(recipe, run, quick) else "--overwrite"
    print(f"\n== {recipe}", flush=True)
    process = subprocess.Popen([ROOT / "launch.sh", recipe, "--run_dir", run, how, *(["--quick"] if quick else [])])
    # A signal to stop is the run's to handle, which saves; Ctrl-C has reached it already.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    if code == STOPPED:
        raise Stopped(f"{recipe} has stopped and is saved; ./launch.sh results goes on with it", STOPPED)
    if code:
        raise UserError(f"{recipe} ended with exit code {code}; ./launch.sh results goes on with it")


def row(recipe: str, run: Path) -> list[str]:
    """recipe, task, data, metric, score, baselines, minutes."""
    result, settings = (
        json.loads((run / "result.json").read_text(encoding="utf-8")),
        yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")),
    )
    (_, scores), *baselines = result["scores"].items()
    metric, score = next(iter(scores.items()))
    beside = "; ".join(f"{name} {shown_score(values[metric])}" for name, values in baselines)
    task = (importlib.import_module(f"recipes.{recipe}").__doc__ or "").splitlines()[0].rstrip(".").lower()
    name = f"[`{recipe}`](recipes/{recipe}.py)"
    return [name, task, settings["dataset"], metric, shown_score(score), beside, f"{result['seconds'] / 60:.1f}"]


def shown_score(score: float | None) -> str:
    """Three digits, or all before the point; None: not a number."""
    return "-" if score is None else f"{score:,.0f}" if abs(score) >= 100 else f"{score:.3g}"


def table(runs: dict[str, Path]) -> str:
    """The Markdown table, and a line that says what it was made with."""
    import torch

    versions = json.loads((next(iter(runs.values())) / "versions.json").read_text(encoding="utf-8"))
    newest = max((run / "result.json").stat().st_mtime for run in runs.values())
    header = ["recipe", "task", "data", "metric", "score", "baselines", "minutes"]
    lines = [
        "| " + " | ".join(cells) + " |"
        for cells in (header, ["---"] * len(header), *(row(*run) for run in runs.items()))
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    made = f"deepspeed {versions['deepspeed']}, torch {versions['torch']}, {datetime.date.fromtimestamp(newest)}"
    return "\n".join(lines) + f"\n\n*Test scores; minutes from start to end, with the baseline. {device}, {made}.*"


def main() -> None:
    parser = Parser(
        prog="./launch.sh results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", help="which (default: all)")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--quick", action="store_true", help="with the settings of --quick")
    try:
        options = parser.parse_args()
        if options.quick and options.readme:
            raise UserError("--quick and --readme: the scores of quick runs say nothing; leave one of them out")
        if options.recipes and options.readme:
            raise UserError(
                "--readme writes the whole table; leave the names of recipes out (what has finished is not run again)"
            )
        folder = ROOT / "runs" / ("results-quick" if options.quick else "results")
        runs = {name: folder / name for name in recipes(options.recipes)}
        for name, run in runs.items():
            train(name, run, options.quick)
        text = table(runs)
        print(f"\n{text}")
        if options.readme:
            readme = ROOT / "README.md"
            before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
            _, end, after = rest.partition(END)
            if not end:
                raise UserError(f"{display_path(readme)} has no place for the table, between '{BEGIN}' and '{END}'")
            readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)


if __name__ == "__main__":
    main()
