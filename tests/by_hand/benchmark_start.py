"""The time from the start of launch.sh to the header of the run, for this and other checkouts in turn. Run by hand:

    python tests/by_hand/benchmark_start.py text_classification --beside ../older --series 3

It prints seconds on the clock, and CPU seconds of all processes. Other work on the machine hardly changes the latter.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def start(checkout: Path, recipe: str) -> tuple[float, float]:
    """(seconds, CPU seconds) until the last line of the header; then the run is stopped."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(checkout / "launch.sh"), recipe, "--max_steps", "1000", "--run_dir", f"{folder}/run"]
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("run "):
                break
        seconds = time.monotonic() - started
        launch = psutil.Process(process.pid)
        times = [part.cpu_times() for part in [*launch.children(recursive=True), launch]]
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)  # the second signal ends the run at once, without saving
        process.communicate()
    return seconds, sum(part.user + part.system + part.children_user + part.children_system for part in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="another checkout, which comes first")
    parser.add_argument("--series", type=int, default=3)
    options = parser.parse_args()
    for _ in range(options.series):
        for checkout in [*options.beside, ROOT]:
            seconds, cpu_seconds = start(checkout.resolve(), options.recipe)
            print(f"{checkout.name}: {seconds:.1f} s, {cpu_seconds:.1f} CPU s", flush=True)


if __name__ == "__main__":
    main()
