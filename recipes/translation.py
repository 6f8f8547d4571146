"""Train an encoder-decoder to translate.

    ./launch.sh translation --stage 2
    ./launch.sh translation --model null
    deepspeed --num_accelerators 2 recipes/translation.py --deepspeed_config ds_configs/translation/zero2.json

The default puts a new decoder, with a byte-level BPE of its own, on MiniLM, a pre-trained encoder that stays as it is, and trains that
decoder on 2,500 user-interface messages, English to French. `--model` takes any pre-trained encoder or encoder-decoder, `--decoder` a
pre-trained decoder for the encoder; with `--model null`, a small T5Gemma and one BPE for both languages start from scratch. The
translations are scored beside copies of the source, and beside the translation of the most similar source of the training rows.

Method: minimize the mean of the cross entropy of each target token, given the source and the target tokens before it, with a share of
the probability spread over the vocabulary (label smoothing: Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4); translate
by beam search. Batches are grouped by length, and there is no dropout.

Change first: the YAML beside this file (model, dataset, columns); the model and its texts are in lib/models/encoder_decoder.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import deepspeed
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import IGNORED, training_batches
from lib.data.rows import load_rows, map_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.distributed.repairs import repair_stage0, veto_if_not_finite
from lib.models.encoder_decoder import (
    build_model,
    collator,
    load_tokenizers,
    logits_of,
    pair_notes,
    pretrained_parameters,
    tokenize_pairs,
)
from lib.models.losses import token_losses
from lib.run.checkpoints import Checkpoints
from lib.run.cli import cli
from lib.run.run import Run
from lib.scores import baselines
from lib.scores.evaluation import bleu_signature, check_bleu_tokenizer, translation_scores
from lib.scores.generation import generate_texts
from lib.settings.config import Betas, LengthPenalty, Probability, Seed
from lib.settings.run_settings import RunSettings


@dataclass
class Config(RunSettings):
    model: str | None  # "minilm", a folder or a hub id: an encoder or an encoder-decoder; null: from scratch
    decoder: (
        str | None
    )  # with an encoder as the model: "minilm", a folder or a hub id, whose weights its decoder starts from; null: a new one
    trust_remote_code: (
        bool  # whether code and pickled weights that come with the model may run; only for sources that you trust
    )
    vocab_size: PositiveInt  # tokens of the BPE that is learned, unless the model or the decoder has one for its output; at least 259
    hidden_size: (
        PositiveInt  # width of what starts from scratch; a multiple of num_heads, and of twice that if all does
    )
    intermediate_size: PositiveInt  # width inside its MLPs
    num_layers: PositiveInt  # its layers: of the decoder, and of the encoder if that starts from scratch, too
    num_heads: PositiveInt  # its attention heads
    dataset: str  # "messages_fr", _de, _es, _ja (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    source_column: str  # the column to translate
    target_column: str  # the column with its translation
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the weights and the order of the rows
    precision: Literal["fp32", "bf16", "fp16"]  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # rows an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training rows; null: max_steps decide
    max_source_length: PositiveInt  # tokens; longer texts are truncated and counted
    max_target_length: Annotated[int, Field(ge=2)]  # tokens, also of what is generated
    label_smoothing: Probability  # share of the probability that is spread over the vocabulary
    learning_rate: PositiveFloat  # of all but the weights that `model` brings; the highest, after the warm-up
    pretrained_learning_rate: (
        NonNegativeFloat  # of the weights that `model` brings; 0: they are frozen, which takes less time
    )
    lr_schedule: Literal["linear", "cosine", "constant"]  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: (
        PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which the mean gradient is divided
    )
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    beams: PositiveInt  # of the beam search; 1: greedy
    length_penalty: LengthPenalty  # of a beam search: the higher, the longer its texts; 1: those with the highest mean log probability of a token
    bleu_tokenizer: Literal["13a", "intl", "zh", "char"]  # sacrebleu's, for BLEU: char for Japanese, zh for Chinese


def main(cfg: Config, ds_config: dict[str, Any]) -> dict[str, dict[str, float]]:
    device = ranks.init(cfg.rank_timeout)
    run = Run(cfg, ds_config, __file__)
    micro_batch_size, accumulation_steps = (
        ds_config["train_micro_batch_size_per_gpu"],
        ds_config["gradient_accumulation_steps"],
    )

    # Data: pairs of texts to token ids.
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"source": cfg.source_column, "target": cfg.target_column})
    texts = splits["train"]["source"], splits["train"]["target"]
    check_bleu_tokenizer(cfg.bleu_tokenizer, texts[1])
    source_tokenizer, target_tokenizer = load_tokenizers(cfg, *texts)
    lengths = {"max_source_length": cfg.max_source_length, "max_target_length": cfg.max_target_length}
    tokenized = map_rows(
        splits, tokenize_pairs, source_tokenizer=source_tokenizer, target_tokenizer=target_tokenizer, **lengths
    )
    train = tokenized["train"]
    run.plan(len(train), splits)

    # Model, optimizer, engine.
    model: Any = load_model(lambda: build_model(cfg, target_tokenizer), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config, pretrained_parameters(cfg, model))
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    repair_stage0(engine)
    run.attach(engine)
    run.header(model, {name: len(rows) for name, rows in tokenized.items()}, pair_notes(train))

    collate = collator(model, source_tokenizer, target_tokenizer)

    def evaluate(split: str) -> tuple[dict[str, float], list[str]]:
        translations = generate_texts(
            engine,
            tokenized[split],
            collate,
            micro_batch_size,
            target_tokenizer,
            cfg.max_target_length,
            cfg.beams,
            cfg.length_penalty,
        )
        return translation_scores(translations, splits[split]["target"], cfg.bleu_tokenizer), translations

    checkpoints = Checkpoints(run, engine, schedule)
    done = checkpoints.restore()  # optimizer steps: 0, or those of the checkpoint that --resume found
    batches = training_batches(
        train, collate, cfg.batch_size, micro_batch_size, cfg.seed, device, train["length"], start=done
    )
    for step in run.steps(done):
        micro_batches = next(batches)  # this rank's share of one optimizer step
        learning_rate = schedule.get_last_lr()[0]
        counts = [
            torch.stack([(batch["labels"] != IGNORED).sum(), batch["attention_mask"].sum()]) for batch in micro_batches
        ]
        labels, sources = ranks.all_sum(torch.stack(counts).sum(0))  # tokens over every rank and micro-batch
        step_loss = torch.zeros((), device=device)
        for batch in micro_batches:
            loss = token_losses(logits_of(engine, batch), batch["labels"], cfg.label_smoothing).sum() / labels
            engine.backward(
                veto_if_not_finite(loss) * accumulation_steps * ranks.world_size()
            )  # undoes DeepSpeed's two divisions
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, labels + sources, learning_rate, engine.get_global_grad_norm())
        if run.due(step, cfg.eval_every):
            scores, _ = evaluate("validation")
            run.log_evaluation(step, "validation", scores)
            checkpoints.score(step, scores["bleu"])
        checkpoints.end_step(
            step, micro_batches
        )  # saves when due, or asked to stop; a loss that is not finite has changed no weight

    checkpoints.take_best()
    export(engine, source_tokenizer, run.folder / "model", target_tokenizer)
    scores, translations = evaluate("test")
    run.log_evaluation(run.total_steps, "test", scores)
    test = splits["test"]
    for row in range(min(3, len(test))):
        run.say(f"sample   {test['source'][row]} -> {translations[row]}")
    nearest = ranks.on_rank0(lambda: baselines.nearest_training_target(*texts, test["source"]))
    beside = {
        "nearest training source's": translation_scores(nearest, test["target"], cfg.bleu_tokenizer),
        "copy of the source": translation_scores(test["source"], test["target"], cfg.bleu_tokenizer),
    }
    run.say(f"BLEU     {bleu_signature(cfg.bleu_tokenizer)}")
    run.finish({f"this model, {len(test):,} test rows": scores, **beside})
    return {"model": scores, **beside}


if __name__ == "__main__":
    cli(main, Config)
