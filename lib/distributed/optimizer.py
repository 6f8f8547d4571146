"""The optimizer that the JSON asks for, and its learning-rate schedule."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from torch.utils import cpp_extension
from transformers import get_scheduler

from lib.distributed import expert_parallel, ranks
from lib.errors import UserError
from lib.progress import progress
from lib.settings.ds_config import expert_parallel_size, offload_device


def make_adamw(
    cfg: Any, model: torch.nn.Module, ds_config: dict[str, Any], pretrained: Iterable[torch.nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices and embeddings but not on biases and norms.

    `cfg` has learning_rate, weight_decay, adam_betas and adam_eps, and pretrained_learning_rate where there are
    pretrained parameters, which have that learning rate; where it is 0, they are frozen: they need neither gradients
    nor optimizer states. It is torch's AdamW, fused: it makes no copy of the states and compiles nothing. With the
    optimizer offloaded, DeepSpeed asks for its own CPU version (compiled at first use, a minute or more) unless the
    JSON says "zero_force_ds_cpu_optimizer": false.
    """
    known = set(map(id, pretrained))
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        is_pretrained = id(parameter) in known
        if is_pretrained and cfg.pretrained_learning_rate == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2  # ds_shape: before partitioning
            options = {
                "lr": cfg.pretrained_learning_rate if is_pretrained else cfg.learning_rate,
                "weight_decay": 0.0 if is_vector else cfg.weight_decay,
            }
            of_experts = expert_parallel.optimizer_options(name, expert_parallel_size(ds_config))
            key = is_pretrained, is_vector, bool(of_experts)
            groups.setdefault(key, {"params": [], **options, **of_experts})["params"].append(parameter)
    common = {"lr": cfg.learning_rate, "betas": tuple(cfg.adam_betas), "eps": cfg.adam_eps}
    in_order = [groups[key] for key in sorted(groups)]  # the learning rate of the first one is what a run logs
    if offload_device(ds_config, "optimizer") != "none" and ds_config.get("zero_force_ds_cpu_optimizer", True):
        ranks.rank0_first(check_compilation)("cpu_adam")
        with progress("loading DeepSpeed's cpu_adam, which is compiled once and takes minutes then"):
            return deepspeed.ops.adam.DeepSpeedCPUAdam(in_order, **common)
    return torch.optim.AdamW(in_order, **common, fused=True)


def make_schedule(cfg: Any, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """A LambdaLR with the learning rate of each of `total_steps` steps: from 0 up over `warmup_steps` of them, then
    as `lr_schedule` says."""
    # transformers' "constant" has no warm-up
    name = "constant_with_warmup" if cfg.lr_schedule == "constant" else cfg.lr_schedule
    return get_scheduler(name, optimizer, cfg.warmup_steps, total_steps)


def check_compilation(operator: str) -> None:
    """Raise a UserError where an operator that DeepSpeed would compile now waits for a compilation that was killed.

    torch marks a compilation by a file `lock`, which a killed one leaves behind, and every later run waits for it
    without a word.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in root.glob(f"**/{operator}/lock"):
        if (
            lock.exists()
            and time.time() - lock.stat().st_mtime > 60
            and not any(_works_in(process, lock.parent) for process in psutil.process_iter())
        ):
            raise UserError(
                f"{lock} was left by a compilation of {operator} that was killed, and this run would wait for it for "
                "ever: delete the file "
                "(unless another machine that shares it is compiling now)"
            )


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return Path(process.cwd()) == folder
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False
