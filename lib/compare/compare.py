"""./launch.sh compare: run one recipe under several DeepSpeed configs, and report what each costs and gives.

    ./launch.sh compare <recipe> [options] [recipe settings]     run and report
    ./launch.sh compare <folder of a comparison> [--with OLD]    report once more, beside an older one
    ./launch.sh compare --list                                   past comparisons

Each run is a launch of its own (lib/compare/measure.py). The first round runs every config to its checkpoint and test.
Further rounds repeat the first steps of every config, one after the other, so that a slow minute of the machine shows
as a difference between rounds. Runs that have ended are kept in the comparison's folder, and --resume runs the rest.
"""

import argparse
import contextlib
import hashlib
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
from typing import Any

from lib.compare import report, results, theory
from lib.compare.results import INSPECTED, case_folder, read_outcome
from lib.distributed import network
from lib.errors import INTERRUPTED, ROOT, UserError, did_you_mean, display_path, from_home, new_folder, run_command
from lib.launch import devices, supervise
from lib.progress import progress
from lib.run.signs import Signs
from lib.settings.config import Parser, known_arguments, parser_from_source
from lib.settings.config import parse as parse_settings
from lib.settings.ds_config import load_ds_config, read_json

FEWEST_STEPS = INSPECTED + 2
# The settings that a comparison decides, where a recipe has them. None: run_one sets the value.
DECIDED = {
    "run_dir": None, "max_steps": None, "epochs": "null", "eval_every": "null", "save_every": None,
    "save_minutes": "null", "keep_best": "false", "time_limit": "null", "resume": "false", "overwrite": "true",
    "monitor": "null",
}  # fmt: skip


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, recipe settings) from the arguments of the command. Raises UserError."""
    parser = Parser(
        prog="./launch.sh compare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="a recipe, or the folder of a comparison that is there")
    parser.add_argument(
        "--stages",
        metavar="LIST",
        help="such as 0,2,3_offload: takes ds_configs/<recipe>/zero0.json ... (default: all that are there)",
    )
    parser.add_argument(
        "--ds_configs",
        metavar="FILES",
        help="DeepSpeed JSONs instead, separated by commas; the first is what the others are compared with",
    )
    parser.add_argument(
        "--ranks",
        metavar="LIST",
        help="processes, one a GPU; several numbers show the scaling (default: all GPUs, or 2 on a CPU)",
    )
    parser.add_argument(
        "--steps", type=int, help=f"optimizer steps of each config, at least {FEWEST_STEPS} (default: 30)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="how often each config runs; all but the first time the first quarter of the steps, at least 8"
        " (default: 2)",
    )
    parser.add_argument(
        "--preset", choices=["paper"], help="paper: set ZeRO's knobs so that the paper's volumes of traffic appear"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the newest comparison of this recipe, with its options"
    )
    parser.add_argument("--list", action="store_true", help="past comparisons")
    parser.add_argument("--with", dest="other", metavar="FOLDER", help="lay an older comparison beside")
    options, settings = parser.parse_known_args(arguments)
    if settings and options.recipe and arguments.index(settings[0]) < arguments.index(options.recipe):
        raise UserError(
            f"the recipe comes first: ./launch.sh compare <recipe> [options] [recipe settings], not {settings[0]}"
        )
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
    """{name: file} of the DeepSpeed configs to compare, in order. Raises UserError."""
    folder = ROOT / "ds_configs" / options.recipe
    if options.stages and options.ds_configs:
        raise UserError("--stages and --ds_configs both choose the configs; give one of them")
    if options.ds_configs:
        names = [from_home(name) for name in options.ds_configs.split(",")]
        files = [
            folder / f"{name}.json" if not Path(name).is_file() and "/" not in name and "." not in name else Path(name)
            for name in names
        ]
    else:
        known = sorted(folder.glob("zero*.json"), key=lambda path: (len(path.stem), path.stem))
        if not known:
            raise UserError(f"there are no zero*.json in {display_path(folder)}; give --ds_configs")
        files = [folder / f"zero{stage}.json" for stage in options.stages.split(",")] if options.stages else known
    for file in files:
        if not file.is_file():
            raise UserError(
                f"there is no {display_path(file)}"
                f"{did_you_mean(file.stem, [path.stem for path in folder.glob('*.json')])}"
            )
    named = {file.stem: file for file in files}
    if len(named) < len(files):
        raise UserError("two of the configs have the same name, and the report could not tell them apart; rename one")
    return named


def configs_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{name: DeepSpeed config} to compare, with the preset's changes."""
    configs = {name: read_json(file) for name, file in config_files(options).items()}
    return (
        {name: theory.with_paper_preset(config) for name, config in configs.items()}
        if options.preset == "paper"
        else configs
    )


def check(recipe: str, settings: list[str], configs: dict[str, str], ranks: list[int], steps: int) -> dict[str, Any]:
    """Check the recipe's settings under each config and number of ranks. Raises UserError where a run would.

    Returns what the comparison needs to know about the recipe: {"fields": names of its settings, "precision": ...}.
    Called in its own process, because it imports DeepSpeed.
    """
    try:
        module = importlib.import_module(f"recipes.{recipe}")
        fields = typing.get_type_hints(module.Config)
    except Exception as error:
        raise UserError(f"recipes/{recipe}.py cannot be read: {type(error).__name__}: {error}") from None
    for setting in settings:
        name = setting.split("=")[0].lstrip("-")
        if setting.startswith("--deepspeed"):
            raise UserError(
                f"{setting.split('=')[0]} chooses one config; give the configs to compare with --ds_configs"
            )
        if setting.startswith("--") and name in DECIDED:
            instead = {"max_steps": "; use --steps", "epochs": "; use --steps", "run_dir": " and writes to runs/"}.get(
                name, ""
            )
            raise UserError(f"a comparison decides --{name} itself{instead}; leave it out")
    decided = [
        f"--{name}={value}"
        for name, value in (DECIDED | {"max_steps": str(steps)}).items()
        if name in fields and value is not None
    ]
    for file in configs.values():
        for count in ranks:
            cfg, path = parse_settings(
                module.Config,
                str(ROOT / "recipes" / f"{recipe}.py"),
                [f"--deepspeed_config={file}", *settings, *decided],
            )
            load_ds_config(path, cfg, count)
    if "max_steps" not in fields or "run_dir" not in fields:
        raise UserError(f"recipes/{recipe}.py has no settings max_steps and run_dir, which a comparison decides")
    return {"fields": list(fields), "precision": cfg.precision}


def in_a_process(function: Any, *arguments: Any) -> Any:
    """The result of a function that is called in a fresh process, whose end frees the memory of host and device."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def plan(options: argparse.Namespace, settings: list[str]) -> Path:
    """Check everything and make the comparison's folder. Returns the folder. Raises UserError."""
    machine_devices = devices.find()
    ranks = numbers(options.ranks or str(machine_devices.default_ranks), "ranks")
    machine_devices.launcher_options(max(ranks))  # raises UserError where there are fewer devices
    steps = 30 if options.steps is None else options.steps
    rounds = 2 if options.rounds is None else options.rounds
    if steps < FEWEST_STEPS or rounds < 1:
        raise UserError(
            f"--steps is {steps} and --rounds is {rounds}; there must be at least {FEWEST_STEPS} steps"
            f" (the first {INSPECTED} are not timed) and 1 round"
        )
    configs = configs_of(options)
    commit, code = code_version(options.recipe, settings)
    try:
        folder = new_folder(f"runs/compare-{options.recipe}")
        (folder / "ds_configs").mkdir()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be made: {error.strerror or error}") from None
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
        "preset": options.preset,
        "settings": settings,
        "commit": commit,
        "code": code,
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **found,
    }
    write_json(folder / "comparison.json", spec)
    return folder


def code_version(recipe: str, settings: list[str]) -> tuple[str, str]:
    """(this checkout's commit, a hash of the code and data that a comparison runs).

    The hash is over lib/, the recipe, its YAML, and the files that settings name.
    """
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = found.stdout.strip() or "no commit"
    except OSError:
        commit = "no commit"
    # Of lib/compare, only measure.py takes part in a run.
    files = [
        file
        for file in sorted((ROOT / "lib").rglob("*.py"))
        if file.parent.name != "compare" or file.name == "measure.py"
    ]
    files += [ROOT / "recipes" / f"{recipe}.py", ROOT / "recipes" / f"{recipe}.yaml"]
    # A value may name a file, such as a data set.
    values = [part.partition("=")[2] or part for part in settings]
    # Path.is_file raises an error where a value, such as a prompt, is too long for a name.
    files += [Path(value) for value in values if os.path.isfile(value)]  # noqa: PTH113
    code = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            code.update(hashlib.file_digest(file, "sha256").digest())  # reads the file in pieces
    return commit, code.hexdigest()[:8]


def resumed(options: argparse.Namespace, settings: list[str]) -> Path:
    """The folder of the recipe's newest comparison. Raises UserError if an option differs from the comparison's."""
    folders = [folder for folder, spec in past() if spec["recipe"] == options.recipe]
    if not folders:
        raise UserError(f"there is no comparison of {options.recipe} in runs/ to go on with; leave --resume out")
    folder = folders[-1]
    spec = results.read_spec(folder)
    options.preset = options.preset or spec["preset"]
    given = {
        "ranks": numbers(options.ranks, "ranks") if options.ranks else None,
        "steps": options.steps,
        "rounds": options.rounds,
        "preset": options.preset,
        "settings": settings or None,
        "configs": configs_of(options) if options.stages or options.ds_configs else None,
        "code": code_version(options.recipe, spec["settings"])[1],
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
    }
    for name, value in given.items():
        if value is not None and value != spec[name]:
            raise UserError(
                f"{display_path(folder)} was started with {name} {json.dumps(spec[name])}, not {json.dumps(value)};"
                " start a new one, without --resume"
            )
    return folder


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in ("deepspeed", "torch", "transformers")
    }


def past() -> list[tuple[Path, dict[str, Any]]]:
    """(folder, comparison.json) of each comparison in runs/, oldest first."""
    found = []
    for path in sorted(Path("runs").glob("compare-*/comparison.json"), key=lambda path: path.parent.name[-15:]):
        with contextlib.suppress(UserError):  # a comparison that cannot be read is left out
            found.append((path.parent, results.read_spec(path.parent)))
    return found


def run_all(folder: Path, spec: dict[str, Any]) -> None:
    """Do the runs that have not ended yet, round by round."""
    cases = [
        (number, ranks, config)
        for number in range(1, spec["rounds"] + 1)
        for ranks in spec["ranks"]
        for config in spec["configs"]
    ]
    seconds: dict[bool, list[float]] = {True: [], False: []}  # of the runs that have ended; True: in the first round
    time_left = ""
    for position, (number, ranks, config) in enumerate(cases, 1):
        run = case_folder(folder, config, ranks, number)
        outcome = read_outcome(run)
        name = (
            f"[{position:>{len(str(len(cases)))}}/{len(cases)}]"
            f" {config}, {ranks} rank{'s' if ranks > 1 else ''}, round {number}"
        )
        if outcome is None or outcome["failed"]:
            first = read_outcome(case_folder(folder, config, ranks, 1))
            if number > 1 and first is not None and first["failed"]:
                continue  # the config would fail again
            with live_progress(
                f"{name}{time_left}", run / "steps_done", spec["steps"] if number == 1 else spec["repeat_steps"]
            ):
                outcome = run_one(run, spec, number, ranks, config)
        seconds[number == 1].append(outcome["seconds"])
        ahead = cases[position:]
        means = {
            first: statistics.fmean(seconds[first] or [0.5 * statistics.fmean(seconds[True])])
            for first in (True, False)
        }
        seconds_left = int(sum(means[round_number == 1] for round_number, _, _ in ahead))
        time_left = f"; about {seconds_left // 60}:{seconds_left % 60:02d} left" if ahead else ""
        print(
            f"{name}: {'failed: ' + outcome['failed'] if outcome['failed'] else outcome['said']}{time_left}", flush=True
        )


@contextlib.contextmanager
def live_progress(name: str, steps_done: Path, steps: int) -> Iterator[None]:
    """Show how far a run has come while it runs.

    On a terminal one line shows the step, which the run writes into the file `steps_done`. Elsewhere a line from time
    to time says that the run goes on.
    """
    if not sys.stdout.isatty():
        with Signs(sys.stdout), progress(name.partition(";")[0]):
            yield
        return
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(0.5):
            with contextlib.suppress(OSError):
                print(f"\r\033[K{name}: step {steps_done.read_text(encoding='utf-8')}/{steps}", end="", flush=True)

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
    """Run a config once, in the folder `run`. Returns the outcome, which is also written into the folder.

    number: of the round. Raises KeyboardInterrupt after a signal to stop.
    """
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    steps = spec["steps"] if number == 1 else spec["repeat_steps"]
    decided = DECIDED | {
        "run_dir": str(run / "run"),
        "max_steps": str(spec["steps"]),
        "save_every": str(steps) if number == 1 else "null",
    }
    settings = [*spec["settings"], *(f"--{name}={value}" for name, value in decided.items() if name in spec["fields"])]
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--log_level", "critical",
        "--master_port", str(network.free_port()), *devices.find().launcher_options(ranks),
        "--module", "lib.compare.measure", str(run), str(steps), "all" if number == 1 else "times",
        str(ROOT / "recipes" / f"{spec['recipe']}.py"),
        "--deepspeed_config", str(run.parents[1] / "ds_configs" / f"{config}.json"), *settings,
    ]  # fmt: skip

    def ended() -> bool:
        return all((run / f"ended-{rank}").exists() for rank in range(ranks))

    started = time.monotonic()
    with (run / "log.txt").open("w", encoding="utf-8") as log:
        print(shlex.join(command), file=log, flush=True)
        status = supervise.run_once([*supervise.START_RANKS, *command[1:]], log, ended)
    seconds = time.monotonic() - started
    complete = ended() or (status == 0 and number == 1 and supervise.end_marker(str(run / "run")) is not None)
    if supervise.stop_signals and not complete:
        shutil.rmtree(run, ignore_errors=True)
        raise KeyboardInterrupt
    outcome = {"failed": None if complete else why_failed(printed(run), status), "seconds": round(seconds, 1)}
    if complete:
        measured = json.loads((run / "rank-0.json").read_text(encoding="utf-8"))
        steps_ms = [1000 * sum(phases.values()) for phases in measured["seconds"][INSPECTED:]]
        outcome["said"] = f"{results.written(statistics.median(steps_ms), 'ms')} a step, {seconds:.0f} s in all"
        for name in ("steps_done", *(f"ended-{rank}" for rank in range(ranks))):
            (run / name).unlink(missing_ok=True)
    # These files are kept. The model and the checkpoint have been measured, and are large.
    for name in ("metrics.jsonl", "config.yaml", "ds_config.json", "log.txt"):
        if (run / "run" / name).is_file():
            shutil.move(run / "run" / name, run / (f"run-{name}" if name == "log.txt" else name))
    shutil.rmtree(run / "run", ignore_errors=True)
    write_json(run / "outcome.json", outcome)
    if supervise.stop_signals:
        raise KeyboardInterrupt
    return outcome


def printed(run: Path) -> str:
    """What a run printed into its own log and, after that, on the console."""
    files = [run / "run" / "log.txt", run / "log.txt"]
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())


def why_failed(log: str, status: int) -> str:
    """The reason why a run failed, from what all of its ranks printed.

    A lack of memory on one rank makes other ranks fail with other errors, so a message about memory comes first.
    """
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception): ", line)]
    memory = [line for line in exceptions if re.search(r"out of memory|not enough memory|can't allocate memory", line)]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    lost = [line for line in errors if "lost contact with another rank" in line]
    found = memory or [line for line in errors if line not in lost]
    # 247 is the launcher's exit code where a rank was ended by signal 9.
    if not found and (status in (137, 247) or lost):
        return "a rank was killed, as the kernel does when host memory runs out"
    return (found or exceptions or [f"exit code {status}; the end of its log: {lines[-1] if lines else 'empty'}"])[0][
        :300
    ]


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def list_past() -> None:
    folders = past()
    if not folders:
        print("no comparisons in runs/ yet; ./launch.sh compare <recipe> makes one")
    for folder, spec in folders:
        missing = results.missing_runs(folder, spec)
        state = f"; runs still to do: {missing}, --resume goes on" if missing else ""
        about = (
            f"{', '.join(spec['configs'])}; ranks {', '.join(map(str, spec['ranks']))}; {spec['steps']} steps;"
            f" {' '.join(spec['settings']) or 'default settings'}"
        )
        print(
            f"{display_path(folder)}  {spec['created']}  {about}; deepspeed {spec['versions']['deepspeed']},"
            f" torch {spec['versions']['torch']}, commit {spec['commit']}{state}"
        )


def main(arguments: list[str]) -> int:
    options, settings = parse(arguments)
    if options.list:
        list_past()
        return 0
    if options.recipe is None:
        raise UserError("name a recipe, such as: ./launch.sh compare text_classification; or --list, or --help")
    # The older comparison is read first, so that a mistake in its name shows before anything runs.
    other = results.collect(Path(from_home(options.other))) if options.other else None
    if (Path(options.recipe) / "comparison.json").is_file():
        folder = Path(options.recipe)
        given = [
            name
            for name in ("stages", "ds_configs", "ranks", "steps", "rounds", "preset", "resume")
            if getattr(options, name)
        ]
        if given or settings:
            raise UserError(
                f"{display_path(folder)} has been run; only --with goes with it,"
                f" not {' '.join([f'--{name}' for name in given] + settings)}"
            )
    else:
        options.recipe = options.recipe.removeprefix("recipes/").removesuffix(".py")
        recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
        if options.recipe not in recipes:
            raise UserError(
                f"there is neither a recipe nor a comparison {options.recipe}"
                f"{did_you_mean(options.recipe, recipes)}; recipes: {' '.join(recipes)}"
            )
        parser = parser_from_source(ROOT / "recipes" / f"{options.recipe}.py")
        if parser is not None:
            known_arguments(parser, settings, also=(name if name != "other" else "with" for name in vars(options)))
        folder = resumed(options, settings) if options.resume else plan(options, settings)
        spec = results.read_spec(folder)
        print(f"{display_path(folder)}: {', '.join(spec['configs'])}; {spec['steps']} steps; rounds: {spec['rounds']}")
        try:
            run_all(folder, spec)
        except KeyboardInterrupt:
            print(
                f"\nstopped; ./launch.sh compare {spec['recipe']} --resume goes on,"
                " and runs nothing again that has succeeded"
            )
            return INTERRUPTED
    found = results.collect(folder)
    reason = report.nothing_in_common(found, other) if other is not None else None
    if reason:
        print(f"warning: {reason}")
        other = None
    report.write(found, other)
    print(report.as_text(found, other))
    print(f"\n{display_path(folder / 'report.html')}, report.md, results.csv, charts/")
    return 0 if found.good() else 1


if __name__ == "__main__":
    run_command(main)
