"""What a model must be able to do before it is trained."""

import traceback
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
)  # fmt: skip

from lib.errors import UserError


def is_causal(model: PreTrainedModel) -> bool:
    """Whether what it says of a position does not depend on later tokens, as in a decoder."""
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    with torch.no_grad():
        first, second = model.eval()(input_ids=tokens)[0][:, :3]
    return torch.allclose(first, second, atol=1e-4, rtol=1e-3)


def check_causal(model: PreTrainedModel) -> None:
    """Raise a UserError where a model sees the tokens that it is to predict."""
    if not is_causal(model):
        raise UserError(
            f"{type(model).__name__} sees the tokens that it is to predict; take an architecture that is a decoder"
        )


def check_generates(model: Any, remedy: str, **options: Any) -> None:
    """Raise a UserError where transformers cannot generate with a model: some can be trained and cannot, which is to be known before the training.

    remedy: what the user can do then. options: what generate needs besides.
    """
    tokens = torch.tensor([[1, 2, 3]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):  # or what is drawn next would depend on whether this rank has tried it
            model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **options)
    except Exception as error:  # whatever an architecture stumbles over
        traceback.print_exc()  # for the log of the run
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{type(model).__name__}: this transformers cannot generate with it; {remedy} ({why})"
        ) from None
