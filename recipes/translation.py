"""Train an encoder-decoder to translate.

    ./launch.sh translation --stage 2
    ./launch.sh translation --model null
    deepspeed --num_accelerators 2 recipes/translation.py --deepspeed_config ds_configs/translation/zero2.json

The default puts a new decoder, with a byte-level BPE of its own, on MiniLM, a pre-trained encoder that stays as it is,
and trains that decoder on 2,500 user-interface messages, English to French. `--model` takes any pre-trained encoder or
encoder-decoder, `--decoder` a pre-trained decoder for the encoder; with `--model null`, a small T5Gemma and one BPE for
both languages start from scratch. The translations are scored beside copies of the source, and beside the translation
of the most similar source of the training rows.

Method: minimize the mean of the cross entropy of each target token, given the source and the target tokens before it,
with a share of the probability spread over the vocabulary (label smoothing: Szegedy et al. 2016, section 7; Vaswani et
al. 2017, section 5.4); translate by beam search. Batches are grouped by length, and there is no dropout.

Change first: the YAML beside this file (model, dataset, columns), then tokenize() and generate(); the model is in
lib/models/encoder_decoder.py.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import deepspeed
import torch
from datasets import Dataset
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import IGNORED, Batch, pad, pad_tokens
from lib.data.rows import Splits, load_rows, map_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.models import encoder_decoder, output_layer
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import baselines
from lib.scores.evaluation import bleu_signature, check_bleu_tokenizer, translation_scores
from lib.scores.generation import generate_texts
from lib.settings.config import Betas, LearningRateSchedule, LengthPenalty, Precision, Probability, Seed
from lib.settings.run_settings import RunSettings

Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]  # of the sources, of the targets


@dataclass(kw_only=True)
class Config(RunSettings):
    model: str | None  # "minilm", a folder or a hub id: an encoder or an encoder-decoder; null: from scratch
    decoder: str | None  # with an encoder as the model: whose weights its decoder starts from; null: a new decoder
    trust_remote_code: bool  # whether code and pickled weights of the model may run; only for sources that you trust
    vocab_size: PositiveInt  # tokens of the BPE that is learned, if the decoder brings none; at least 259
    hidden_size: PositiveInt  # width of what starts from scratch; a multiple of num_heads, or of twice that if all does
    intermediate_size: PositiveInt  # width inside its MLPs
    num_layers: PositiveInt  # its layers: of the decoder, and of the encoder if that starts from scratch, too
    num_heads: PositiveInt  # its attention heads
    dataset: str  # "messages_fr", _de, _es, _ja (built in), a file (.jsonl, .csv, ...), a folder of them, or a hub id
    source_column: str  # the column to translate
    target_column: str  # the column with its translation
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the weights and the order of the rows
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # rows an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training rows; null: max_steps decide
    max_source_length: PositiveInt  # tokens; longer texts are truncated and counted
    max_target_length: Annotated[int, Field(ge=2)]  # tokens, also of what is generated
    label_smoothing: Probability  # share of the probability that is spread over the vocabulary
    learning_rate: PositiveFloat  # of all but the weights that `model` brings; the highest, after the warm-up
    pretrained_learning_rate: NonNegativeFloat  # of the weights that `model` brings; 0: frozen, which takes less time
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    beams: PositiveInt  # of the beam search; 1: greedy
    length_penalty: LengthPenalty  # of the beam search: the higher, the longer the texts; 1: mean log probability
    bleu_tokenizer: Literal["13a", "intl", "zh", "char"]  # sacrebleu's, for BLEU: char for Japanese, zh for Chinese


def load_pairs(cfg: Config) -> Splits:
    """Columns source and target. Raises UserError where BLEU needs another tokenizer for these targets."""
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"source": cfg.source_column, "target": cfg.target_column})
    check_bleu_tokenizer(cfg.bleu_tokenizer, splits["train"]["target"])
    return splits


def tokenize(rows: dict[str, list[Any]], tokenizers: Tokenizers, max_lengths: tuple[int, int]) -> dict[str, list[Any]]:
    """Columns source and target -> input_ids, labels, and their length together; what notes_on counts.

    A truncated target lacks its end-of-text token, or the model would learn to stop there.
    """
    sources = tokenizers[0](rows["source"], truncation=True, max_length=max_lengths[0])
    targets = tokenizers[1](text_target=rows["target"], truncation=True, max_length=max_lengths[1])
    truncated, end = [bool(target.overflowing) for target in targets.encodings], tokenizers[1].eos_token_id
    labels = [
        ids[:-1] if cut and ids[-1] == end else ids for ids, cut in zip(targets["input_ids"], truncated, strict=True)
    ]
    written = tokenizers[1].batch_decode(labels, skip_special_tokens=True)
    read_back = zip(truncated, rows["target"], written, strict=True)
    return {
        "input_ids": sources["input_ids"],
        "labels": labels,
        "length": [len(source) + len(target) for source, target in zip(sources["input_ids"], labels, strict=True)],
        "source_truncated": [bool(source.overflowing) for source in sources.encodings],
        "target_truncated": truncated,
        "target_altered": [not cut and text.strip() != back.strip() for cut, text, back in read_back],
    }


def notes_on(train: Dataset) -> list[str]:
    """What the header says of the training rows: truncated ones, and targets that the tokenizer cannot write as they
    are."""
    sources, targets, altered = (
        sum(train[name]) for name in ("source_truncated", "target_truncated", "target_altered")
    )
    pairs, notes = f"of {len(train):,} training", []
    if sources or targets:
        notes.append(f"truncated: {sources:,} sources and {targets:,} targets {pairs} pairs")
    if altered:
        why = "cannot be written as they are by the model's tokenizer (letter case, accents, spaces)"
        notes.append(f"{altered:,} {pairs} targets {why}")
    return notes


def collate(rows: dict[str, list[Any]], tokenizers: Tokenizers, decoder_start: int) -> Batch:
    """Pairs -> input_ids, attention_mask [rows, longest source]; decoder_input_ids, labels [rows, longest target].

    The decoder reads a start token and then the target; its label at each place is the token that comes next.
    """
    shifted = [[decoder_start, *labels[:-1]] for labels in rows["labels"]]
    targets = {"decoder_input_ids": pad(shifted, tokenizers[1].pad_token_id), "labels": pad(rows["labels"], IGNORED)}
    return pad_tokens(rows["input_ids"], tokenizers[0].pad_token_id) | targets


def count(batch: Batch) -> torch.Tensor:
    """[2]: labels, and tokens of the sources."""
    return torch.stack([(batch["labels"] != IGNORED).sum(), batch["attention_mask"].sum()])


def losses_of(engine: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """The loss of each label in nats, [rows, longest target]."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    with output_layer.losses_for(engine.module, batch["labels"], label_smoothing) as losses_in:
        return losses_in(engine(**inputs, use_cache=False))


def generate(
    engine: Any, rows: Dataset, collate_pairs: Any, batch_size: int, *, tokenizer: PreTrainedTokenizerBase, cfg: Config
) -> list[str]:
    """The translation of each row's source, by beam search."""
    return generate_texts(
        engine, rows, collate_pairs, batch_size, tokenizer=tokenizer, max_length=cfg.max_target_length,
        beams=cfg.beams, length_penalty=cfg.length_penalty,
    )  # fmt: skip


def baseline_scores(cfg: Config, texts: tuple[list[str], list[str]], test: Dataset) -> Scores:
    """Of the target of the most similar training source, and of the source itself."""
    nearest = ranks.on_rank0(lambda: baselines.nearest_training_target(*texts, test["source"]))
    written = {"nearest training source's": nearest, "copy of the source": test["source"]}
    return {name: translation_scores(found, test["target"], cfg.bleu_tokenizer) for name, found in written.items()}


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: pairs of texts to token ids.
    splits = load_pairs(cfg)
    texts, test = (splits["train"]["source"], splits["train"]["target"]), splits["test"]
    tokenizers = encoder_decoder.load_tokenizers(cfg, *texts)
    lengths = cfg.max_source_length, cfg.max_target_length
    tokenized = map_rows(splits, tokenize, tokenizers=tokenizers, max_lengths=lengths)
    train = tokenized["train"]
    run.plan(train, splits)

    # Model, optimizer, engine.
    model: Any = load_model(lambda: encoder_decoder.build_model(cfg, tokenizers[1]), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config, encoder_decoder.pretrained_parameters(cfg, model))
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {name: len(rows) for name, rows in tokenized.items()}, notes_on(train), *tokenizers)
    start = encoder_decoder.decoder_start(model)
    collate_pairs = functools.partial(collate, tokenizers=tokenizers, decoder_start=start)

    def evaluate(split: str) -> tuple[dict[str, float], list[str]]:
        how: Any = {"tokenizer": tokenizers[1], "cfg": cfg}
        written = generate(engine, tokenized[split], collate_pairs, run.micro_batch_size, **how)
        return translation_scores(written, splits[split]["target"], cfg.bleu_tokenizer), written

    for step, micro_batches in run.steps(train, collate_pairs, train["length"]):  # this rank's share of a step
        labels, sources = ranks.sum_over_ranks(map(count, micro_batches))
        step_loss = torch.zeros((), device=run.device)
        for batch in micro_batches:
            loss = losses_of(engine, batch, cfg.label_smoothing).sum() / labels
            engine.backward(run.undivided(loss))  # DeepSpeed divides by accumulation steps and data-parallel ranks
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens=labels + sources)
        if run.evaluation_due(step):
            run.log_scores(step, "validation", evaluate("validation")[0], higher_is_better="bleu")

    export(engine, tokenizers[0], run.folder / "model", tokenizers[1])
    scores, translations = evaluate("test")
    run.log_scores(run.total_steps, "test", scores)
    for source, translation in zip(test["source"][:3], translations[:3], strict=True):
        run.say(f"sample   {source} -> {translation}")
    run.say(f"BLEU     {bleu_signature(cfg.bleu_tokenizer)}")
    return run.finish(scores, f"{len(test):,} test rows", baseline_scores(cfg, texts, test))


if __name__ == "__main__":
    cli(main, Config)
