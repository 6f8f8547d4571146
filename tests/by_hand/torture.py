"""Everything that can happen to a long run, done to a short one. Run by hand; it takes an hour on 2 cores:

    ./launch.sh torture causal_lm
    ./launch.sh torture causal_lm --only kills --kills 30

It prints what it measured; docs/checkpoints.md keeps the figures. Real launches, real ranks, real signals.
"""

import argparse
import functools
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # launch.sh is to use the same Python

from lib.errors import did_you_mean
from lib.run.checkpoint_files import folder_of, list_complete

conftest: Any = importlib.import_module("tests.conftest")  # launch.sh has put the repository's root on PYTHONPATH
CONFIGS: list[str] = conftest.CONFIGS
INTERVAL = 10  # steps between checkpoints


def start(recipe: str, run_dir: Path, *settings: object) -> subprocess.Popen[bytes]:
    command = [ROOT / "launch.sh", recipe, "--quick", "--log_every", 1, "--run_dir", run_dir, *settings]
    with run_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """All processes of a launch: launch.sh (as lib.launch.supervise), lib.launch.start_ranks, the ranks."""
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(str(run_dir)) for word in words) and process.pid != os.getpid():
            processes.append(process)
    return processes


def kind_of(process: psutil.Process) -> str:
    words = " ".join(process.info["cmdline"])
    if "--local_rank=" in words:
        return f"rank {words.split('--local_rank=')[1][0]}"
    return "lib.launch.start_ranks" if "lib.launch.start_ranks" in words else "launch.sh"


def wait_for(condition: Callable[[], object], seconds: float, poll: float = 0.02) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(poll)
    return False


def wait_for_step(run_dir: Path, after: int, launch: "subprocess.Popen[bytes]") -> None:
    """Wait until the run has logged a step beyond `after`. Raises SystemExit after 120 s, or if the run ends."""
    if not wait_for(lambda: last_step(run_dir) > after or launch.poll() is not None, 120) or launch.poll() is not None:
        raise SystemExit(f"no step after {after}: {run_dir.with_suffix('.log').read_text()[-3000:]}")


def losses_of(run_dir: Path) -> list[float]:
    entries = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def last_step(run_dir: Path) -> int:
    """The last step whose line in metrics.jsonl is whole."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return 0
    return max((json.loads(line)["step"] for line in lines), default=0)


def exported(run_dir: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((run_dir / "model").glob("*.safetensors"))]


def kills(recipe: str, folder: Path, count: int, steps: int) -> None:
    """Kill a random process of the launch at random moments, a third of them while a checkpoint is written."""
    draw = random.Random(0)
    whole, cut = folder / "whole", folder / "cut"
    settings = ("--max_steps", steps, "--eval_every", "null")
    code = start(recipe, whole, *settings, "--save_minutes", "null").wait()
    assert code == 0, whole.with_suffix(".log").read_text()[-3000:]
    killed: Counter[str] = Counter()
    in_write = lost_most = starting = 0
    slowest_end = 0.0
    for number in range(count):
        launch = start(recipe, cut, *settings, "--save_every", INTERVAL, "--resume")
        aim = ("write", "training", "anywhere")[number % 3]
        before = last_step(cut)
        if aim == "anywhere":
            time.sleep(draw.uniform(0, 12))
        else:
            wait_for_step(cut, before, launch)
        if aim == "training":
            time.sleep(draw.uniform(0, 1))
        target = draw.choice(processes_of(cut))
        kind = kind_of(target)
        if aim == "write":
            # The folder has its temporary name only for milliseconds, so the target was chosen before.
            wait_for(lambda: list((cut / "checkpoints").glob(".writing-*")), 10, poll=0.0005)
        if launch.poll() is not None:
            raise SystemExit(f"it ended by itself: {cut.with_suffix('.log').read_text()[-3000:]}")
        target.kill()
        killed[kind] += 1
        at = time.monotonic()
        if not wait_for(lambda: not processes_of(cut), 60):
            raise SystemExit(f"left behind after the SIGKILL of {kind}: {processes_of(cut)}")
        launch.wait()
        slowest_end = max(slowest_end, time.monotonic() - at)
        in_write += bool(list((cut / "checkpoints").glob(".writing-*")))
        complete = list_complete(cut / "checkpoints")
        newest = complete[0][1]["step"] if complete else 0
        reached = last_step(cut)
        starting += reached <= before
        lost = reached - newest
        lost_most = max(lost_most, lost)
        # The newest checkpoint may have been half written, beside training; the one before is there.
        if lost > 2 * INTERVAL:
            raise SystemExit(f"kill {number + 1} lost {lost} steps, more than two intervals of {INTERVAL}")
        print(f"kill {number + 1}/{count}: {kind}, {aim}; step {reached}, newest checkpoint {newest}", flush=True)
    code = start(recipe, cut, *settings, "--save_every", INTERVAL, "--resume").wait()
    assert code == 0, cut.with_suffix(".log").read_text()[-3000:]
    left = [path.name for path in (cut / "checkpoints").iterdir() if not path.name.startswith("step-")]
    print(
        f"\nkills: {count} ({', '.join(f'{kind} {n}' for kind, n in sorted(killed.items()))}); "
        f"{in_write} left a checkpoint half written, {starting} before a step"
    )
    print(
        f"  steps lost at most: {lost_most} (interval {INTERVAL}); "
        f"all processes gone after at most {slowest_end:.1f} s; temporary folders left: {left or 'none'}"
    )
    if left or losses_of(cut) != losses_of(whole) or exported(cut) != exported(whole) or not exported(whole):
        raise SystemExit(
            f"not as uninterrupted: left {left}, losses {losses_of(cut) == losses_of(whole)}, "
            f"weights {exported(cut) == exported(whole)}"
        )
    print(f"  the losses of all {steps} steps and the exported weights equal the uninterrupted run's, bit for bit")


def resumes(recipe: str, folder: Path) -> None:
    """Resume under every config and number of ranks from every other: 10 steps each, through the recipe's main()."""
    runs = folder / recipe
    runs.mkdir()

    def case(name: str, config: str, *settings: str) -> str:
        path = runs / f"{config}.json"
        ds_config = json.loads((ROOT / "ds_configs" / recipe / f"{config}.json").read_text())
        path.write_text(json.dumps(ds_config | {"train_micro_batch_size_per_gpu": 2}))
        all_settings = ["precision=fp32", "batch_size=8", "save_every=10", "keep_checkpoints=9", *settings]
        return f"{recipe}:{name}:{path}:{','.join(all_settings)}"

    def launch(world_size: int, cases: list[str]) -> None:
        conftest.run_ranks(world_size, "contract_worker", folder, *cases, timeout=7200)

    for world_size in (1, 2):
        launch(world_size, [case(config, config, "resume=false") for config in CONFIGS])
    differences: dict[str, float] = {}
    exact = 0
    for world_size in (1, 2):
        for config in CONFIGS:  # one launch for each, so that only a few copies of the checkpoints are on the disk
            names = {f"{source}-{ranks}": f"{source}_{ranks}_to_{config}" for source in CONFIGS for ranks in (1, 2)}
            for source, name in names.items():
                shutil.copytree(
                    runs / source,
                    runs / f"{name}-{world_size}",
                    ignore=shutil.ignore_patterns(folder_of(20), "result.json", "model"),
                )
            launch(world_size, [case(name, config, "resume=true") for name in names.values()])
            for source, name in names.items():
                losses, expected = losses_of(runs / f"{name}-{world_size}"), losses_of(runs / source)
                assert len(losses) == len(expected) == 20
                differences[f"{source} -> {config}-{world_size}"] = max(
                    abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)
                )
                exact += source == f"{config}-{world_size}" and losses == expected
                shutil.rmtree(runs / f"{name}-{world_size}")
            print(f"resumed under {config} on {world_size} rank(s)", flush=True)
    worst = max(differences, key=lambda pair: differences[pair])
    print(
        f"\nresumes: {len(differences)} ordered pairs, "
        f"largest relative difference of a loss {differences[worst]:.1e} ({worst})"
    )
    print(f"  same config and ranks: {exact} of 12 bit for bit")
    if differences[worst] >= 1e-5 or exact < 12:
        raise SystemExit("that is not what it must be")


def silence(recipe: str, folder: Path) -> None:
    """Stop a rank with SIGSTOP. The run has a timeout of 30 s."""
    for stage, rank in ((0, 1), (2, 0), (3, 1)):
        run = folder / f"silent-{stage}-{rank}"
        launch = start(recipe, run, "--max_steps", 100000, "--rank_timeout", 0.5, "--stage", stage)
        wait_for_step(run, 5, launch)
        target = next(process for process in processes_of(run) if kind_of(process) == f"rank {rank}")
        target.send_signal(signal.SIGSTOP)
        at = time.monotonic()
        code = launch.wait(timeout=120)
        print(
            f"silence: rank {rank} stopped at stage {stage}: "
            f"the run ended after {time.monotonic() - at:.0f} s (timeout 30 s), exit code {code}"
        )
        assert not processes_of(run) and code not in (0, 2, 75) and time.monotonic() - at < 30 + 60


def faults(recipe: str, folder: Path) -> None:
    """The generated faulty inputs, and the disk and damage tests, of the test suite."""
    tests = ["tests/test_faults.py", "tests/run/test_checkpoints.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", *tests],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    print(f"faults: {done.stdout.strip().splitlines()[-1]}")
    if done.returncode:
        raise SystemExit(done.stdout[-5000:])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="./launch.sh torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
    parser.add_argument("recipe", help=", ".join(recipes))
    parser.add_argument("--only", choices=["kills", "resumes", "silence", "faults"], help="one part of it")
    parser.add_argument("--kills", type=int, default=100, help="how many (default 100)")
    parser.add_argument(
        "--steps",
        type=int,
        default=4000,
        help="of the run that is killed; more than those between all kills (default 4000)",
    )
    options = parser.parse_args()
    if options.recipe not in recipes:
        raise SystemExit(
            f"error: there is no recipe {options.recipe}{did_you_mean(options.recipe, recipes)}; "
            f"recipes: {', '.join(recipes)}"
        )
    parts: dict[str, Callable[[str, Path], None]] = {
        "kills": functools.partial(kills, count=options.kills, steps=options.steps),
        "resumes": resumes,
        "silence": silence,
        "faults": faults,
    }
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    started = time.monotonic()
    try:
        for name in [options.only] if options.only else parts:
            part = folder / name
            part.mkdir()
            parts[name](options.recipe, part)
            shutil.rmtree(part)
    finally:
        for process in processes_of(folder):  # those that a failure has left
            process.kill()
    shutil.rmtree(folder)
    print(f"\n{options.recipe}: all done in {(time.monotonic() - started) / 60:.0f} min")


if __name__ == "__main__":
    main()
