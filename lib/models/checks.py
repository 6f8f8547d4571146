"""Checks of what a model must be able to do, made before it is trained."""

import traceback
from typing import Any

import torch
from transformers import PreTrainedModel

from lib.errors import UserError


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model's output at a position does not depend on later tokens, as in a decoder."""
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    with torch.no_grad():
        first, second = model.eval()(input_ids=tokens)[0][:, :3]
    return torch.allclose(first, second, atol=1e-4, rtol=1e-3)


def check_causal(model: PreTrainedModel) -> None:
    """Raise a UserError where the model sees the tokens that it is to predict."""
    if not is_causal(model):
        raise UserError(
            f"{type(model).__name__} sees the tokens that it is to predict; take an architecture that is a decoder"
        )


def check_generates(model: Any, remedy: str, **options: Any) -> None:
    """Raise a UserError where transformers cannot generate with the model, before the training and not after it.

    Some models can be trained but cannot generate. remedy: what the user can do. options: arguments of generate.
    """
    tokens = torch.tensor([[1, 2, 3]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    model.eval()
    try:
        # The generator's state is put back: later draws must not depend on whether this rank has made the check.
        with torch.random.fork_rng(devices=[]):
            model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **options)
    except Exception as error:  # each architecture fails in its own way
        traceback.print_exc()  # goes to the log of the run
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{type(model).__name__}: this transformers cannot generate with it; {remedy} ({why})"
        ) from None
