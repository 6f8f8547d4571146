"""The first losses and gradient norms of every recipe at its defaults, to the last digit.

A change of the code that is not about the maths must not change them:

    python tests/by_hand/first_losses.py /tmp/before                          before the change
    python tests/by_hand/first_losses.py /tmp/after --like /tmp/before        after it: exits 1 where a digit differs

Each recipe runs at ZeRO 2 and 3 on 2 ranks for 20 steps. It is then stopped as Ctrl-C stops it, so that its folder
also has a checkpoint, which the changed code can resume. 18 runs take about 20 minutes on 2 CPU cores.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def steps_of(folder: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step in a run's metrics.jsonl."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]


def run(recipe: str, stage: int, folder: Path, steps: int) -> None:
    command = [
        str(ROOT / "launch.sh"),
        recipe,
        "--stage",
        str(stage),
        "--ranks",
        "2",
        "--run_dir",
        str(folder),
        "--log_every",
        "1",
        "--eval_every",
        "null",
    ]
    with (folder.parent / f"{folder.name}.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and len(steps_of(folder)) < steps:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs are kept, one folder each")
    parser.add_argument(
        "recipes", nargs="*", default=sorted(file.stem for file in (ROOT / "recipes").glob("*.py")), help="default: all"
    )
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--like", type=Path, help="the folder of an earlier call, to compare with")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    differ = False
    for recipe in options.recipes:
        for stage in options.stages:
            name = f"{recipe}-zero{stage}"
            if not (options.folder / name).exists():
                run(recipe, stage, options.folder.resolve() / name, options.steps)
            steps = steps_of(options.folder / name)[: options.steps]
            report = (
                f"{len(steps)} steps, the last loss {steps[-1][0]}"
                if steps
                else f"no step; see {options.folder / name}.txt"
            )
            if options.like is not None:
                before = steps_of(options.like / name)[: options.steps]
                first = next(
                    (number for number, pair in enumerate(zip(steps, before, strict=False), 1) if pair[0] != pair[1]),
                    None,
                )
                equal = first is None and len(steps) == len(before) == options.steps
                report += (
                    "  equal" if equal else f"  DIFFERENT from step {first or min(len(steps), len(before)) + 1} on"
                )
                differ |= not equal
            print(f"{name:28s} {report}", flush=True)
    sys.exit(differ)


if __name__ == "__main__":
    main()
