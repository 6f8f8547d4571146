"""./launch.sh compare: run one recipe under several DeepSpeed configs, and report what each costs and gives.

    ./launch.sh compare <recipe> [options] [recipe settings]     run and report
    ./launch.sh compare <folder of a comparison> [--with OLD]    report once more, beside an older one
    ./launch.sh compare --list                                   past comparisons

Each run is a launch of its own (lib/measure.py). A first round runs every config to its checkpoint and test; further rounds repeat
the first steps of all, one config after the other, so that a slow minute of the machine meets all of them alike. What has ended is
kept in the comparison's folder, and --resume goes on from there.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of lib/

from lib import report, results, supervise, theory
from lib.config import ROOT, UserError, did_you_mean, shown
from lib.ds_config import read_json
from lib.results import case_folder, read_outcome

INSPECTED = 3  # of lib/measure.py, which this process does not import: it would start DeepSpeed
FEWEST_STEPS = INSPECTED + 2
# The settings that a comparison decides, where a recipe has them.
DECIDED = {
    "run_dir": None, "max_steps": None, "epochs": "null", "eval_every": "null", "save_every": None, "save_minutes": "null", "keep_best": "false",
    "time_limit": "null", "resume": "false", "overwrite": "true", "monitor": "null",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, recipe settings)."""
    parser = _Parser(prog="./launch.sh compare", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a recipe, or the folder of a comparison that is there")
    parser.add_argument("--stages", metavar="LIST", help="such as 0,2,3_offload: takes ds_configs/<recipe>/zero0.json ... (default: all that are there)")
    parser.add_argument("--ds_configs", metavar="FILES", help="DeepSpeed JSONs instead, separated by commas; the first is what the others are compared with")
    parser.add_argument("--ranks", metavar="LIST", help="processes, one a GPU; several numbers show the scaling (default: all GPUs, or 2 on a CPU)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of each config, at least {FEWEST_STEPS} (default: 30)")
    parser.add_argument("--rounds", type=int, help="how often each config runs; all but the first time a quarter of the steps (default: 2)")
    parser.add_argument("--preset", choices=["paper"], help="paper: set ZeRO's knobs so that the paper's volumes of traffic appear")
    parser.add_argument("--resume", action="store_true", help="go on with the newest comparison of this recipe, with its options")
    parser.add_argument("--list", action="store_true", help="past comparisons")
    parser.add_argument("--with", dest="other", metavar="FOLDER", help="lay an older comparison beside")
    options, settings = parser.parse_known_args(arguments)
    return options, settings


def numbers(text: str, option: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise UserError(f"--{option} is {text}; write whole numbers from 1 up, each once, such as 1,2,4")
    return found


def config_files(options: argparse.Namespace) -> dict[str, Path]:
    """{name: file} of the DeepSpeed configs to compare, in order."""
    folder = ROOT / "ds_configs" / options.recipe
    if options.stages and options.ds_configs:
        raise UserError("--stages and --ds_configs both choose the configs; give one of them")
    if options.ds_configs:
        files = [Path(name) if Path(name).is_file() else folder / f"{Path(name).stem}.json" for name in options.ds_configs.split(",")]
    else:
        known = sorted(folder.glob("zero*.json"), key=lambda path: (len(path.stem), path.stem))
        if not known:
            raise UserError(f"there are no zero*.json in {shown(folder)}; give --ds_configs")
        files = [folder / f"zero{stage}.json" for stage in options.stages.split(",")] if options.stages else known
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no {shown(file)}{did_you_mean(file.stem, [path.stem for path in folder.glob('*.json')])}")
    named = {file.stem: file for file in files}
    if len(named) < len(files):
        raise UserError("two of the configs have the same name, and the report could not tell them apart; rename one")
    return named


def check(recipe: str, settings: list[str], configs: dict[str, str], ranks: list[int], steps: int) -> dict[str, Any]:
    """What the comparison needs to know of the recipe. Raises UserError where a run would. In a process of its own, for it imports DeepSpeed."""
    from lib import config
    from lib.ds_config import load_ds_config

    module = importlib.import_module(f"recipes.{recipe}")
    fields = typing.get_type_hints(module.Config)
    for setting in settings:
        name = setting.split("=")[0].lstrip("-")
        if setting.startswith("--") and name in DECIDED:
            instead = {"max_steps": "; use --steps", "epochs": "; use --steps", "run_dir": " and writes to runs/"}.get(name, "")
            raise UserError(f"a comparison decides --{name} itself{instead}; leave it out")
    decided = [f"--{name}={value}" for name, value in (DECIDED | {"max_steps": str(steps)}).items() if name in fields and value is not None]
    for file in configs.values():
        for count in ranks:
            cfg, path = config.parse(module.Config, str(ROOT / "recipes" / f"{recipe}.py"), [f"--deepspeed_config={file}", *settings, *decided])
            load_ds_config(path, cfg, count)
    if "max_steps" not in fields or "run_dir" not in fields:
        raise UserError(f"recipes/{recipe}.py has no settings max_steps and run_dir, which a comparison decides")
    return {"fields": list(fields), "precision": cfg.precision}


def in_a_process(do: Any, *arguments: Any) -> Any:
    """The result of a function in a fresh process, so that what it imports and takes of the devices goes with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(do, *arguments).result()


def plan(options: argparse.Namespace, settings: list[str]) -> Path:
    """Check everything and make the comparison's folder. Returns the folder."""
    ranks = numbers(options.ranks or os.environ.get("DEFAULT_RANKS", "2"), "ranks")
    steps, rounds = options.steps or 30, options.rounds or 2
    if steps < FEWEST_STEPS or rounds < 1:
        raise UserError(
            f"--steps is {steps} and --rounds is {rounds}; there must be at least {FEWEST_STEPS} steps (the first {INSPECTED} are not timed) and 1 round"
        )
    gpus = int(os.environ.get("GPUS", "0"))
    if gpus and max(ranks) > gpus:
        raise UserError(f"--ranks is {options.ranks}, but there are {gpus} GPUs")
    configs = {name: read_json(file) for name, file in config_files(options).items()}
    if options.preset == "paper":
        configs = {name: theory.with_paper_preset(config) for name, config in configs.items()}
    folder = Path(f"runs/compare-{options.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    (folder / "ds_configs").mkdir(parents=True)
    try:
        files = {}
        for name, config in configs.items():
            files[name] = str(folder / "ds_configs" / f"{name}.json")
            Path(files[name]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        found = in_a_process(check, options.recipe, settings, files, ranks, steps)
    except BaseException:
        shutil.rmtree(folder)
        raise
    spec = {
        "recipe": options.recipe,
        "command": shlex.join(["./launch.sh", "compare", *sys.argv[1:]]),
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "configs": configs,
        "ranks": ranks,
        "steps": steps,
        "rounds": rounds,
        "repeat_steps": min(steps, max(2 * INSPECTED + 2, steps // 4)),
        "first_timed_step": INSPECTED + 1,
        "preset": options.preset,
        "settings": settings,
        "code": code_version(),
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **found,
    }
    write_json(folder / "comparison.json", spec)
    return folder


def code_version() -> str:
    """The commit of this checkout, with a + where it was changed."""
    found = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def resumed(options: argparse.Namespace, settings: list[str]) -> Path:
    """The folder of the newest comparison of the recipe. Options given again must be its own."""
    folders = [folder for folder, spec in past() if spec["recipe"] == options.recipe]
    if not folders:
        raise UserError(f"there is no comparison of {options.recipe} in runs/ to go on with; leave --resume out")
    folder = folders[-1]
    spec = results.read_spec(folder)
    given = {
        "ranks": numbers(options.ranks, "ranks") if options.ranks else None,
        "steps": options.steps,
        "rounds": options.rounds,
        "preset": options.preset,
        "settings": settings or None,
        "configs": list(config_files(options)) if options.stages or options.ds_configs else None,
        "code": code_version(),
        "versions": versions(),
    }
    for name, value in given.items():
        started_with = list(spec[name]) if name == "configs" else spec[name]
        if value is not None and value != started_with:
            raise UserError(f"{shown(folder)} was started with {name} {json.dumps(started_with)}, not {json.dumps(value)}; start a new one, without --resume")
    return folder


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("deepspeed", "torch", "transformers")}


def past() -> list[tuple[Path, dict[str, Any]]]:
    """(folder, what it compares) of the comparisons in runs/, oldest first."""
    folders = sorted((path.parent for path in Path("runs").glob("compare-*/comparison.json")), key=lambda path: path.name[-15:])
    return [(folder, results.read_spec(folder)) for folder in folders]


def run_all(folder: Path, spec: dict[str, Any]) -> None:
    """Run what has not ended yet, round by round."""
    cases = [(number, ranks, config) for number in range(1, spec["rounds"] + 1) for ranks in spec["ranks"] for config in spec["configs"]]
    seconds: dict[bool, list[float]] = {True: [], False: []}  # of the runs that have ended: of the first round, of others
    for at, (number, ranks, config) in enumerate(cases, 1):
        run = case_folder(folder, config, ranks, number)
        outcome = read_outcome(run)
        name = f"[{at:>{len(str(len(cases)))}}/{len(cases)}] {config}, {ranks} rank{'s' if ranks > 1 else ''}, round {number}"
        if outcome is None or outcome["failed"]:
            first = read_outcome(case_folder(folder, config, ranks, 1))
            if number > 1 and first is not None and first["failed"]:
                continue  # it would fail again
            with live_progress(name, run / "run" / "metrics.jsonl", spec["steps"] if number == 1 else spec["repeat_steps"]):
                outcome = run_one(run, spec, number, ranks, config)
        seconds[number == 1].append(outcome["seconds"])
        ahead = cases[at:]
        means = {first: statistics.fmean(seconds[first] or [0.5 * statistics.fmean(seconds[True])]) for first in (True, False)}
        left = int(sum(means[other == 1] for other, _, _ in ahead))
        ending = f"; about {left // 60}:{left % 60:02d} left" if ahead else ""
        print(f"{name}: {'failed: ' + outcome['failed'] if outcome['failed'] else outcome['said']}{ending}", flush=True)


@contextlib.contextmanager
def live_progress(name: str, metrics: Path, steps: int) -> Iterator[None]:
    """On a terminal, show in one line how far a run has come, from the file that it writes."""
    if not sys.stdout.isatty():
        yield
        return
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(0.5):
            with contextlib.suppress(OSError):
                done = metrics.read_text(encoding="utf-8").count('"loss"')
                print(f"\r\033[K{name}: step {done}/{steps}", end="", flush=True)

    print(f"{name}: starting", end="", flush=True)
    shower = threading.Thread(target=show, daemon=True)
    shower.start()
    try:
        yield
    finally:
        ended.set()
        shower.join()
        print("\r\033[K", end="", flush=True)


def run_one(run: Path, spec: dict[str, Any], number: int, ranks: int, config: str) -> dict[str, Any]:
    """Run a config once. Returns its outcome, which is also left in the folder."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    steps = spec["steps"] if number == 1 else spec["repeat_steps"]
    decided = DECIDED | {"run_dir": str(run / "run"), "max_steps": str(spec["steps"]), "save_every": str(steps) if number == 1 else "null"}
    settings = [*spec["settings"], *(f"--{name}={value}" for name, value in decided.items() if name in spec["fields"])]
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--log_level", "critical", "--master_port", str(supervise.free_port()), "--num_accelerators", str(ranks),
        str(ROOT / "lib" / "measure.py"), str(run), str(steps), "all" if number == 1 else "times",
        str(ROOT / "recipes" / f"{spec['recipe']}.py"), "--deepspeed_config", str(run.parents[1] / "ds_configs" / f"{config}.json"), *settings,
    ]  # fmt: skip
    started = time.monotonic()
    with (run / "log.txt").open("w", encoding="utf-8") as log:
        print(shlex.join(command), file=log, flush=True)
        status = supervise.run_once(command, log)
    if supervise.stop_signals:
        shutil.rmtree(run, ignore_errors=True)
        raise KeyboardInterrupt
    seconds = time.monotonic() - started
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in run.glob("rank-*.json")]
    complete = len(measured) == ranks and all("seconds" in rank for rank in measured) and status == 0
    outcome = {"failed": None if complete else why_failed((run / "log.txt").read_text(encoding="utf-8"), status), "seconds": round(seconds, 1)}
    if complete:
        steps_ms = [1000 * sum(phases.values()) for phases in measured[0]["seconds"][spec["first_timed_step"] - 1 :]]
        outcome["said"] = f"{results.written(statistics.median(steps_ms), 'ms')} a step, {seconds:.0f} s in all"
    for name in ("metrics.jsonl", "config.yaml", "ds_config.json", "log.txt"):  # the rest, model and checkpoint, was measured and is large
        if (run / "run" / name).is_file():
            shutil.move(run / "run" / name, run / (f"run-{name}" if name == "log.txt" else name))
    shutil.rmtree(run / "run", ignore_errors=True)
    write_json(run / "outcome.json", outcome)
    return outcome


def why_failed(log: str, status: int) -> str:
    """The reason in what a run printed: its own error line, else that of an exception, else how it ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    exceptions = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception): ", line)]
    if status in (137, 247) and not exceptions:  # the launcher's own exit code, of signal 9
        return "a rank was killed (SIGKILL), as the kernel does when host memory runs out"
    reason = (exceptions or errors or [f"exit code {status}; the end of its log: {lines[-1] if lines else 'empty'}"])[-1]
    return " ".join(reason.split())[:300]


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def list_past() -> None:
    folders = past()
    if not folders:
        print("no comparisons in runs/ yet; ./launch.sh compare <recipe> makes one")
    for folder, spec in folders:
        ended = len(list(folder.glob("*/round*/outcome.json")))
        expected = len(spec["configs"]) * len(spec["ranks"]) * spec["rounds"]
        state = "" if ended >= expected else f"; {ended} of {expected} runs have ended, --resume goes on"
        about = f"{', '.join(spec['configs'])}; ranks {', '.join(map(str, spec['ranks']))}; {spec['steps']} steps; {' '.join(spec['settings']) or 'default settings'}"
        print(
            f"{shown(folder)}  {spec['created']}  {about}; deepspeed {spec['versions']['deepspeed']}, torch {spec['versions']['torch']}, code {spec['code']}{state}"
        )


def main(arguments: list[str]) -> int:
    options, settings = parse(arguments)
    if options.list:
        list_past()
        return 0
    if options.recipe is None:
        raise UserError("name a recipe, such as: ./launch.sh compare text_classification; or --list, or --help")
    other = results.collect(Path(options.other)) if options.other else None  # before anything expensive
    if (Path(options.recipe) / "comparison.json").is_file():
        folder = Path(options.recipe)
        given = [name for name in ("stages", "ds_configs", "ranks", "steps", "rounds", "preset", "resume") if getattr(options, name)]
        if given or settings:
            raise UserError(f"{shown(folder)} has been run; only --with goes with it, not {' '.join([f'--{name}' for name in given] + settings)}")
    else:
        options.recipe = options.recipe.removeprefix("recipes/").removesuffix(".py")
        recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
        if options.recipe not in recipes:
            raise UserError(f"there is neither a recipe nor a comparison {options.recipe}{did_you_mean(options.recipe, recipes)}; recipes: {' '.join(recipes)}")
        folder = resumed(options, settings) if options.resume else plan(options, settings)
        spec = results.read_spec(folder)
        print(f"{shown(folder)}: {', '.join(spec['configs'])}; {spec['steps']} steps, {spec['rounds']} rounds")
        try:
            run_all(folder, spec)
        except KeyboardInterrupt:
            print(f"\nstopped; ./launch.sh compare {spec['recipe']} --resume goes on, and runs nothing again that has ended")
            return 130
    found = results.collect(folder)
    report.write(found, other)
    print(report.as_text(found, other))
    print(f"\n{shown(folder / 'report.html')}, report.md, results.csv, charts/")
    return 0 if found.good() else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
