"""Expert parallelism: each rank of a group has a part of the experts of each layer, and rows of its own.

For each layer the ranks of a group send each other the tokens of their rows, to the rank that has the experts that the
router chose for them, and get back what these computed (Lepikhin et al. 2020, GShard, section 3.2). DeepSpeed's AutoEP
puts layers of its own in the place of transformers', in deepspeed.initialize: w1 and w3 of some experts instead of
gate_up_proj of all, w2 instead of down_proj. A checkpoint and an export have transformers' parameters, so `Part` says
where in these a parameter lies.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn
from transformers.utils import output_capturing

from lib.errors import UserError

# Architecture -> DeepSpeed's preset for it, of those that test_parallel.py has compared with one device.
PRESETS = {"mixtral": "mixtral", "qwen3_moe": "qwen3_moe"}
EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")  # how the names of transformers' parameters end


def check_model(model: Any, size: int, preset: str | None) -> None:
    """Raise UserError where `size` ranks cannot share the experts of a whole model. preset: the JSON's preset_model."""
    what = f"expert_parallel.autoep_size is {size}, but"
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    if architecture not in PRESETS:
        raise UserError(
            f"{what} {type(model).__name__} has no experts that ranks could share here; take a JSON without "
            f"expert_parallel, or a recipe and architecture with experts: causal_lm with --architecture "
            f"{' or '.join(PRESETS)} and --num_experts"
        )
    if preset not in (None, PRESETS[architecture]):
        raise UserError(
            f"expert_parallel.preset_model is {preset}, but the model is a {architecture}; leave preset_model out"
        )
    count = model.config.num_experts
    if count % size:
        below = count // size * size
        nearest = f"{below} and {below + size}" if below else str(size)
        fitting = ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)
        raise UserError(
            f"{what} it does not divide {count} experts; nearest: num_experts {nearest}, or autoep_size {fitting}"
        )


def mend_transformers() -> None:
    """Let DeepSpeed 0.19.8 read and change transformers' registry of what a model records, as a dict.

    transformers 5.23 has a `get` of its own, which takes a model and no default; DeepSpeed gives it a class's name and
    a default.
    """
    registry = type(output_capturing._CAN_RECORD_REGISTRY)
    by_model = registry.get
    if registry is dict or hasattr(by_model, "takes_names"):
        return

    @functools.wraps(by_model)
    def get(self: Any, key: Any, default: Any = None) -> Any:
        return dict.get(self, key, default) if isinstance(key, str) else by_model(self, key)

    get.takes_names = True  # type: ignore[attr-defined]  # a mark, by which a second call knows it
    registry.get = get


def optimizer_options(name: str, size: int) -> dict[str, Any]:
    """What the optimizer's group of a parameter of transformers' model must say for DeepSpeed's ZeRO: that its
    gradients are summed, and its states divided, over the ranks that have the same experts."""
    return {"moe": True, "name": f"ep_size_{size}"} if size > 1 and name.endswith(EXPERTS) else {}


@dataclass(frozen=True)
class Part:
    """Where a parameter here lies in that of transformers' model: of each of its `count` experts it has `size`
    elements, which begin in the flattened parameter there at `start`, and `step` further for each expert."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter there
    count: int
    size: int
    start: int
    step: int

    def pieces(self, begin: int, size: int) -> list[tuple[int, int, int]]:
        """(start there, distance from `begin`, size) of the runs of `size` elements from `begin` on of what is here."""
        found, at = [], begin
        while at < begin + size:
            expert, inside = divmod(at, self.size)
            run = min(self.size - inside, begin + size - at)
            found.append((self.start + expert * self.step + inside, at - begin, run))
            at += run
        return found

    def write(self, whole: torch.Tensor, of_all_experts: torch.Tensor) -> None:
        """Copy what all ranks together have of the parameter into the whole one."""
        inside = self.start % self.step
        experts = of_all_experts.reshape(-1, self.size)
        whole.view(-1, self.step)[: len(experts), inside : inside + self.size] = experts


def parts(model: nn.Module) -> dict[str, Part]:
    """Name -> Part of each parameter that DeepSpeed has put in the place of transformers'; empty in other forms."""
    found: dict[str, Part] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, AutoEPMoELayer):
            continue
        count, width, hidden = (int(n) for n in getattr(layer.experts.w1, "ds_shape", layer.experts.w1.shape))
        experts, size, first = layer.num_experts, width * hidden, layer.ep_rank * count
        for name, inside in (("w1", 0), ("w3", size)):
            whole = f"{path}.experts.gate_up_proj", (experts, 2 * width, hidden)
            found[f"{path}.experts.{name}"] = Part(*whole, count, size, first * 2 * size + inside, 2 * size)
        down = f"{path}.experts.down_proj", (experts, hidden, width)
        found[f"{path}.experts.w2"] = Part(*down, count, size, first * size, size)
        gate = f"{path}.gate.weight", (experts, hidden)
        found[f"{path}.router.gate.weight"] = Part(*gate, 1, experts * hidden, 0, experts * hidden)
    return found


def is_shared(parameter: torch.Tensor) -> bool:
    """Whether ranks have different experts of a parameter."""
    return getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"


def gather_experts(model: nn.Module, parameter: torch.Tensor) -> torch.Tensor:
    """The experts that all ranks of a group have of a parameter, in their order. Every rank must call it."""
    if not is_shared(parameter):
        return parameter
    group = next(layer.ep_group for layer in model.modules() if isinstance(layer, AutoEPMoELayer))
    mine = parameter.detach().contiguous()
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return torch.cat(found)
