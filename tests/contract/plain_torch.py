"""A training engine without DeepSpeed: one process, one batch, torch's own backward, clipping and step.

The reference for parity.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch


class PlainEngine:
    """What a recipe uses of DeepSpeed's engine, in fp32, on one rank and with one micro-batch a step."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr_scheduler: Any, config: dict[str, Any]
    ):
        assert config["gradient_accumulation_steps"] == 1
        self.module, self.optimizer, self.lr_scheduler, self.config = model, optimizer, lr_scheduler, config
        self.device = torch.device("cpu")
        self.monitor = SimpleNamespace(enabled=False)
        self.norm: torch.Tensor | None = None
        model.train()

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self) -> None:
        norms = [torch.linalg.vector_norm(p.grad.double()) for p in self.module.parameters() if p.grad is not None]
        self.norm = torch.stack(norms).norm().float()
        torch.nn.utils.clip_grads_with_norm_(
            self.module.parameters(), self.config["gradient_clipping"] or math.inf, self.norm
        )
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()

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
