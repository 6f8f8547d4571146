"""The optimizer that the JSON asks for, and its learning-rate schedule."""

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from transformers import get_scheduler

from lib.distributed import expert_parallel, ranks
from lib.distributed.compilation import check_compilation
from lib.progress import progress
from lib.settings.ds_config import expert_parallel_size, takes_cpu_adam


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
    if takes_cpu_adam(ds_config):
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
