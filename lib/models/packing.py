"""Attention in rows that hold several conversations, one after the other: none of them sees another.

Positions that begin anew tell transformers where a conversation begins. Flash attention goes by them alone. For sdpa
and eager attention it makes a mask, [row, row], and computes all of it. This module gives sdpa the lengths instead, and
computes the attention of each conversation by itself, without what the mask would leave out.
"""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lib.data.batches import Batch
from lib.distributed import mesh
from lib.distributed.sequence_parallel import ALIKE_LAYERS, changing_positions
from lib.errors import UserError

MIXES = "mixes the conversations of a row"

_whole_rows = ALL_ATTENTION_FUNCTIONS["sdpa"]


def _sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    packed_lengths: tuple[int, ...] = (), **options: Any,
) -> Any:  # fmt: skip
    """transformers' sdpa, for each of the conversations of a row by itself if it is given their lengths."""
    if len(packed_lengths) < 2:
        return _whole_rows(module, query, key, value, attention_mask, **options)
    window = options["sliding_window"] if "sliding_window" in options else _window_of(module)
    outputs, begin = [], 0
    parts = (torch.split(tensor, list(packed_lengths), 2) for tensor in (query, key, value))
    for length, *part in zip(packed_lengths, *parts, strict=True):
        end = begin + length
        needs_mask = window is not None and window < length
        mask = attention_mask[..., begin:end, begin:end] if needs_mask else None
        outputs.append(_whole_rows(module, *part, mask, **options)[0])
        begin = end
    return torch.cat(outputs, 1), None


def _window_of(module: Any) -> int | None:
    """How many tokens a layer sees that does not say so itself; 0, for which the mask decides, if that is unknown."""
    return getattr(module.config, "sliding_window", None) if hasattr(module, "config") else 0


# transformers looks attention up by its name. It is replaced now, because sequence parallelism wraps what it finds.
ALL_ATTENTION_FUNCTIONS["sdpa"] = _sdpa


def lengths_of(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """{"packed_lengths": those of the conversations in a batch of one row}, for the forward pass of the model.

    Empty where attention keeps the conversations apart without it. The ranks of a sequence-parallel group, which have a
    part of the row each in training, must call it together.
    """
    positions = batch["position_ids"]
    if len(positions) > 1 or not _is_computed_by_sdpa(model):
        return {}
    if model.training and mesh.sequence_size() > 1:
        parts = [torch.empty_like(positions) for _ in range(mesh.sequence_size())]
        dist.all_gather(parts, positions.contiguous(), group=mesh.sequence_group())
        positions = torch.cat(parts, 1)
    begins = [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]
    return {"packed_lengths": tuple(end - begin for begin, end in itertools.pairwise(begins))}


def _is_computed_by_sdpa(model: Any) -> bool:
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    return config._attn_implementation == "sdpa" and layers <= ALIKE_LAYERS


def check_model(model: PreTrainedModel) -> None:
    """Raise a UserError where the model does not keep the conversations of a row apart."""
    conversations = [torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7]])]
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    packed = {"position_ids": places, **lengths_of(model, {"position_ids": places})}
    try:
        with torch.no_grad():
            apart = [model.eval()(input_ids=ids, use_cache=False)[0] for ids in conversations]
            together = model.eval()(input_ids=torch.cat(conversations, 1), use_cache=False, **packed)[0]
        problem = None if torch.allclose(together, torch.cat(apart, 1), atol=1e-4, rtol=1e-3) else MIXES
    except Exception as error:  # each architecture fails in its own way
        problem = f"cannot be given the places of tokens ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
    changing = changing_positions(model.config.get_text_config())
    if changing is not None:  # rows of few tokens do not show it
        problem = f"has positions ({changing}) that depend on the length of the row"
    if problem is not None:
        raise UserError(f"packing: {type(model).__name__} {problem}; set --packing false")
