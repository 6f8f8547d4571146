"""What ZeRO's stages send over the link between two machines, beside theory, and how long a step takes for it.

    python tests/by_hand/benchmark_machines.py                    # as root: the two hosts of tests/machines/hosts.py
    python tests/by_hand/benchmark_machines.py --stages 2 --rates none,100mbit

One rank on each host trains causal_lm in fp32 (tests/machines/link_worker.py); bytes are those of the network card's
counter. Both hosts share this machine's cores, so "no limit" shows the time of all that is not the link.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKERS = [ROOT, *(path for path in (ROOT / "tests").iterdir() if path.is_dir())]
sys.path[:0] = map(str, WORKERS)

from hosts import Host, missing, two_hosts

BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
START = "import sys, link_worker; link_worker.main(*sys.argv[1:])"


def measure(hosts: tuple[Host, ...], folder: Path, cases: list[str]) -> dict[str, dict[str, Any]]:
    """{STAGE-RATE: {"steps": [(bytes, seconds)], "theory": bytes, "facts"}}. folder: one that all hosts see."""
    own = {
        "WORLD_SIZE": len(hosts), "LOCAL_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "alpha", "MASTER_PORT": 29500,
        "OMP_NUM_THREADS": 1, "PYTHONPATH": os.pathsep.join(map(str, WORKERS)),
    }  # fmt: skip
    processes = [
        host.start("env", f"RANK={rank}", *(f"{k}={v}" for k, v in own.items()), "python", "-c", START, folder, *cases)
        for rank, host in enumerate(hosts)
    ]
    printed = [process.communicate(timeout=600)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(text[-4000:] for text in printed)
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in cases}


def sent_by_gloo(found: dict[str, Any]) -> float:
    """Theory's bytes of a step, and what gloo sends beyond a ring: its reduce-scatter is an all-reduce, so that at
    stage 3 the gradients pass once more."""
    facts = found["facts"]
    once = facts["element_bytes"] * facts["trained"] * (facts["zero_ranks"] - 1) / facts["zero_ranks"]
    return float(found["theory"] + once * facts["accumulation_steps"] * (facts["stage"] == 3))


def bytes_a_step(found: dict[str, Any]) -> float:
    return statistics.mean(count for count, _ in found["steps"])


def seconds_a_step(found: dict[str, Any]) -> float:
    return statistics.median(seconds for _, seconds in found["steps"])


def seconds_on_the_link(count: float, rate: str) -> float:
    return count * 8 / (float(rate[:-4]) * BITS[rate[-4:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--rates", default="none,1gbit,100mbit", help="tc's words; the first is what others are beside")
    given = parser.parse_args()
    stages, rates = given.stages.split(","), given.rates.split(",")
    why_not = missing()
    if why_not:
        sys.exit(f"error: {why_not}")
    folder = Path(tempfile.mkdtemp(prefix="link-", dir="/var/tmp"))  # each host has a /tmp of its own
    try:
        with two_hosts() as hosts:
            found = measure(hosts, folder, [f"{stage}-{rate}" for stage in stages for rate in rates])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("| stage | theory, MB | gloo's, MB | on the link, MB | ratio | seconds a step, no limit |", end="")
    print("".join(f" {rate} | bytes / bandwidth | of the sum |" for rate in rates[1:]))
    print("|---" * (6 + 3 * len(rates[1:])) + "|")
    for stage in stages:
        free = found[f"{stage}-{rates[0]}"]
        expected, measured, alone = sent_by_gloo(free), bytes_a_step(free), seconds_a_step(free)
        row = f"| {stage} | {free['theory'] / 1e6:.2f} | {expected / 1e6:.2f} | {measured / 1e6:.2f} "
        row += f"| {measured / expected:.3f} | {alone:.2f} |"
        for rate in rates[1:]:
            seconds, link = seconds_a_step(found[f"{stage}-{rate}"]), seconds_on_the_link(measured, rate)
            row += f" {seconds:.2f} | {link:.2f} | {seconds / (alone + link):.2f} |"
        print(row)


if __name__ == "__main__":
    main()
