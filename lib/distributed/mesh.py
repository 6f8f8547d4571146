"""Which ranks are with whom, from the DeepSpeed JSON and the number of ranks.

Ranks of a tensor-parallel group have the same rows, and a part of each matrix of the model. They are neighbours, as
DeepSpeed has them: of 4 ranks with a tensor-parallel size of 2, 0 and 1 are a group, and 2 and 3. Ranks at the same
place in their groups are data parallel: 0 and 2, and 1 and 3. Each of these has rows of its own.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lib.settings.ds_config import tensor_parallel_size


@dataclass(frozen=True)
class Mesh:
    """The groups of this rank; None stands for all ranks."""

    tensor_parallel_size: int
    tensor_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None


_mesh = Mesh(1, None, None)


def form(ds_config: dict[str, Any]) -> None:
    """Make the groups that a config asks for. Every rank must call it, after the ranks have joined."""
    global _mesh
    size, world_size = tensor_parallel_size(ds_config), dist.get_world_size()
    if size == _mesh.tensor_parallel_size:
        return
    tensor_group = data_group = None
    for first in range(0, world_size, size):  # each group must be made by all ranks, in the same order
        members = list(range(first, first + size))
        group = dist.new_group(members)
        tensor_group = group if dist.get_rank() in members else tensor_group
    for place in range(size):
        members = list(range(place, world_size, size))
        group = dist.new_group(members)
        data_group = group if dist.get_rank() in members else data_group
    _mesh = Mesh(size, tensor_group, data_group) if size > 1 else Mesh(1, None, None)


def data_parallel_size() -> int:
    """How many ranks have rows of their own."""
    return dist.get_world_size() // _mesh.tensor_parallel_size


def data_parallel_rank() -> int:
    """Which of the data_parallel_size() parts of a step's rows this rank has."""
    return dist.get_rank() // _mesh.tensor_parallel_size


def data_group() -> dist.ProcessGroup | None:
    """The ranks that have the other parts of a step's rows."""
    return _mesh.data_group


def tensor_size() -> int:
    return _mesh.tensor_parallel_size


def tensor_rank() -> int:
    """Which part of the matrices this rank has."""
    return dist.get_rank() % _mesh.tensor_parallel_size


def tensor_group() -> dist.ProcessGroup | None:
    return _mesh.tensor_group
