"""The loss of each labelled token without the logits of all tokens at once.

A decoder's logits are its largest activations: 8 rows of 1,024 tokens over a vocabulary of 49,152 take 1.6 GB in fp32,
and as much again for their gradient. Here the output layer itself computes losses: only of the tokens that have a
label, TOKENS_AT_ONCE at a time, whose logits are computed once more in the backward pass.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lib.data.batches import IGNORED
from lib.models.losses import token_losses

TOKENS_AT_ONCE = 1024

_is_last: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def losses_for(model: Any, labels: torch.Tensor) -> Iterator[Callable[[Any], torch.Tensor]]:
    """A function that takes the output of a forward pass made inside the `with` statement and returns the loss of each
    label in nats, [rows, length] in fp32; 0 where the label is IGNORED.

    model: a decoder of transformers, inside DeepSpeed's engine. labels: [rows, length], the token after each one. Every
    rank must call it. Where the model changes the logits behind its output layer (Gemma 2 bounds them, for example),
    they are computed whole.
    """
    layer = model.get_output_embeddings()
    if not _ends_the_model(model, layer):
        yield lambda output: token_losses(output.logits.float(), labels)
        return
    with _replaced_forward(layer, lambda hidden, logits_of: _losses(hidden, labels, logits_of)):
        yield lambda output: output.logits[..., 0]


def _losses(hidden: torch.Tensor, labels: torch.Tensor, logits_of: Callable[..., torch.Tensor]) -> torch.Tensor:
    """[rows, length, 1], from hidden states [rows, length, width]."""
    has_label = labels != IGNORED
    states, targets = hidden[has_label], labels[has_label]

    def losses_of(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_losses(logits_of(states[None]).float(), targets[None])[0]

    parts = list(zip(torch.split(states, TOKENS_AT_ONCE), torch.split(targets, TOKENS_AT_ONCE), strict=True))
    losses = torch.cat(
        [checkpoint(losses_of, *part, use_reentrant=False) if len(parts) > 1 else losses_of(*part) for part in parts]
    )
    return torch.zeros(labels.shape, device=losses.device).masked_scatter(has_label, losses)[..., None]


@contextlib.contextmanager
def _replaced_forward(layer: Any, replacement: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let a layer compute replacement(input, its own forward), with the hooks that DeepSpeed has put on it."""
    had_one, logits_of = "forward" in vars(layer), layer.forward
    layer.forward = lambda hidden: replacement(hidden, logits_of)
    try:
        yield
    finally:
        if had_one:
            layer.forward = logits_of
        else:
            del layer.forward


def _ends_the_model(model: Any, layer: torch.nn.Module) -> bool:
    """Whether what the output layer gives is what the model gives; found out once, by giving it other numbers."""
    if model not in _is_last:
        was_training = model.training
        tokens = torch.tensor([[1, 2]], device=next(model.parameters()).device)
        with torch.no_grad(), _replaced_forward(layer, lambda hidden, _: torch.full_like(hidden[..., :1], 100.0)):
            output = model.eval()(input_ids=tokens, use_cache=False).logits
        model.train(was_training)
        _is_last[model] = output.shape == (1, 2, 1) and bool((output == 100).all())
    return _is_last[model]
