"""What ZeRO holds on this rank, at any stage, as pieces of named parameters: the fp32 weights and the optimizer's
states.

Every stage keeps the same numbers, cut differently. A checkpoint (lib/run/checkpoint_files.py) stores pieces by the
parameter's name and their place in it, so whoever reads it can cut them anew. Pieces are views: writing into one
changes what DeepSpeed trains.

  stage 0     every rank has all of each parameter
  stage 1, 2  the parameters of an optimizer group, one after the other, are cut into one range a rank
  stage 3     each parameter is cut into one range a rank

The ranks of a pipeline have other parameters each; all of them together have the whole model's.

Ranks of a tensor-parallel group have shards of most matrices (`Layout`). A shard is to ZeRO, and to a checkpoint, what
a parameter is: it has the name name#rank, and ZeRO cuts it over the data-parallel ranks.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

from lib.distributed import expert_parallel, mesh, ranks
from lib.distributed.pipeline import is_copy, model_of, shapes_of_all_stages
from lib.errors import UserError
from lib.settings.ds_config import offload_device, stage_of

WEIGHT = "fp32"  # the kind of a piece that holds weights; other kinds have the optimizer's names, such as exp_avg


@dataclass(frozen=True)
class Layout:
    """How a tensor-parallel group shares a parameter: it is cut along `dim` into `sizes`, one for each rank."""

    shape: tuple[int, ...]
    dim: int
    sizes: tuple[int, ...]

    def shard_shape(self, rank: int) -> list[int]:
        return [*self.shape[: self.dim], self.sizes[rank], *self.shape[self.dim + 1 :]]

    def join(self, shards: list[torch.Tensor]) -> torch.Tensor:
        """The whole parameter from the shards of all ranks, each flat or in its shape."""
        return torch.cat([part.reshape(self.shard_shape(rank)) for rank, part in enumerate(shards)], self.dim)

    def cut(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's shard of a whole parameter, which may be flat."""
        return torch.split(whole.reshape(self.shape), list(self.sizes), self.dim)[rank]


def layout(parameter: torch.nn.Parameter) -> Layout | None:
    """How a tensor-parallel group shares a parameter; None where each of its ranks has the parameter whole.

    Raises UserError where DeepSpeed cuts it in another way than along one dimension.
    """
    if mesh.tensor_size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return None
    meta = getattr(parameter, DS_AUTOTP_UC_META)
    if meta["replicated"]:
        return None
    if meta["partition_dim"] is None or not meta["partition_sizes"] or meta["sub_param_shard_widths"]:
        raise UserError(
            "tensor parallelism cuts a matrix of this model into several parts a rank, which checkpoints and exports do"
            " not know; train this model without it"
        )
    return Layout(tuple(meta["logical_shape"]), meta["partition_dim"], tuple(meta["partition_sizes"]))


def shard_name(name: str, rank: int) -> str:
    """The name of a parameter's shard on a rank of a tensor-parallel group, in checkpoints."""
    return f"{name}#{rank}"


def layouts(engine: Any) -> dict[str, Layout]:
    """Name -> layout of each trained parameter that a tensor-parallel group shares."""
    named = {name: parameter for name, parameter in model_of(engine).named_parameters() if parameter.requires_grad}
    return {name: found for name, parameter in named.items() if (found := layout(parameter)) is not None}


@dataclass(frozen=True)
class Piece:
    """`size` elements of the parameter `name`, flattened, from its element `start` on; here they lie in `flat` from
    `offset` on."""

    name: str
    start: int
    size: int
    flat: torch.Tensor  # the fp32 tensor that the optimizer steps, and under which it keeps its states
    offset: int

    def view(self, kind: str, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """The elements themselves, [size], of the weight or of one of the optimizer's states."""
        whole = self.flat if kind == WEIGHT else optimizer.state[self.flat][kind]
        return whole.detach().view(-1)[self.offset : self.offset + self.size]

    def share(self, rank: int, world_size: int) -> "Piece":
        """The part of a piece that all ranks have which this rank answers for."""
        begin, end = self.size * rank // world_size, self.size * (rank + 1) // world_size
        return Piece(self.name, self.start + begin, end - begin, self.flat, self.offset + begin)


def pieces(engine: Any) -> list[Piece]:
    """The pieces of all trained parameters that this rank holds. At stage 0 those are all, whole, on every rank."""
    found = []
    masters: dict[int, torch.Tensor] = {}  # at stage 0 in bf16 and fp16: id of a parameter -> its fp32 copy
    if hasattr(engine.optimizer, "fp32_groups"):
        for parameters, copies in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            masters |= {id(parameter): copy for parameter, copy in zip(parameters, copies, strict=True)}
    ranges, shared, moved = _ranges(engine.optimizer), layouts(engine), expert_parallel.parts(model_of(engine))
    for name, parameter in model_of(engine).named_parameters():
        if not parameter.requires_grad:
            continue
        if name in shared:
            name = shard_name(name, mesh.tensor_rank())
        if stage_of(engine.config) == 3:
            zero = engine.optimizer
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            start = zero._get_param_partition_rank(parameter) * length
            size = min(length, parameter.ds_numel - start)  # the last ranks' may be padding
            piece = Piece(name, start, size, zero.fp32_partitioned_groups_flat[group], offset)
        elif id(parameter) in ranges:
            flat, offset, partition_start = ranges[id(parameter)]
            begin, end = max(offset, partition_start), min(offset + parameter.numel(), partition_start + flat.numel())
            piece = Piece(name, begin - offset, end - begin, flat, begin - partition_start)
        elif stage_of(engine.config) > 0:  # in bf16 with gradients in fp32, stage 1 has a class of its own
            fragment = parameter._hp_mapping
            if fragment is None:  # it lies on other ranks
                continue
            flat = engine.basic_optimizer.param_groups[fragment.param_group_index]["params"][0]
            piece = Piece(
                name,
                fragment.lp_fragment_address.start,
                fragment.hp_fragment_address.numel,
                flat,
                fragment.hp_fragment_address.start,
            )
        else:
            piece = Piece(name, 0, parameter.numel(), masters.get(id(parameter), parameter), 0)
        if name in moved:  # each expert lies in another place of transformers' parameter
            part = moved[name]
            runs = part.pieces(piece.start, piece.size)
            found += [Piece(part.name, start, size, piece.flat, piece.offset + at) for start, at, size in runs]
        elif piece.size > 0:
            found.append(piece)
    return found


def _ranges(zero: Any) -> dict[int, tuple[torch.Tensor, int, int]]:
    """At stages 1 and 2, id of a parameter -> (this rank's part of its optimizer group, where the parameter and the
    part begin in the group).

    Read from the layout itself: DeepSpeed's own map from parameters to it (_hp_mapping) is wrong under
    round_robin_gradients (0.19.8).
    """
    found = {}
    for group, parameters in enumerate(getattr(zero, "round_robin_bit16_groups", [])):
        flat = zero.single_partition_of_fp32_groups[group]
        partition_start = flat.numel() * dist.get_rank(zero.real_dp_process_group[group])
        for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
            found[id(parameter)] = (flat, offset, partition_start)
    return found


def owned_pieces(engine: Any) -> list[Piece]:
    """The pieces that this rank answers for: every element of every trained parameter is in one piece of one rank."""
    named = dict(model_of(engine).named_parameters())
    local = [piece for piece in pieces(engine) if piece.name not in named or not is_copy(named[piece.name])]
    if stage_of(engine.config) == 0:
        local = [piece.share(mesh.gradient_rank(), mesh.gradient_size()) for piece in local]
    if mesh.tensor_rank() > 0:  # of what is not shared, the first rank of the tensor-parallel group has the same piece
        local = [piece for piece in local if piece.name not in named or _is_cut_over_all_ranks(named[piece.name])]
    return [piece for piece in local if piece.size > 0]


def _is_cut_over_all_ranks(parameter: torch.nn.Parameter) -> bool:
    """Whether stage 3 has cut a parameter over all ranks, as zero.Init does, and not over the data-parallel ones."""
    group = getattr(parameter, "ds_process_group", None)
    return group is not None and dist.get_world_size(group) == dist.get_world_size()


def shapes(engine: Any) -> dict[str, list[int]]:
    """Name -> shape of each trained parameter of the whole model, or of each of its shards, before ZeRO's
    partitioning.
    """
    if mesh.pipeline_size() > 1:
        return shapes_of_all_stages(engine)
    found: dict[str, list[int]] = {}
    shared, moved = layouts(engine), expert_parallel.parts(model_of(engine))
    for name, parameter in model_of(engine).named_parameters():
        if name in moved:
            found[moved[name].name] = list(moved[name].shape)
        elif name in shared:
            sizes = range(len(shared[name].sizes))
            found |= {shard_name(name, rank): shared[name].shard_shape(rank) for rank in sizes}
        elif parameter.requires_grad:
            found[name] = list(getattr(parameter, "ds_shape", parameter.shape))
    return found


_frozen_sizes: weakref.WeakKeyDictionary[torch.nn.Module, float] = weakref.WeakKeyDictionary()


def frozen_size(engine: Any) -> float:
    """The sum of the absolute values of all frozen weights; 0 if all are trained. Every rank must call it.

    But for rounding it is the same at every stage and on any ranks, so that weights that no checkpoint holds are known
    again.
    """
    model = model_of(engine)
    if model not in _frozen_sizes:
        total = torch.tensor(_frozen_here(engine), dtype=torch.float64, device=ranks.device())
        dist.all_reduce(total)
        _frozen_sizes[model] = float(total)
    return _frozen_sizes[model]


def _frozen_here(engine: Any) -> float:
    """This rank's share of frozen_size."""
    share = 0.0
    for parameter in model_of(engine).parameters():
        if parameter.requires_grad:
            continue
        held = parameter.detach()
        counts = layout(parameter) is not None or mesh.tensor_rank() == 0
        if stage_of(engine.config) == 3:
            begin = dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.numel()
            held = parameter.ds_tensor.detach()[: max(0, parameter.ds_numel - begin)]  # the last ranks' may be padding
            counts = counts or _is_cut_over_all_ranks(parameter)
        elif mesh.gradient_rank() > 0:  # the first has all of it
            continue
        if counts and held.numel():
            share += float(torch.linalg.vector_norm(held, 1, dtype=torch.float64))
    return share


def buffers(engine: Any) -> dict[str, torch.Tensor]:
    """The buffers that belong to the model's state, such as running means; the same on every rank."""
    persistent = model_of(engine).state_dict()
    return {name: buffer for name, buffer in model_of(engine).named_buffers() if name in persistent}


def _flats(engine: Any) -> Iterator[torch.Tensor]:
    """The tensors that the optimizer steps on this rank."""
    if stage_of(engine.config) == 3:  # where param_groups is filled for the moment of a step only
        yield from engine.optimizer.fp32_partitioned_groups_flat
    else:
        yield from (flat for group in engine.basic_optimizer.param_groups for flat in group["params"])


def optimizer_state(engine: Any) -> tuple[list[str], dict[str, float]]:
    """(kinds of state that have a value for each weight, the scalars beside them); both empty before the first step."""
    state = engine.basic_optimizer.state.get(next(_flats(engine)), {})
    kinds = sorted(kind for kind, value in state.items() if torch.is_tensor(value) and value.dim() > 0)
    return kinds, {kind: float(value) for kind, value in state.items() if kind not in kinds}


def make_optimizer_state(engine: Any, kinds: list[str], scalars: dict[str, float]) -> None:
    """Give the optimizer the states that it would make at its first step: zeros of the given kinds, and these
    scalars."""
    optimizer = engine.basic_optimizer
    optimizer.state.clear()
    if not kinds:
        return
    in_torch = type(optimizer).__module__.startswith("torch.")  # whose Adam counts in a tensor; DeepSpeed's in an int
    for flat in _flats(engine):
        # Fused, torch's Adam has its count on the device.
        counts = {
            kind: torch.tensor(value, device=flat.device) if in_torch else int(value) for kind, value in scalars.items()
        }
        optimizer.state[flat] = counts | {kind: torch.zeros_like(flat, requires_grad=False) for kind in kinds}
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False  # stages 1 and 2 look the new ones up at the next step


def refresh_model(engine: Any) -> None:
    """Copy the fp32 weights that pieces were written into to the parameters that the model computes with, on all
    ranks."""
    zero = engine.optimizer
    with torch.no_grad():
        if stage_of(engine.config) == 3:
            zero._partition_all_parameters()
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.invalidate_secondary_tensor()  # hpZ's second copies
            if zero.persistent_parameters:  # small ones, which every rank keeps whole
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif stage_of(engine.config) > 0:
            zero.update_lp_params()
        elif hasattr(zero, "fp32_groups"):
            for parameters, copies in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
                for parameter, copy in zip(parameters, copies, strict=True):
                    parameter.copy_(copy)


def loss_scaler(engine: Any) -> Any:
    """The object that holds fp16's loss scale, if there is one: plain numbers in its attributes."""
    return getattr(engine.optimizer, "loss_scale_config", None) or getattr(engine.optimizer, "loss_scaler", None)


def held_bytes(engine: Any) -> dict[str, dict[str, int]]:
    """{"parameters" | "gradients" | "optimizer": {"device": bytes, "host": bytes}} of the model states in this rank's
    memory now.

    Counted from the storages of tensors, each once. "optimizer" holds fp32 copies of the weights too, as in the ZeRO
    paper, and "parameters" also those that stage 3 has gathered. On a CPU, where device and host are one, what the
    config offloads counts as host. Communication buffers are not counted, nor gradients that lie in them.
    """
    zero, optimizer = engine.optimizer, engine.basic_optimizer
    model = list(model_of(engine).parameters())
    flats = list(_flats(engine)) + [copy for group in getattr(zero, "fp32_groups", []) for copy in group]
    buckets = [getattr(bucket, "buffer", None) for bucket in getattr(zero, "ipg_buckets", {}).values()]
    lists = [
        group
        for name in ("averaged_gradients", "all_grad_tensors")
        for group in getattr(zero, name, {}).values()
        if group is not None
    ]
    tensors = {  # in this order, each storage counts for the first kind that has it
        "buffers": [tensor for bucket in buckets for tensor in (bucket if isinstance(bucket, list) else [bucket])],
        "parameters": [
            tensor
            for p in model
            for tensor in (p.data, getattr(p, "ds_tensor", None), getattr(p, "ds_secondary_tensor", None))
        ],
        "optimizer": flats
        + [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.dim()
        ],
        "gradients": [
            *(gradient for parameter in model for gradient in (parameter.grad, getattr(parameter, "grad_accum", None))),
            *(flat.grad for flat in flats),
            *(gradient for group in lists for gradient in group),
            *getattr(zero, "accumulated_grads_in_cpu", {}).values(),
            *getattr(zero, "fp32_groups_gradients_flat", []),
            getattr(zero, "grad_partitions_flat_buffer", None),
        ],
    }
    held = {kind: {"device": 0, "host": 0} for kind in ("parameters", "gradients", "optimizer")}
    seen: set[int] = set()
    for kind, found in tensors.items():
        for tensor in found:
            if not torch.is_tensor(tensor) or tensor.untyped_storage().data_ptr() in seen:
                continue
            storage = tensor.untyped_storage()
            seen.add(storage.data_ptr())
            if kind != "buffers":
                held[kind]["host" if _on_host(engine, kind, tensor) else "device"] += storage.nbytes()
    return held


def _on_host(engine: Any, kind: str, tensor: torch.Tensor) -> bool:
    if engine.device.type != "cpu":
        return tensor.device.type == "cpu"
    if kind == "parameters":  # what is gathered is on the device
        return offload_device(engine.config, "param") != "none" and any(
            tensor is getattr(p, "ds_tensor", None) for p in model_of(engine).parameters()
        )
    if (
        kind == "gradients"
        and tensor.dim()
        and any(tensor is parameter.grad for parameter in model_of(engine).parameters())
    ):
        return False
    return offload_device(engine.config, "optimizer") != "none"
