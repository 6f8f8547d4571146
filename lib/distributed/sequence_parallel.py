"""Sequence parallelism: the ranks of a group have the same rows, and each has a part of every row's tokens.

All layers but attention compute each token by itself, so they need nothing of the other ranks. For attention the ranks
exchange all heads of their part of the tokens for all tokens of their part of the heads, and back (Jacobs et al. 2023,
DeepSpeed-Ulysses). Gradients of the parts are summed as those of different rows are. Evaluation and generation, which
keep no activations, do not cut rows: each rank has rows of its own there.
"""

import functools
import weakref
from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lib.distributed import mesh
from lib.errors import UserError

REMEDY = "take a JSON without sequence_parallel_size, or an architecture such as llama, qwen3 or gpt2"
ALIKE_LAYERS = {"full_attention", "sliding_attention"}  # whose masks follow from the places in the row
CHANGING_POSITIONS = {"dynamic", "longrope"}  # whose frequencies depend on the longest row, which no rank sees


def check_model(model: Any, size: int) -> None:
    """Raise UserError where `size` ranks cannot share the rows of a whole model.

    It tries whether nothing but attention mixes tokens: with attention that gives each token its own value back, the
    last tokens of a row must have the same outputs without the tokens before them.
    """
    what = f"sequence_parallel_size is {size}, but"
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{what} {type(model).__name__} has no attention heads to share; take a JSON without it")
    problem = _what_stands_against(model, model.config.get_text_config(), size)
    if problem is not None:
        raise UserError(f"{what} {type(model).__name__} {problem}; {REMEDY}")


def _what_stands_against(model: PreTrainedModel, config: Any, size: int) -> str | None:
    implementation = config._attn_implementation
    if implementation != "sdpa" and "flash" not in implementation:
        return f"computes attention by {implementation}, not by sdpa or a flash kernel"
    other_layers = set(getattr(config, "layer_types", None) or ()) - ALIKE_LAYERS
    if other_layers:
        return f"has layers of other kinds: {', '.join(sorted(other_layers))}"
    changing = changing_positions(config)
    if changing is not None:
        return f"has positions ({changing}) that depend on the length of the row"
    calls: list[str | None] = []  # what is wrong with each call of the attention function

    def own_value(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        calls.append(_what_is_wrong(query, key, value, size))
        if attention_mask is not None:
            calls.append("masks tokens in a way of its own")
        if not options.get("is_causal", getattr(module, "is_causal", True)):
            calls.append("is no decoder")
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    ids, places = torch.arange(1, 9)[None], torch.arange(8)[None]
    attention = ALL_ATTENTION_FUNCTIONS[implementation]
    ALL_ATTENTION_FUNCTIONS[implementation] = own_value
    try:
        with torch.no_grad():
            whole, part = (model.eval()(input_ids=ids[:, n:], position_ids=places[:, n:])[0] for n in (0, 4))
    except Exception as error:  # each architecture fails in its own way
        return f"cannot be given the places of tokens ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    finally:
        ALL_ATTENTION_FUNCTIONS[implementation] = attention
    if not calls:
        return "does not compute attention by transformers' interface"
    problem = next((call for call in calls if call is not None), None)
    if problem is None and not (whole.dim() == 3 and torch.allclose(whole[:, 4:], part, atol=1e-4, rtol=1e-3)):
        return "mixes tokens outside attention"
    return problem


def changing_positions(config: Any) -> str | None:
    """The kind of a model's rotary positions, if they are of a kind that depends on the length of the row."""
    rope = getattr(config, "rope_parameters", None) or {}
    of_layers = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # some have them by kind of layer
    return next((part["rope_type"] for part in of_layers if part.get("rope_type") in CHANGING_POSITIONS), None)


def _what_is_wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, size: int) -> str | None:
    """With heads of these shapes, [rows, heads, length, head size]."""
    heads, key_value_heads = query.shape[1], key.shape[1]
    if value.shape != key.shape or query.shape[3] != key.shape[3]:
        return "has queries, keys and values of different sizes"
    if heads % size or (key_value_heads % size and size % key_value_heads):
        fitting = [
            n for n in range(2, heads + 1) if not heads % n and not (key_value_heads % n and n % key_value_heads)
        ]
        what = f"{heads} attention heads" + (
            f" and {key_value_heads} key-value heads" if key_value_heads < heads else ""
        )
        return f"has {what}, which {size} ranks cannot share; sizes that can: {', '.join(map(str, fitting))}"
    return None


_shared: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # modules of models whose rows ranks share
_alone: dict[str, Any] = {}  # transformers' own attention functions, by name


def share_attention(model: PreTrainedModel) -> None:
    """Let the ranks of a group compute attention together while the model is in training mode.

    transformers calls attention functions by name, so the function of that name is replaced; for other models than
    these it does what it did.
    """
    name = model.config.get_text_config()._attn_implementation
    _alone.setdefault(name, ALL_ATTENTION_FUNCTIONS[name])
    _shared.update(model.modules())
    ALL_ATTENTION_FUNCTIONS[name] = functools.partial(_attention, name)


def _attention(
    name: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    **options: Any,
) -> Any:  # fmt: skip
    heads, key_value_heads, head_size = query.shape[1], key.shape[1], query.shape[3]
    if module in _shared and hasattr(module, "num_key_value_groups"):  # DeepSpeed changes it where it copies heads
        module.num_key_value_groups = heads // key_value_heads
    if module not in _shared or not module.training:
        return _alone[name](module, query, key, value, attention_mask, **options)
    if name == "sdpa":  # DeepSpeed wants them, sdpa does not
        options["position_ids"] = torch.zeros((1, 1), dtype=torch.long, device=query.device)
    together = _ulysses(name, query.shape[0], heads, key_value_heads, head_size)
    output, weights = together(module, query, key, value, None, **options)
    return output.unflatten(2, (heads, head_size)), weights


@functools.cache
def _ulysses(name: str, rows: int, heads: int, key_value_heads: int, head_size: int) -> UlyssesSPAttentionHF:
    return UlyssesSPAttentionHF(
        attn=_with_window(_alone[name]) if name == "sdpa" else _alone[name], batch_size=rows, attn_head_count=heads,
        attn_head_size=head_size, kv_head_count=key_value_heads, num_hidden_layers=1,
        process_group=mesh.sequence_group(), seq_length_is_variable=True,
    )  # fmt: skip


def _with_window(attention: Any) -> Any:
    """sdpa for whole rows without a mask, also in layers that see the last `sliding_window` tokens only."""

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        length, window = query.shape[2], options.get("sliding_window")
        if window is not None and window < length:
            places = torch.arange(length, device=query.device)
            distance = places[:, None] - places[None]
            attention_mask = ((distance >= 0) & (distance < window))[None, None]
        return attention(module, query, key, value, attention_mask, **options)

    return attend
