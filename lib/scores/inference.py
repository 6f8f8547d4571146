"""Passes over all rows of a split by all ranks together. Each row counts once, and every rank gets the same result."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lib.data.batches import IGNORED, Batch, evaluation_batches
from lib.data.blocks import Blocks, collate_blocks
from lib.distributed import mesh, ranks
from lib.models.losses import token_losses
from lib.progress import progress
from lib.scores import evaluation


def for_each_row(
    engine: Any, rows: Any, collate: Callable[[dict[str, Any]], Batch], batch_size: int, *,
    answer: Callable[[Batch], torch.Tensor], lengths: Sequence[int] | None = None, what: str = "evaluating",
) -> torch.Tensor:  # fmt: skip
    """Call `answer` on all rows in batches. Returns the answers, [all rows, ...], in the rows' order on every rank.

    All ranks must call it.
    answer: returns [rows of the batch, ...] for a batch. Batches and answers are on the engine's device.
    lengths: the rows' lengths, by which rows of similar length are put into one batch.
    what: the name of this work, which the console shows if it takes long.
    lib.data.batches.evaluation_batches explains the other arguments.
    """
    engine.eval()
    answers, numbers = [], []
    with torch.no_grad(), progress(what, len(rows)) as advance:
        for batch, row_numbers in evaluation_batches(rows, collate, batch_size, engine.device, lengths):
            answers.append(answer(batch))
            numbers.append(row_numbers)
            advance(batch_size * mesh.gradient_size())
    engine.train()
    return ranks.gather_rows(torch.cat(answers), torch.cat(numbers), len(rows))


def language_model_scores(
    engine: Any, blocks: Blocks, batch_size: int, *, logits_of: Callable[[Any, Batch], torch.Tensor],
    texts: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """Perplexity per token and bits per byte over all blocks, which were cut from `texts`.

    logits_of(engine, batch): the logits that lib.models.losses.token_losses takes. All ranks must call it.
    """

    def nats_and_tokens(batch: Batch) -> torch.Tensor:
        losses = token_losses(logits_of(engine, batch), batch["labels"])
        return torch.stack([losses.sum(1), (batch["labels"] != IGNORED).sum(1)], dim=1).double()

    nats, tokens = for_each_row(engine, blocks, collate_blocks, batch_size, answer=nats_and_tokens).sum(0).tolist()
    return evaluation.perplexity_and_bits(nats, int(tokens), sum(len(text.encode()) for text in texts))
