"""Ranks that act together: process groups, sums over ranks, things that rank 0 does first, and ranks that stop
answering."""

import contextlib
import datetime
import functools
import importlib
import itertools
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm

from lib.distributed import mesh, network, waits
from lib.errors import FAULT, UserError

P = ParamSpec("P")
T = TypeVar("T")


def init(timeout_minutes: float, precision: str = "fp32") -> torch.device:
    """Join the process groups that the launcher describes; without a launcher, be the only rank. Returns this rank's
    device.

    timeout_minutes: how long a rank waits for another one before it gives up and ends the run. DeepSpeed makes groups
    of its own later, with torch's 30 minutes: so Run.attach calls set_timeout once more. precision: with tf32, a GPU
    multiplies matrices in fp32 by its tensor cores.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    for key, alone in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(key, alone)
    # DeepSpeed's CPU collectives serve inference only, take half a minute to compile, and leave 69 MB a rank in shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # gloo connects each rank with each other one: 1,024 ranks need more files than the usual limit of 1,024.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    _import_muon_without_the_compiler()
    accelerator = get_accelerator()
    # Ranks that share cores slow each other down, those on GPUs when they load, and step offloaded states.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // on_this_machine()))
    if not dist.is_initialized():
        if int(os.environ["WORLD_SIZE"]) > on_this_machine():
            network.use_interface_towards(os.environ["MASTER_ADDR"])
        if accelerator.device_name() != "cpu":
            wanted, available = on_this_machine(), accelerator.device_count()
            if wanted > available:
                raise UserError(
                    f"{wanted} ranks want a device each, but there are {available} on this machine; "
                    f"use --ranks {available}"
                )
            accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        threading.Thread(target=_leave_with_the_launcher, daemon=True).start()
        # This timeout holds until all ranks have started.
        deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(minutes=max(timeout_minutes, 10)))
        waits.watch(comm.cdb)
    cpu_group()
    set_timeout(timeout_minutes)
    return device()


def _import_muon_without_the_compiler() -> None:
    """Import DeepSpeed's optimizer Muon, as deepspeed.initialize does, without torch's compiler, which takes 0.7 s that
    no recipe needs.

    Muon, which no recipe takes either, is not compiled then; everything else can be, as before.
    """

    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def set_timeout(minutes: float) -> None:
    """Let every process group that there is now give up after so many minutes without an answer."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=minutes), group)
    _timeout_seconds.append(60 * minutes)


_timeout_seconds = [600.0]  # the last one is in force; the first while the ranks come together


asked_to_stop = threading.Event()  # a signal came to this rank, which will save and stop
GRACE_SECONDS = 5  # in which a signal that came to the launcher too is noticed here


def _leave_with_the_launcher() -> None:
    """End this process soon after a process that launched it: a launcher that is killed ends none of its ranks
    itself."""

    def is_launcher(process: psutil.Process) -> bool:
        try:
            return any(
                part.endswith(("lib.launch.start_ranks", "deepspeed", "deepspeed.launcher.launch"))
                for part in process.cmdline()
            )
        except psutil.Error:  # another user's, or ended
            return False

    launchers = list(itertools.takewhile(is_launcher, psutil.Process().parents()))
    supervisor = os.environ.get("SUPERVISED_BY")  # lib/launch/supervise.py
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended before this process asks
        if supervisor:
            launchers.append(psutil.Process(int(supervisor)))
        while all(map(_is_alive, launchers)):
            time.sleep(1)
    # Ctrl-C, or a terminal that closes, has reached this rank too: what it saves now is worth waiting for.
    if asked_to_stop.wait(GRACE_SECONDS):
        time.sleep(_timeout_seconds[-1])
    os._exit(FAULT)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lost_contact(error: BaseException) -> str | None:
    """How another rank was lost, if that is what an error says; None for a fault of this rank."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out", "Broken pipe")
    found = next((sign for sign in signs if sign.lower() in str(error).lower()), None)
    return found or (type(error).__name__ if isinstance(error, dist.DistError) else None)


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def on_this_machine() -> int:
    """How many ranks: as DeepSpeed's launcher says it, or torchrun."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over the gradient ranks (lib/distributed/mesh.py), in place.

    On a GPU it is queued: the caller does not wait.
    """
    with waits.waiting():
        dist.all_reduce(tensor, group=mesh.gradient_group())
    return tensor


def sum_over_ranks(counts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of this rank's counts, one per micro-batch, and those of the other gradient ranks. See all_sum."""
    return all_sum(torch.stack(list(counts)).sum(0))


@functools.lru_cache(1)
def cpu_group() -> dist.ProcessGroup:
    """For what ranks tell each other beside training, so that no device has to be waited for."""
    return dist.new_group(backend="gloo")


def largest(values: list[float]) -> list[float]:
    """The largest of each value over all ranks, the same on every rank.

    It waits for the ranks, but not for their devices. In each round a rank passes on what it knows to one twice as far
    away (Hensgen, Finkel, Manber 1988, "Two algorithms for barrier synchronization"): log2(ranks) messages one after
    another, where gloo's own all-reduce has 2 (ranks - 1). To know a value twice does a maximum no harm.
    """
    known = torch.tensor(values, dtype=torch.float64)
    received, timeout = torch.empty_like(known), datetime.timedelta(seconds=_timeout_seconds[-1])
    for distance in (2**turn for turn in range((world_size() - 1).bit_length())):
        target, source = (rank() + distance) % world_size(), (rank() - distance) % world_size()
        sending = dist.isend(known, target, cpu_group())
        receiving = dist.irecv(received, source, cpu_group())
        for work in (receiving, sending):  # by themselves they would wait as long as at the group's start
            assert work is not None
            work.wait(timeout)
        known = torch.maximum(known, received)
    return known.tolist()


def together(do: Callable[[], T]) -> T:
    """What `do` returns on this rank, once every rank is done with its own. Every rank must call it.

    It may take longer than the timeout: ranks tell each other from time to time that they are still at it.
    """
    if world_size() == 1:
        return do()
    done = threading.Event()
    lost: list[RuntimeError] = []

    def tell_the_others() -> None:
        busy = True
        try:
            while busy:
                done.wait(_timeout_seconds[-1] / 4)
                # `busy` is the same on all ranks, so that all of them leave this loop together.
                busy = largest([float(not done.is_set())])[0] > 0
        except RuntimeError as error:  # a rank has ended
            lost.append(error)

    heartbeat = threading.Thread(target=tell_the_others, daemon=True)
    heartbeat.start()
    try:
        result = do()
    finally:
        done.set()
    heartbeat.join()
    if lost:
        raise lost[0]
    return result


def on_rank0(do: Callable[[], T]) -> T:
    """Rank 0 does it, however long it takes, and all ranks get what it returned (pickled).

    A UserError there is raised on every rank.
    """
    outcome: list[Any] = [None, None]  # result, what was wrong

    def attempt() -> None:
        try:
            outcome[0] = do()
        except UserError as error:
            outcome[1] = str(error)

    together(attempt if rank() == 0 else lambda: None)
    dist.broadcast_object_list(outcome, src=0, group=cpu_group())
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def first_problem(problem: str | None) -> str | None:
    """What the first rank that has a problem says, the same on every rank; None where no rank has one."""
    problems: list[str | None] = [None] * world_size()
    dist.all_gather_object(problems, problem, group=cpu_group())
    return next((f"rank {at}: {found}" for at, found in enumerate(problems) if found is not None), None)


def first_problem_of(do: Callable[[], str | None]) -> str | None:
    """As first_problem, of what `do` returns on each rank, however long it takes."""
    return first_problem(together(do))


def gather_on_rank0(value: T) -> list[T]:
    """The value (pickled) of each rank on rank 0, and an empty list elsewhere."""
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, values or None, dst=0, group=cpu_group())
    return values


def floats_on_rank0(value: float) -> list[float]:
    """The number of each rank on rank 0, and an empty list elsewhere; one message a rank."""
    values = [torch.zeros(1, dtype=torch.float64) for _ in range(world_size() if rank() == 0 else 0)]
    dist.gather(torch.tensor([value], dtype=torch.float64), values or None, dst=0, group=cpu_group())
    return [float(found) for found in values]


def rank0_first(function: Callable[P, T]) -> Callable[P, T]:
    """Let rank 0 call a function first and fill the caches, then one rank on each other machine, then the others, from
    the caches. Every rank must call it.

    Each turn may take longer than the timeout. A UserError of one rank is raised on every rank.
    """

    @functools.wraps(function)
    def in_order(*arguments: P.args, **options: P.kwargs) -> T:
        results: list[T] = []

        def call() -> str | None:
            try:
                results.append(function(*arguments, **options))
            except UserError as error:  # on another machine, say, where a file is missing
                return str(error)
            return None

        on_rank0(lambda: results.append(function(*arguments, **options)))
        # Without a cache that all machines share, the ranks of a machine would all do the same work and write one file.
        is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        for turn in (is_first_here, True):
            problem = first_problem_of(call if turn and not results else lambda: None)
            if problem is not None:
                raise UserError(problem)
        return results[0]

    return in_order


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows [n, ...] of every gradient rank, n the same on each, rank after rank: [n * ranks, ...].

    They have no gradient.
    """
    parts = [torch.empty_like(rows) for _ in range(mesh.gradient_size())]
    dist.all_gather(parts, rows.contiguous(), group=mesh.gradient_group())
    return torch.cat(parts)


def gather_rows(values: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
    """One value per row of a data set, in the order of the rows, on every rank.

    values: [n, ...] of this rank; rows: [n], the row that each value is of, -1 for a filler. n is the same on all ranks
    and every row is on exactly one gradient rank. Returns [total, ...].
    """
    value, row = all_rows(values), all_rows(rows)
    real = row >= 0
    assert torch.equal(row[real].sort().values.cpu(), torch.arange(total)), "a row is missing or counted twice"
    ordered = torch.empty((total, *value.shape[1:]), dtype=value.dtype, device=value.device)
    ordered[row[real]] = value[real]
    return ordered


def device() -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().current_device_name())
