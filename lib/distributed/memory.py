"""What the states of a model take of a rank's memory, and what to change where that is too much."""

import contextlib
import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from lib.distributed import mesh
from lib.settings.ds_config import offload_device, stage_of
from lib.settings.states import bytes_each

LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default
NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of CUDA, NCCL, cuBLAS, and torch on a CPU

_elements = {"parameters": 0, "trained": 0}  # of the whole model
_has_checkpointing = False  # whether the model can compute activations once more


def note(model: torch.nn.Module) -> None:
    """Keep the model's size for `answer` and `fit_buckets`."""
    global _has_checkpointing
    _has_checkpointing = getattr(model, "supports_gradient_checkpointing", False)
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    _elements["parameters"] = sum(size for size, _ in sizes)
    _elements["trained"] = sum(size for size, is_trained in sizes if is_trained)


def fit_buckets(ds_config: dict[str, Any]) -> None:
    """Let the buffer in which ZeRO reduces gradients be no larger than all gradients, unless the JSON says how large.

    DeepSpeed 0.19.8 allocates 5e8 elements at stages 1 to 3, whatever the model: 2 GB in fp32.
    """
    if stage_of(ds_config) > 0:
        bucket = min(LARGEST_BUCKET, max(1, _elements["trained"]))
        ds_config["zero_optimization"].setdefault("reduce_bucket_size", bucket)


def trim() -> None:
    """Give memory that this process has freed back to the system: glibc keeps most of what lies between other things,
    which after hundreds of large tensors is as much as the model."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def free_host_memory() -> int:
    """Bytes that this machine, and the container or job that this process is in, can still give to programs."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no cgroups of version 2
        of_process = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        root = Path("/sys/fs/cgroup")
        for folder in (root / of_process.strip("/"), *(root / of_process.strip("/")).parents):
            if folder.is_relative_to(root) and (folder / "memory.max").is_file():
                free = min(free, _left_in(folder))
    with contextlib.suppress(OSError, ValueError):  # version 1, as a container sees its own
        limit, used = (
            int(Path("/sys/fs/cgroup/memory", name).read_text())
            for name in ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        free = min(free, limit - used)
    return free


def _left_in(cgroup: Path) -> int:
    limit = (cgroup / "memory.max").read_text().strip()
    if limit == "max":
        return sys.maxsize
    used = int((cgroup / "memory.current").read_text())
    facts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(limit) - used + int(facts["inactive_file"])  # which the system takes back when it needs it


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left to give, once there was a model to give it to."""
    says_so = isinstance(error, RuntimeError) and any(reason in str(error) for reason in NO_MEMORY)
    return says_so and _elements["parameters"] > 0


def answer(error: Exception, cfg: Any, ds_config: dict[str, Any]) -> str:
    """What was tried, what the memory holds, what to change first, and how much each change saves of a rank's memory.

    ds_config: as load_ds_config gives it.
    """
    stage, micro_batch = stage_of(ds_config), ds_config["train_micro_batch_size_per_gpu"]
    tried = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    states, total = _states(cfg, ds_config, stage), _total()
    kept = "activation_checkpointing" not in ds_config
    of_activations, of_states = [], []
    if micro_batch > 1:
        smaller = next(size for size in range(micro_batch // 2, 0, -1) if micro_batch % size == 0)
        of_activations.append(f'"train_micro_batch_size_per_gpu": {smaller} ({1 - smaller / micro_batch:.0%} of them)')
    if kept and _has_checkpointing:
        of_activations.append('"activation_checkpointing": {} (most of them, for a third more computing)')
    for higher in range(stage + 1, 2 if mesh.pipeline_size() > 1 else 4):
        saved = states - _states(cfg, ds_config, higher)
        if saved > 0:
            of_states.append(f'"stage": {higher} ({_gb(saved)})')
    for what, lowest in (("optimizer", 1), ("param", 3)):
        if offload_device(ds_config, what) == "none" and mesh.pipeline_size() == 1:
            saved = states - _states(cfg, ds_config, max(stage, lowest), offloaded=what)
            of_states.append(f'"offload_{what}": {{"device": "cpu"}} at stage {max(stage, lowest)} ({_gb(saved)})')
    changes = of_states + of_activations if states > 0.8 * total else of_activations + of_states
    return (
        f"out of memory: a rank's device has {_gb(total)}"
        + (f", and was asked for {tried[1]} more" if tried else "")
        + f"; at ZeRO stage {stage} parameters, gradients and optimizer states take {_gb(states)} of it (by the ZeRO "
        f"paper), the activations of {micro_batch} rows come on top{'' if kept else ', though checkpointed'}; change "
        f"in the DeepSpeed JSON, first things first (what it saves): {', '.join(changes) or 'nothing is left'}"
    )


def _states(cfg: Any, ds_config: dict[str, Any], stage: int, offloaded: str = "") -> float:
    """Bytes on a rank's device. offloaded: what is offloaded beside what the config says."""
    each = bytes_each(stage, mesh.gradient_size(), 4 if cfg.precision in ("fp32", "tf32") else 2)
    if offloaded == "optimizer" or offload_device(ds_config, "optimizer") != "none":
        each["optimizer"] = 0.0
    if offloaded == "param" or offload_device(ds_config, "param") != "none":
        each["parameters"] = 0.0
    elements = {"parameters": _elements["parameters"], "gradients": _elements["trained"]}
    elements["optimizer"] = elements["gradients"]
    return sum(elements[kind] * each[kind] for kind in each) / mesh.tensor_size()


def _total() -> int:
    """Bytes of memory of this rank's device."""
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    return int(psutil.virtual_memory().total if on_cpu else accelerator.total_memory())


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
