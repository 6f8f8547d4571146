"""Pre-train an encoder that predicts hidden tokens.

    ./launch.sh masked_lm --stage 2
    deepspeed --num_accelerators 2 recipes/masked_lm.py --deepspeed_config ds_configs/masked_lm/zero2.json

The default trains a small ModernBERT and its byte-level BPE from scratch on the State of the Union addresses, and compares it with
a unigram model. `--model <hub id or folder>` goes on training a pre-trained encoder instead, with its own tokenizer.

Method: choose 15 % of the tokens at random; replace 80 % of these with the mask, 10 % with a random token, leave 10 %; minimize the
mean of -log p(token | the changed text) over the chosen ones (Devlin et al. 2019, BERT, section 3.1). Other tokens are chosen
each time a block comes by (Liu et al. 2019, RoBERTa, section 4.1). With `whole_words`, all tokens of a word are chosen together.
Documents follow each other in the blocks; there is no second sentence and no dropout. Pseudo-perplexity hides one token at a time (Salazar et al. 2020, section 2.1).

Change first: the YAML beside this file (data, sizes), then build_model(), tokenize() and hide().
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import deepspeed
import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import AddedToken, AutoModelForMaskedLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import IGNORED, Batch, pad, pad_tokens, training_batches
from lib.data.blocks import token_stream
from lib.data.rows import load_rows, map_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.distributed.repairs import repair_stage0, veto_if_not_finite
from lib.errors import UserError
from lib.models.hub import load_config, load_tokenizer, load_weights
from lib.models.losses import token_losses
from lib.models.scratch import new_config, train_tokenizer
from lib.run.checkpoints import Checkpoints
from lib.run.cli import cli
from lib.run.run import Run
from lib.scores import baselines, evaluation, inference
from lib.settings.config import Betas, Seed
from lib.settings.run_settings import RunSettings

SPECIAL_TOKENS = {
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "mask_token": AddedToken("<mask>", lstrip=True, special=True),
}


@dataclass
class Config(RunSettings):
    model: (
        str | None
    )  # a folder or hub id to go on training; null: from scratch, as the settings from architecture to num_heads say
    trust_remote_code: (
        bool  # whether code and pickled weights that come with the model may run; only for sources that you trust
    )
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
    precision: Literal["fp32", "bf16", "fp16"]  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # blocks an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training blocks; null: max_steps decide
    max_length: Annotated[int, Field(ge=3)]  # tokens a block, with the first and last, which mark its ends
    mask_rate: Annotated[float, Field(gt=0, lt=1)]  # share of the tokens to predict
    whole_words: bool  # whether all tokens of a word are chosen together
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: Literal["linear", "cosine", "constant"]  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: (
        PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which the mean gradient is divided
    )
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    scored_tokens: PositiveInt  # tokens of the validation and of the test documents, drawn at random, that are hidden one at a time for the scores


def build_model(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The encoder with its output layer, whole, in host memory: pre-trained, or at random."""
    if cfg.model is not None:
        return load_weights(
            AutoModelForMaskedLM, cfg.model, load_config(cfg.model, 0.0, cfg.trust_remote_code), cfg.trust_remote_code
        )
    config = new_config(
        cfg.architecture, AutoModelForMaskedLM, cfg.num_heads, cfg.hidden_size, vocab_size=len(tokenizer), intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers, max_position_embeddings=cfg.max_length + tokenizer.pad_token_id + 1,  # RoBERTa's positions begin there
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        cls_token_id=tokenizer.cls_token_id, sep_token_id=tokenizer.sep_token_id,
        initializer_range=cfg.hidden_size**-0.5,  # 0.02, made for larger models, would leave a small one's attention idle for most of a short run
    )  # fmt: skip
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)


def tokenize(rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Any]]:
    """Documents -> blocks: input_ids, and the number of the word that each is part of (-1: of none). Documents share blocks."""
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
    """Blocks -> input_ids with hidden tokens, and labels: what was there at the chosen ones. A row's draw alone decides."""
    changed: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    for ids, words, draw in zip(
        map(np.array, rows["input_ids"]), map(np.array, rows["words"]), rows["draw"], strict=True
    ):
        random = np.random.default_rng(draw)
        _, unit = np.unique(
            words if cfg.whole_words else np.arange(len(ids)), return_inverse=True
        )  # what is chosen together
        chosen = (random.random(len(ids))[unit] < cfg.mask_rate) & (words >= 0)
        how = random.random(len(ids))
        masked = np.where(
            how < 0.8, tokenizer.mask_token_id, np.where(how < 0.9, random.integers(len(tokenizer), size=len(ids)), ids)
        )
        changed["input_ids"].append(np.where(chosen, masked, ids))
        changed["labels"].append(np.where(chosen, ids, IGNORED))
    return changed


def hide_one(blocks: Dataset, count: int, mask_token_id: int) -> dict[str, list[np.ndarray]]:
    """`count` rows, each a block in which one token, drawn from all, is hidden."""
    places_of = [np.flatnonzero(np.array(words) >= 0) for words in blocks["words"]]
    places = np.stack(
        [np.repeat(np.arange(len(places_of)), list(map(len, places_of))), np.concatenate(places_of)], axis=1
    )
    changed: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    for row, place in np.random.default_rng(0).permutation(places)[:count]:
        ids = np.array(blocks[int(row)]["input_ids"])
        at = np.arange(len(ids)) == place
        changed["input_ids"].append(np.where(at, mask_token_id, ids))
        changed["labels"].append(np.where(at, ids, IGNORED))
    return changed


def collate(blocks: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Blocks with hidden tokens -> input_ids, attention_mask and labels, [rows, longest]."""
    return pad_tokens(blocks["input_ids"], tokenizer.pad_token_id) | {"labels": pad(blocks["labels"], IGNORED)}


def logits_of(engine: Any, batch: Batch) -> torch.Tensor:
    """[rows, longest, tokens of the vocabulary], in fp32."""
    return engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def evaluate(engine: Any, one_hidden: Dataset, collate_hidden: Any, batch_size: int) -> dict[str, float]:
    """Pseudo-perplexity, and how often the likeliest token is the right one, over blocks with one hidden token each."""

    def sums(batch: Batch) -> torch.Tensor:
        logits, labels = logits_of(engine, batch), batch["labels"]
        return torch.stack([token_losses(logits, labels).sum(1), (logits.argmax(-1) == labels).sum(1)], dim=1).double()

    nats, right = inference.for_each_row(engine, one_hidden, collate_hidden, batch_size, sums).sum(0).tolist()
    return {
        "pseudo_perplexity": evaluation.perplexity(nats, len(one_hidden)),
        "masked_accuracy": right / len(one_hidden),
    }


def main(cfg: Config, ds_config: dict[str, Any]) -> dict[str, dict[str, float]]:
    device = ranks.init(cfg.rank_timeout)
    run = Run(cfg, ds_config, __file__)
    micro_batch_size, accumulation_steps = (
        ds_config["train_micro_batch_size_per_gpu"],
        ds_config["gradient_accumulation_steps"],
    )

    # Data: documents to blocks of tokens.
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"text": cfg.text_column})
    if cfg.model is None:
        tokenizer = train_tokenizer(splits["train"]["text"], cfg.vocab_size, SPECIAL_TOKENS, "<s> $A </s>")
    else:
        tokenizer = load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)
        if None in (tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id):
            raise UserError(
                f"model {cfg.model}: its tokenizer has no mask, or no tokens for the ends of a text; take a masked language model"
            )
    blocks = map_rows(splits, tokenize, tokenizer=tokenizer, max_length=cfg.max_length)
    one_hidden = {
        name: Dataset.from_dict(hide_one(blocks[name], cfg.scored_tokens, tokenizer.mask_token_id))
        for name in ("validation", "test")
    }
    collate_hidden = functools.partial(collate, tokenizer=tokenizer)

    def hide_and_collate(rows: dict[str, Any]) -> Batch:
        return collate(hide(rows, tokenizer, cfg), tokenizer)

    run.plan(len(blocks["train"]), splits)

    # Model, optimizer, engine.
    model = load_model(lambda: build_model(cfg, tokenizer), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    repair_stage0(engine)
    run.attach(engine)
    run.header(model, {f"{name} blocks": len(rows) for name, rows in blocks.items()})

    checkpoints = Checkpoints(run, engine, schedule)
    done = checkpoints.restore()  # optimizer steps: 0, or those of the checkpoint that --resume found
    batches = training_batches(
        blocks["train"], hide_and_collate, cfg.batch_size, micro_batch_size, cfg.seed, device, start=done
    )
    for step in run.steps(done):
        micro_batches = next(batches)  # this rank's share of one optimizer step
        learning_rate = schedule.get_last_lr()[0]
        labels, tokens = ranks.all_sum(  # over every rank and micro-batch
            torch.stack(
                [
                    torch.stack([(batch["labels"] != IGNORED).sum(), batch["attention_mask"].sum()])
                    for batch in micro_batches
                ]
            ).sum(0)
        )
        step_loss = torch.zeros((), device=device)
        for batch in micro_batches:
            loss = token_losses(logits_of(engine, batch), batch["labels"]).sum() / labels.clamp(
                min=1
            )  # chance may choose none
            engine.backward(
                veto_if_not_finite(loss) * accumulation_steps * ranks.world_size()
            )  # undoes DeepSpeed's two divisions
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens, learning_rate, engine.get_global_grad_norm())
        if run.due(step, cfg.eval_every):
            scores = evaluate(engine, one_hidden["validation"], collate_hidden, micro_batch_size)
            run.log_evaluation(step, "validation", scores)
            checkpoints.score(step, -scores["pseudo_perplexity"])
        checkpoints.end_step(
            step, micro_batches
        )  # saves when due, or asked to stop; a loss that is not finite has changed no weight

    checkpoints.take_best()
    export(engine, tokenizer, run.folder / "model")
    scores = evaluate(engine, one_hidden["test"], collate_hidden, micro_batch_size)
    run.log_evaluation(run.total_steps, "test", scores)
    hidden = [next(label for label in labels if label != IGNORED) for labels in one_hidden["test"]["labels"]]
    text = token_stream(blocks["train"])[
        token_stream(blocks["train"], "words") >= 0
    ]  # without the marks of the blocks' ends
    baseline = baselines.unigram_masked(text, hidden, len(tokenizer))
    run.finish({f"this model, {len(hidden):,} test tokens": scores, "unigram": baseline})
    return {"model": scores, "unigram": baseline}


if __name__ == "__main__":
    cli(main, Config)
