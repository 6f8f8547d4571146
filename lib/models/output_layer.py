"""The loss of each labelled token without the logits of all tokens at once.

A language model's logits are its largest activations: 8 rows of 1,024 tokens over a vocabulary of 49,152 take 1.6 GB in
fp32, and as much again for their gradient. Here the output layer itself computes what is needed of them: only where
there is a label, and in pieces of LOGITS_AT_ONCE numbers, whose logits are computed once more in the backward pass.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import initialization

from lib.data.batches import IGNORED
from lib.distributed import vocabulary
from lib.models.losses import token_losses

LOGITS_AT_ONCE = 2**26  # 256 MiB in fp32; as much again for each of the few tensors that a loss makes of them

OfLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits, labels): see at_labels

_is_last: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def losses_for(
    model: Any, labels: torch.Tensor, label_smoothing: float = 0.0
) -> Iterator[Callable[[Any], torch.Tensor]]:
    """A function that takes the output of a forward pass made inside the `with` statement and returns the loss of each
    label in nats, [rows, length] in fp32; 0 where the label is IGNORED. Arguments: see at_labels.
    """

    def losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return token_losses(logits, labels, label_smoothing)[..., None]

    with at_labels(model, labels, losses_of) as found_in:
        yield lambda output: found_in(output)[..., 0]


@contextlib.contextmanager
def at_labels(model: Any, labels: torch.Tensor, of_logits: OfLogits) -> Iterator[Callable[[Any], torch.Tensor]]:
    """As losses_for, with [rows, length, k] numbers of another kind than the loss; 0 where the label is IGNORED.

    model: one of transformers' with an output layer, inside DeepSpeed's engine. labels: [rows, length], each of the
    same place in the model's output. of_logits: takes logits [rows, n, vocabulary] in fp32 and labels [rows, n], and
    returns [rows, n, k]. Every rank must call it. Where the model changes the logits behind its output layer (Gemma 2
    bounds them, for example), they are computed whole.
    """
    layer = model.get_output_embeddings()
    if layer is None or not _ends_the_model(model, layer, labels.device):
        has_label = (labels != IGNORED)[..., None]
        yield lambda output: of_logits(output.logits.float(), labels) * has_label
        return
    with _replaced_forward(layer, lambda hidden, logits_of: _in_pieces(hidden, labels, layer, logits_of, of_logits)):
        yield lambda output: output.logits


def _in_pieces(
    hidden: torch.Tensor, labels: torch.Tensor, layer: Any, logits_of: Callable[..., torch.Tensor], of_logits: OfLogits
) -> torch.Tensor:
    """[rows, length, k], from hidden states [rows, length, width]."""
    has_label = labels != IGNORED
    states, targets = hidden[has_label], labels[has_label]

    def found_in(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return of_logits(logits_of(states[None]).float(), targets[None])[0].float()

    at_once = max(1, LOGITS_AT_ONCE // vocabulary.width(layer))
    parts = list(zip(torch.split(states, at_once), torch.split(targets, at_once), strict=True))
    found = torch.cat(
        [checkpoint(found_in, *part, use_reentrant=False) if len(parts) > 1 else found_in(*part) for part in parts]
    )
    return found.new_zeros(*labels.shape, found.shape[-1]).masked_scatter(has_label[..., None], found)


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


def _ends_the_model(model: Any, layer: Any, device: torch.device) -> bool:
    """Whether what the output layer gives is what the model gives; found out once."""
    if model not in _is_last:
        tokens = torch.tensor([[1, 2]])
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
        try:
            _is_last[model] = _ends_its_twin(model, inputs)
        except Exception:  # what a model decides by numbers, such as the experts of a token, needs numbers
            _is_last[model] = _passes_numbers_on(model, layer, {name: ids.to(device) for name, ids in inputs.items()})
    return _is_last[model]


def _ends_its_twin(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether the output layer's tensor is the output itself in a model of the same config without numbers.

    A pass of the model itself would be in the trace by which ZeRO-3 prefetches, and spoil it for some steps.
    """
    given: list[torch.Tensor] = []
    with torch.device("meta"), torch.no_grad(), initialization.no_init_weights():
        twin = type(model)(model.config).to(torch.bfloat16).eval()  # some kernels for experts know no other
        twin.get_output_embeddings().register_forward_hook(lambda _, __, output: given.append(output))
        logits = twin(**{name: ids.to("meta") for name, ids in inputs.items()}).logits
    return len(given) == 1 and logits is given[0]


def _passes_numbers_on(model: Any, layer: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether other numbers of the output layer are the output. Every rank must call it."""
    was_training = model.training
    with torch.no_grad(), _replaced_forward(layer, lambda hidden, _: torch.full_like(hidden[..., :1], 100.0)):
        output = model.eval()(**inputs).logits
    model.train(was_training)
    return output.shape == (1, 2, 1) and bool((output == 100).all())
