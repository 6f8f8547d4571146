"""Which ranks are with whom, from the DeepSpeed JSON and the number of ranks.

Ranks of a tensor-parallel group have the same rows, and a part of each matrix of the model. Ranks of a
sequence-parallel group have the same rows too, the whole model, and a part of each row's tokens. Such ranks are
neighbours, as DeepSpeed has them: of 4 ranks with a size of 2, 0 and 1 are a group, and 2 and 3. Groups are data
parallel to each other: each has rows of its own.

The ranks of a pipeline have the same rows, and some of the layers each. Here neighbours have the same layers, as
DeepSpeed has them: of 4 ranks in 2 stages, 0 and 1 are the first stage, 2 and 3 the second, and 0 and 2 a pipeline.
Ranks of an expert-parallel group have rows of their own, as in data parallelism, and each has a part of the experts of
each layer. They are neighbours too.

Gradients are summed over the gradient ranks, the ranks that compute with the same matrices: 0 and 2, and 1 and 3, under
tensor parallelism; 0 and 1, and 2 and 3, in a pipeline; else all of them. ZeRO divides its states over these.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

from lib.settings.ds_config import (
    expert_parallel_size,
    pipeline_stages,
    sequence_parallel_size,
    tensor_parallel_size,
)


@dataclass(frozen=True)
class Mesh:
    """The sizes of the groups, and this rank's; None stands for all ranks."""

    tensor_size: int
    sequence_size: int
    pipeline_size: int
    expert_size: int  # DeepSpeed makes the groups that share experts
    row_group: dist.ProcessGroup | None  # those that have the same rows
    gradient_group: dist.ProcessGroup | None


_mesh = Mesh(1, 1, 1, 1, None, None)


def form(ds_config: dict[str, Any]) -> None:
    """Make the groups that a config asks for. Every rank must call it, after the ranks have joined."""
    global _mesh
    sizes = (
        tensor_parallel_size(ds_config),
        sequence_parallel_size(ds_config),
        pipeline_stages(ds_config),
        expert_parallel_size(ds_config),
    )
    if sizes == (_mesh.tensor_size, _mesh.sequence_size, _mesh.pipeline_size, _mesh.expert_size):
        return
    tensor, sequence, stages, _ = sizes
    row_group = gradient_group = None
    world_size = dist.get_world_size()
    if tensor * sequence > 1:
        size = tensor * sequence
        row_group = _group_of([list(range(first, first + size)) for first in range(0, world_size, size)])
    if tensor > 1:
        gradient_group = _group_of([list(range(place, world_size, tensor)) for place in range(tensor)])
    if stages > 1:
        size = world_size // stages
        row_group = _group_of([list(range(place, world_size, size)) for place in range(size)])
        gradient_group = _group_of([list(range(first, first + size)) for first in range(0, world_size, size)])
    _mesh = Mesh(*sizes, row_group, gradient_group)


def _group_of(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """This rank's group. Each must be made by all ranks, in the same order."""
    made = [(members, dist.new_group(members)) for members in groups]
    return next(group for members, group in made if dist.get_rank() in members)


def data_parallel_size() -> int:
    """How many groups, or single ranks, have training rows of their own."""
    return dist.get_world_size() // (_mesh.tensor_size * _mesh.sequence_size * _mesh.pipeline_size)


def data_parallel_rank() -> int:
    """Which of the data_parallel_size() parts of a step's rows this rank has."""
    return _rank_in_stage() // (_mesh.tensor_size * _mesh.sequence_size)


def gradient_size() -> int:
    """How many ranks have different rows, or different parts of them, and sum their gradients."""
    return dist.get_world_size() // (_mesh.tensor_size * _mesh.pipeline_size)


def gradient_rank() -> int:
    return _rank_in_stage() // _mesh.tensor_size


def gradient_group() -> dist.ProcessGroup | None:
    return _mesh.gradient_group


def dropout_rank() -> int:
    """The same on ranks that compute the same activations, and so must drop the same of them."""
    return dist.get_rank() // _mesh.tensor_size


def tensor_size() -> int:
    return _mesh.tensor_size


def tensor_rank() -> int:
    """Which part of the matrices this rank has."""
    return dist.get_rank() % _mesh.tensor_size


def tensor_group() -> dist.ProcessGroup | None:
    assert _mesh.tensor_size > 1
    return _mesh.row_group


def sequence_size() -> int:
    return _mesh.sequence_size


def sequence_rank() -> int:
    """Which part of each training row's tokens this rank has."""
    return dist.get_rank() % _mesh.sequence_size


def sequence_group() -> dist.ProcessGroup | None:
    assert _mesh.sequence_size > 1
    return _mesh.row_group


def sum_over_sequence(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks that share this rank's training rows, without a gradient."""
    total = tensor.detach().clone()
    if _mesh.sequence_size > 1:
        dist.all_reduce(total, group=_mesh.row_group)
    return total


def differentiable_sum_over_sequence(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks that share this rank's training rows.

    Its gradient is summed over them too, as each of them goes on from the sum to a part of the loss.
    """
    if _mesh.sequence_size == 1:
        return tensor
    total: torch.Tensor = differentiable_all_reduce(tensor, group=_mesh.row_group)  # type: ignore[no-untyped-call]
    return total


def pipeline_size() -> int:
    """How many stages there are."""
    return _mesh.pipeline_size


def pipeline_stage() -> int:
    """Which part of the layers this rank has."""
    return dist.get_rank() // (dist.get_world_size() // _mesh.pipeline_size)


def pipeline_group() -> dist.ProcessGroup | None:
    assert _mesh.pipeline_size > 1
    return _mesh.row_group


def expert_size() -> int:
    """How many ranks share the experts of each layer."""
    return _mesh.expert_size


def _rank_in_stage() -> int:
    return dist.get_rank() % (dist.get_world_size() // _mesh.pipeline_size)
