"""What ranks need to agree after each step (ranks.largest), beside gloo's own all-reduce.

    python tests/by_hand/benchmark_agreement.py --processes 2,4,8,16

Three figures for each number of processes. "together": the time of one agreement; more processes than cores take turns
on them, so above the number of cores this is mostly waiting for a core, which ranks that have cores never do. "core":
the CPU time that one process spends on it, with gloo's threads. "message": the time of one message, from a token that
goes around all processes, of which just one is busy at any time: the number of cores does not matter for it. "sockets":
what a process holds open for one group, in which gloo connects each rank with each other one.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch
import torch.distributed as dist

from lib.distributed import ranks

VALUES = [0.0] * 4  # of StepEnd


def ring() -> None:
    dist.all_reduce(torch.tensor(VALUES, dtype=torch.float64), dist.ReduceOp.MAX, group=ranks.cpu_group())


def token(value: torch.Tensor) -> None:
    """One round of a message through all processes, one after another."""
    before, after = (ranks.rank() - 1) % ranks.world_size(), (ranks.rank() + 1) % ranks.world_size()
    if ranks.rank() == 0:
        dist.send(value, after, ranks.cpu_group())
        dist.recv(value, before, ranks.cpu_group())
    else:
        dist.recv(value, before, ranks.cpu_group())
        dist.send(value, after, ranks.cpu_group())


def timed(call: Callable[[], object], times: int) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) of a call: the least of ten series, for other work can only add."""
    series = []
    for _ in range(10):
        dist.barrier(ranks.cpu_group())
        started, busy = time.perf_counter(), time.process_time()
        for _ in range(times):
            call()
        series.append(((time.perf_counter() - started) / times, (time.process_time() - busy) / times))
    return min(wall for wall, _ in series), min(cpu for _, cpu in series)


def sockets() -> int:
    return sum(found.status == "ESTABLISHED" for found in psutil.Process().net_connections("tcp"))


def measure(rank: int, size: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    before = sockets()
    ranks.cpu_group()
    connections = sockets() - before
    ranks.set_timeout(2)
    times = 1000 // size
    value = torch.zeros(len(VALUES), dtype=torch.float64)
    found: dict[str, Any] = {
        "sockets": connections,
        "ring": timed(ring, times),
        "doubling": timed(lambda: ranks.largest(VALUES), times),
        "message": timed(functools.partial(token, value), times),
    }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4,8,16")
    sizes = [int(size) for size in parser.parse_args().processes.split(",")]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lib.distributed.ranks"])
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores; microseconds")
    print("processes  ring: together  core  doubling: together  core  message  sockets")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            processes = [context.Process(target=measure, args=(rank, size, folder)) for rank in range(size)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            found = json.loads(Path(folder, "found.json").read_text())
        message = found["message"][0] / size
        (ring_wall, ring_cpu), (wall, cpu) = ([1e6 * part for part in found[name]] for name in ("ring", "doubling"))
        row = f"{size:9}  {ring_wall:14,.0f}  {ring_cpu:4.0f}  {wall:18,.0f}  {cpu:4.0f}  {1e6 * message:7.0f}"
        print(f"{row}  {found['sockets']:7}")
    print("scaling_table.py goes on to 1,024 ranks with what two processes need together")


if __name__ == "__main__":
    main()
