"""What the states of a model take of a rank's memory, and what to change where that is too much."""

import re
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from lib.distributed import mesh
from lib.settings.ds_config import offload_device, stage_of
from lib.settings.states import bytes_each

LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default

_elements = {"parameters": 0, "trained": 0}  # of the whole model


def note(model: torch.nn.Module) -> None:
    """Keep the model's size for `answer`."""
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had no memory left to give."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def answer(error: Exception, cfg: Any, ds_config: dict[str, Any]) -> str:
    """What was tried, what the memory holds, what to change first, and how much each change saves of a rank's memory.

    ds_config: as load_ds_config gives it.
    """
    stage, micro_batch = stage_of(ds_config), ds_config["train_micro_batch_size_per_gpu"]
    tried = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    states = _states(cfg, ds_config, stage)
    lacks_checkpointing = "activation_checkpointing" not in ds_config
    changes = []
    if micro_batch > 1:
        changes.append(f'"train_micro_batch_size_per_gpu": {micro_batch // 2} (half of the activations)')
    if lacks_checkpointing:
        changes.append('"activation_checkpointing": {} (most of the activations, for a third more computing)')
    of_states = []
    for higher in range(stage + 1, 4):
        saved = states - _states(cfg, ds_config, higher)
        if saved > 0:
            of_states.append(f'"zero_optimization": {{"stage": {higher}}} ({_gb(saved)})')
    if offload_device(ds_config, "optimizer") == "none":
        saved = states - _states(cfg, ds_config, max(stage, 1), offloaded=True)
        of_states.append(f'"offload_optimizer": {{"device": "cpu"}} at stage {max(stage, 1)} ({_gb(saved)})')
    total = _total()
    changes = of_states + changes if states > 0.8 * total else changes + of_states
    return (
        f"out of memory: a rank's device has {_gb(total)}"
        + (f" (tried to allocate {tried[1]})" if tried else "")
        + f": ZeRO stage {stage}, {micro_batch} rows a micro-batch, "
        f"{'no ' if lacks_checkpointing else ''}activation checkpointing; parameters, gradients and optimizer states "
        f"take {_gb(states)} by the ZeRO paper, activations come on top; what to change in the DeepSpeed JSON, first "
        f"things first, and what it saves: {', '.join(changes) or 'nothing is left: take more devices'}"
    )


def _states(cfg: Any, ds_config: dict[str, Any], stage: int, offloaded: bool = False) -> float:
    """Bytes on a rank's device."""
    each = bytes_each(stage, mesh.gradient_size(), 4 if cfg.precision in ("fp32", "tf32") else 2)
    if offloaded or offload_device(ds_config, "optimizer") != "none":
        each["optimizer"] = 0.0
    if offload_device(ds_config, "param") != "none":
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
