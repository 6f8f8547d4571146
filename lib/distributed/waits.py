"""How long this rank waits in collectives, for data and for the ranks that are not there yet.

All ranks leave a collective together. So the rank that waits least of all is the one that the others wait for, at any
stage, whatever made it late. Sends and receives between the stages of a pipeline are not counted: their waits are the
pipeline's own.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_reduce", "all_reduce_coalesced",
    "all_to_all_single", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip

_spans: list[tuple[Any, Any]] = []  # (start, end) of each wait: events of the device, or seconds where it has none
_counts = threading.Event()  # set while steps are timed: an evaluation keeps no events


def watch(backend: Any) -> None:
    """Let the collectives of DeepSpeed's backend, deepspeed.comm.comm.cdb, be counted."""
    for name in COLLECTIVES:
        setattr(backend, name, _timed(getattr(backend, name)))


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """For a collective. Events are queued: on a GPU nothing waits here."""
    start = _now() if _counts.is_set() else None
    yield
    if start is not None and _counts.is_set():
        _spans.append((start, _now()))


def begin() -> None:
    """Count from now on."""
    _spans.clear()
    _counts.set()


def end() -> None:
    """Count no longer, until the next `begin`."""
    _spans.clear()
    _counts.clear()


def take() -> float:
    """The seconds that this rank has waited since the last call of this or `begin`. It waits for the device."""
    spans = _spans.copy()
    _spans.clear()
    if not spans or isinstance(spans[0][0], float):
        return float(sum(end - start for start, end in spans))
    get_accelerator().synchronize()
    return float(sum(start.elapsed_time(end) for start, end in spans) / 1000)


def _now() -> Any:
    if get_accelerator().device_name() == "cpu":
        return time.perf_counter()
    event = get_accelerator().Event(enable_timing=True)
    event.record()
    return event


def _timed(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def timed(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler takes no clock
            return collective(*arguments, **options)
        with waiting():
            handle = collective(*arguments, **options)
        if hasattr(handle, "wait"):  # it was only begun
            handle = _Handle(handle)
        return handle

    return timed


class _Handle:
    """A collective that was begun: what counts is the wait for its end."""

    def __init__(self, handle: Any):
        self._handle = handle

    def wait(self, *arguments: Any) -> Any:
        with waiting():
            return self._handle.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
