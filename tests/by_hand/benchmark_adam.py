"""What a step of AdamW costs on the host, where offloaded states are: torch's and DeepSpeed's. Run by hand:

    python tests/by_hand/benchmark_adam.py --parameters 60_000_000

They step in turns, each on a vector of fp32 of its own. DeepSpeed's is compiled at its first use, a minute or two.
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
from deepspeed.ops.adam import DeepSpeedCPUAdam


def build(name: str, parameter: torch.nn.Parameter) -> Any:
    if name == "DeepSpeed's":
        return DeepSpeedCPUAdam([parameter], lr=1e-3, weight_decay=0.1)
    return torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.1, foreach=False, fused=name == "torch's, fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=60_000_000)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        torch.set_num_threads(threads)
        optimizers, values = {}, {}
        for name in ("torch's, fused", "torch's", "DeepSpeed's"):
            torch.manual_seed(0)
            values[name] = torch.nn.Parameter(torch.randn(options.parameters))
            values[name].grad = torch.randn(options.parameters)
            optimizers[name] = build(name, values[name])
            optimizers[name].step()  # makes the states
        seconds: dict[str, list[float]] = {name: [] for name in optimizers}
        for _ in range(options.steps):
            for name, optimizer in optimizers.items():
                began = time.perf_counter()
                optimizer.step()
                seconds[name].append(time.perf_counter() - began)
        first, *_, last = values.values()
        medians = ", ".join(f"{name} {1000 * statistics.median(found):.0f} ms" for name, found in seconds.items())
        furthest = float((first - last).detach().abs().max())
        print(f"threads {threads}: {medians} a step; the first and the last differ by {furthest:.1e}")


if __name__ == "__main__":
    main()
