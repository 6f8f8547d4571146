"""One rank of a measurement of the network between hosts, by the all-reduce that training does. Rank 0 prints JSON.

    python -m lib.launch.link_speed --local_rank=0 gloo|nccl

lib/launch/hosts.py lets lib/launch/start_ranks.py start it on every host.
"""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from lib.distributed import network

LIMIT_SECONDS = 45  # a rank that waits in vain ends then
ROUND_SECONDS = 0.5  # about what one all-reduce of many bytes takes, of which there are a few
LARGEST = 2**28  # bytes


def main(backend: str) -> None:
    signal.alarm(LIMIT_SECONDS)
    network.use_interface_towards(os.environ["MASTER_ADDR"])
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    one = torch.zeros(1, device=device)
    seconds_of(one, 20)  # connects
    latency = seconds_of(one, max(10, min(1000, round(ROUND_SECONDS / seconds_of(one, 10)))))
    few = torch.zeros(2**18, device=device)
    seconds_of(few, 1)
    rate = 4 * len(few) / seconds_of(few, 1)  # bytes per second
    many = torch.zeros(int(min(max(ROUND_SECONDS * rate, 2**20), LARGEST) / 4), device=device)
    seconds_of(many, 1)
    size = dist.get_world_size()
    # Of a sum by a ring, 2 (n - 1) / n of the bytes go over each of its links, in each direction.
    traffic = 2 * (size - 1) / size * 4 * len(many)
    found = {"bytes": 4 * len(many), "bytes_per_second": traffic / seconds_of(many, 3), "latency_seconds": latency}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def seconds_of(tensor: torch.Tensor, rounds: int) -> float:
    """Seconds of one all-reduce, the mean of some on the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - started, device=tensor.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item() / rounds


if __name__ == "__main__":
    main(sys.argv[2])
