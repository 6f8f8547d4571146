"""Passes over all rows of a split by all ranks together. Each row counts once, and every rank gets the same result."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

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
    engine: Any, blocks: Blocks, batch_size: int, *, losses_of: Callable[[Any, Batch], torch.Tensor],
    texts: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """Perplexity per token and bits per byte over all blocks, which were cut from `texts`.

    losses_of(engine, batch): the loss of each label in nats, [rows, length]. All ranks must call it.
    """

    def nats_and_tokens(batch: Batch) -> torch.Tensor:
        losses = losses_of(engine, batch)
        return torch.stack([losses.sum(1), (batch["labels"] != IGNORED).sum(1)], dim=1).double()

    nats, tokens = for_each_row(engine, blocks, collate_blocks, batch_size, answer=nats_and_tokens).sum(0).tolist()
    return evaluation.perplexity_and_bits(nats, int(tokens), sum(len(text.encode()) for text in texts))


def pipeline_language_model_scores(
    engine: Any, blocks: Blocks, batch_size: int, *, texts: Sequence[str]
) -> dict[str, float]:
    """As language_model_scores, where the engine is a pipeline from tokens to logits. All ranks must call it."""

    def nats_and_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([token_losses(logits, labels).sum(), (labels != IGNORED).sum()]).double()

    def for_pipeline(batch: Batch, row_numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        is_filler = (row_numbers < 0)[:, None]
        return batch["input_ids"], batch["labels"].masked_fill(is_filler, IGNORED)

    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # on the ranks of the last stage
    batches = evaluation_batches(blocks, collate_blocks, batch_size, engine.device)
    at_once = 8 * mesh.pipeline_size()  # enough to fill the pipeline
    loss_of, engine.module.loss_fn = engine.module.loss_fn, nats_and_tokens
    monitored, engine.monitor.enabled = engine.monitor.enabled, False  # it would want a loss of one number
    try:
        with progress("evaluating", len(blocks)) as advance:
            while micro_batches := [for_pipeline(*found) for found in itertools.islice(batches, at_once)]:
                engine.total_loss = None  # which eval_batch adds to
                found = engine.eval_batch(
                    iter(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
                )
                total += sum(found or [])
                advance(len(micro_batches) * batch_size * mesh.gradient_size())
    finally:
        engine.module.loss_fn, engine.monitor.enabled = loss_of, monitored
    dist.all_reduce(total)
    nats, tokens = total.tolist()
    return evaluation.perplexity_and_bits(nats, int(tokens), sum(len(text.encode()) for text in texts))
