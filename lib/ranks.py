"""Ranks that act together: process groups, sums over ranks, and things that rank 0 does first."""

import datetime
import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from lib.config import UserError

T = TypeVar("T")


def init() -> torch.device:
    """Join the process groups that the launcher describes; without a launcher, be the only rank. Returns this rank's device."""
    for key, alone in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(key, alone)
    # DeepSpeed's CPU collectives serve inference only, take half a minute to compile and leave 69 MB per rank in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # ranks that share cores slow each other down
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))
    if not dist.is_initialized():
        if accelerator.device_name() != "cpu":
            wanted, there = int(os.environ.get("LOCAL_SIZE", "1")), accelerator.device_count()
            if wanted > there:
                raise UserError(f"{wanted} ranks want a device each, but there are {there} on this machine; use --ranks {there}")
            accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        deepspeed.init_distributed(verbose=False)
    return device()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, in place. On a GPU it is queued: the caller does not wait for it."""
    dist.all_reduce(tensor)
    return tensor


@functools.lru_cache(1)
def _patient_group() -> dist.ProcessGroup:
    """For waiting while rank 0 downloads or tokenizes: on the CPU, and for longer than the 30 minutes of the default group."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))


def on_rank0(do: Callable[[], T]) -> T:
    """Rank 0 does it, all ranks get what it returned (pickled). A UserError there is raised on every rank."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = do()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, group=_patient_group())
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def rank0_first(do: Callable[[], T]) -> T:
    """Rank 0 does it and fills the caches, then the others do it from them. A UserError there is raised on every rank."""
    kept: list[T] = []
    on_rank0(lambda: kept.append(do()))
    problem = None
    if not kept:
        try:
            kept.append(do())
        except UserError as error:  # on another machine, say, where a file is missing
            problem = str(error)
    problems: list[str | None] = [None] * world_size()
    dist.all_gather_object(problems, problem, group=_patient_group())
    for at, found in enumerate(problems):
        if found is not None:
            raise UserError(f"rank {at}: {found}")
    return kept[0]


def gather_rows(values: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
    """One value per row of a data set, in the order of the rows, on every rank.

    values: [n, ...] of this rank; rows: [n], the row that each value is of, -1 for a filler. n is the same on all ranks and
    every row is on exactly one of them. Returns [total, ...].
    """
    all_values = [torch.empty_like(values) for _ in range(world_size())]
    all_rows = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(all_values, values.contiguous())
    dist.all_gather(all_rows, rows.contiguous())
    value, row = torch.cat(all_values), torch.cat(all_rows)
    real = row >= 0
    assert torch.equal(row[real].sort().values.cpu(), torch.arange(total)), "a row is missing or counted twice"
    ordered = torch.empty((total, *value.shape[1:]), dtype=value.dtype, device=value.device)
    ordered[row[real]] = value[real]
    return ordered


def device() -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().current_device_name())
