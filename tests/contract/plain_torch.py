"""A training engine without DeepSpeed: one process, one batch, torch's own backward, clipping and step.

The reference for parity.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator


class PlainEngine:
    """What a recipe uses of DeepSpeed's engine, on one rank and with one micro-batch a step.

    In bf16 the optimizer has an fp32 copy of each weight (Micikevicius et al. 2018, "Mixed Precision Training").
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr_scheduler: Any, config: dict[str, Any]
    ):
        assert config["gradient_accumulation_steps"] == 1
        self.module, self.optimizer, self.lr_scheduler, self.config = model, optimizer, lr_scheduler, config
        self.device = torch.device(get_accelerator().current_device_name())
        self.monitor = SimpleNamespace(enabled=False)
        self.norm: torch.Tensor | None = None
        model.to(self.device).train()
        self.copies: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []  # (a weight, its copy in fp32)
        if config.get("bf16", {}).get("enabled"):
            for parameter in model.parameters():  # and no buffers, as rotary frequencies
                parameter.data = parameter.data.bfloat16()
            for group in optimizer.param_groups:
                pairs = [(weight, torch.nn.Parameter(weight.detach().float())) for weight in group["params"]]
                group["params"] = [copy for _, copy in pairs]
                self.copies += pairs

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self) -> None:
        for weight, copy in self.copies:
            copy.grad = weight.grad.float() if weight.grad is not None else None
        trained = [copy for _, copy in self.copies] or list(self.module.parameters())
        norms = [torch.linalg.vector_norm(p.grad.double()) for p in trained if p.grad is not None]
        self.norm = torch.stack(norms).norm().float()
        torch.nn.utils.clip_grads_with_norm_(trained, self.config["gradient_clipping"] or math.inf, self.norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, copy in self.copies:
                weight.copy_(copy)
                weight.grad = None

    def get_global_grad_norm(self) -> torch.Tensor | None:
        return self.norm

    def was_step_applied(self) -> bool:
        return True

    def zero_optimization(self) -> bool:
        return True  # there is no wrapper of stage 0 to mend

    def zero_optimization_stage(self) -> int:
        return 0

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


def initialize(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr_scheduler: Any, config: dict[str, Any]
) -> tuple[Any, None, None, None]:
    """In the place of deepspeed.initialize."""
    return PlainEngine(model, optimizer, lr_scheduler, config), None, None, None
