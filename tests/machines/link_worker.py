"""One rank of tests/by_hand/benchmark_machines.py. Arguments: folder, STAGE-RATE ...

It trains causal_lm under zero<STAGE>.json while this host's network card sends at most RATE, in tc's words ("none": as
fast as it can), and leaves the bytes and seconds of each step, beside what theory says of the bytes, in <case>.json.
"""

import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import recipe_worker

from lib.compare import measure, theory
from lib.distributed import ranks
from lib.errors import Stopped
from lib.run.run import Run

# 3.4 M parameters, and little to compute: most of a step is what it sends.
MODEL = ["--quick", "--hidden_size", "256", "--intermediate_size", "704", "--num_layers", "4", "--num_heads", "4"]
SETTINGS = ["--batch_size", "2", "--samples", "0", "--max_steps", "8"]
WARM_UP = 2  # steps that do not count: TCP finds its speed in them


def limit(rate: str) -> None:
    """Let this host's card send no faster. Both hosts do so."""
    remove = "tc qdisc del dev eth0 root"
    add = f"tc qdisc add dev eth0 root tbf rate {rate} burst 256kb latency 100ms"
    subprocess.run(remove.split(), check=False, stderr=subprocess.DEVNULL)  # there may be none
    if rate != "none":
        subprocess.run(add.split(), check=True)


def sent() -> int:
    """The bytes that this host's card has sent, with the headers of Ethernet, IP and TCP, as its counter has them."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if "eth0:" in line)
    return int(line.split(":")[1].split()[8])


def watched(steps: Callable[..., Iterator[Any]], file: Path) -> Callable[..., Iterator[Any]]:
    """Run.steps, with a mark at the head of each step, when all ranks have agreed on the one before."""

    def watch(run: Run, *arguments: Any, **options: Any) -> Iterator[Any]:
        marks = []
        for turn in steps(run, *arguments, **options):
            marks.append((sent(), time.perf_counter()))
            yield turn
        marks.append((sent(), time.perf_counter()))
        if ranks.rank() == 0:
            expected = theory.traffic(run.ds_config, facts := measure.facts(run.engine))
            every = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(marks)]
            found = {"steps": every[WARM_UP:], "theory": expected.total, "facts": facts}
            file.write_text(json.dumps(found))
        run.close()
        raise Stopped("measured", 0)  # export and test are not measured

    return watch


def main(where: str, *cases: str) -> None:
    real = Run.steps
    for case in cases:
        stage, rate = case.split("-")
        ranks.init(timeout_minutes=10)
        limit(rate)
        Run.steps = watched(real, Path(where) / f"{case}.json")  # type: ignore[method-assign]
        run = Path(where) / f"run-{case}"
        config = ["--deepspeed_config", f"ds_configs/causal_lm/zero{stage}.json"]
        with contextlib.suppress(Stopped):
            recipe_worker.main("causal_lm", *config, *MODEL, *SETTINGS, "--run_dir", str(run))
    limit("none")
