"""Pre-train a decoder that predicts the next token, its layers divided over the ranks of a pipeline.

    ./launch.sh pipeline_lm --ranks 4
    deepspeed --num_accelerators 4 recipes/pipeline_lm.py --deepspeed_config ds_configs/pipeline_lm/zero1.json

It trains what causal_lm trains, with the same losses where the settings that both have are the same; each rank has some
layers only. A mixture of experts is trained without a balance loss. Of 4 ranks in 2 stages, two have the first half of
the layers, and two the second; there are 2 pipelines, and each gets half of a step's rows.

Method: the micro-batches of a step follow each other through the stages, one forward, one backward, so that all stages
work at once (Narayanan et al. 2019, PipeDream, section 3.2, with the weights changed between steps only). With m
micro-batches in p stages, a stage waits for (p - 1) / (m + p - 1) of a step, the bubble (Huang et al. 2019, GPipe,
section 2): many small micro-batches fill the pipeline. `engine.train_batch` is forward, backward and step in one.

Change first: the YAML beside this file, then build_model(), and Stage where a model of yours has another way through.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import IGNORED, Batch
from lib.data.blocks import Blocks, collate_blocks, token_streams
from lib.data.rows import load_rows
from lib.distributed import mesh, ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.distributed.pipeline import check_stages, join_stages
from lib.models import checks, hub, scratch
from lib.models.losses import token_losses
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import baselines
from lib.scores.inference import pipeline_language_model_scores
from lib.settings.config import Betas, LearningRateSchedule, Precision, Seed
from lib.settings.run_settings import RunSettings


@dataclass(kw_only=True)
class Config(RunSettings):
    is_pipeline = True

    model: str | None  # a folder or hub id to go on training; null: from scratch, with the sizes below
    trust_remote_code: bool  # whether code and pickled weights of the model may run; only for sources that you trust
    architecture: str  # transformers' name for it: llama, qwen3, mistral, ...
    vocab_size: PositiveInt  # tokens of the byte-level BPE; at least 257
    hidden_size: PositiveInt  # width of the residual stream; a multiple of num_heads
    intermediate_size: PositiveInt  # width inside the MLPs (architectures that have no such setting use their own)
    num_layers: PositiveInt  # decoder layers; at least one a stage
    num_heads: PositiveInt  # attention heads
    tie_embeddings: bool  # whether the output layer is the transposed input embedding
    dataset: str  # "sotu" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    text_column: str  # the column to read, one document a row
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the weights and the order of the blocks
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # blocks an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training blocks; null: max_steps decide
    max_length: PositiveInt  # tokens a block
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping


class Stage(torch.nn.Module):
    """What one rank computes: a model without the layers of other stages, which pass on what they get."""

    def __init__(self, model: Any, is_first: bool, is_last: bool):
        super().__init__()
        self.model, self.is_first, self.is_last = model, is_first, is_last

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Tokens [rows, length], or the hidden states [rows, length, hidden size] of the stage before -> hidden states,
        or in the end the logits [rows, length, tokens of the vocabulary], in fp32."""
        named = {"input_ids" if self.is_first else "inputs_embeds": inputs, "use_cache": False}
        if self.is_last:
            return self.model(**named).logits.float()
        return self.model.base_model(**named).last_hidden_state


def load_or_train_tokenizer(cfg: Config, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, or a byte-level BPE learned from the training texts."""
    if cfg.model is None:
        return scratch.train_tokenizer(texts, cfg.vocab_size, scratch.END_OF_TEXT)
    return hub.load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)


def build_model(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The decoder, whole, in host memory: pre-trained, or at random."""
    if cfg.model is not None:
        config = hub.load_config(cfg.model, 0.0, cfg.trust_remote_code)
        return hub.load_weights(AutoModelForCausalLM, cfg.model, config, cfg.trust_remote_code)
    config = scratch.new_config(
        cfg.architecture, AutoModelForCausalLM, cfg.num_heads, cfg.hidden_size, vocab_size=len(tokenizer),
        intermediate_size=cfg.intermediate_size, num_hidden_layers=cfg.num_layers, num_key_value_heads=cfg.num_heads,
        max_position_embeddings=cfg.max_length, tie_word_embeddings=cfg.tie_embeddings,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def check_model(model: Any) -> Any:
    """The model, unless it sees the tokens that it is to predict, or cannot be divided into stages."""
    checks.check_causal(model)
    return check_stages(model, mesh.pipeline_size(), Stage)


def for_pipeline(batch: Batch, labels_of_step: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(what the first stage gets, what the last stage gets)"""
    return batch["input_ids"], (batch["labels"], labels_of_step)


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: documents to one stream of tokens a split, to blocks.
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"text": cfg.text_column})
    tokenizer = load_or_train_tokenizer(cfg, splits["train"]["text"])
    streams = token_streams(splits, tokenizer)
    blocks = {name: Blocks(stream, cfg.max_length, drop_last=name == "train") for name, stream in streams.items()}
    run.plan(blocks["train"], splits)

    def loss_of(logits: torch.Tensor, answers: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Of a micro-batch, in the last stage."""
        labels, labels_of_step = answers
        loss = token_losses(logits, labels).sum() / labels_of_step
        return run.undivided(loss)  # DeepSpeed divides by accumulation steps and data-parallel ranks

    # Model, optimizer, engine.
    whole_model = load_model(lambda: check_model(build_model(cfg, tokenizer)), ds_config, cfg.seed)
    model = join_stages(whole_model, Stage, loss_of)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {f"{name} tokens": len(stream) for name, stream in streams.items()}, [], tokenizer)

    def evaluate(split: str) -> dict[str, float]:
        texts = splits[split]["text"]
        return pipeline_language_model_scores(engine, blocks[split], run.micro_batch_size, texts=texts)

    for step, micro_batches in run.steps(blocks["train"], collate_blocks):  # this pipeline's share of a step
        labels = ranks.sum_over_ranks((batch["labels"] != IGNORED).sum() for batch in micro_batches)
        step_loss = engine.train_batch(iter([for_pipeline(batch, labels) for batch in micro_batches]))
        run.log_step(step, step_loss / mesh.data_parallel_size(), tokens=labels)  # all pipelines have the whole loss
        if run.evaluation_due(step):
            run.log_scores(step, "validation", evaluate("validation"), lower_is_better="perplexity")

    export(engine, tokenizer, run.folder / "model")
    scores = evaluate("test")
    run.log_scores(run.total_steps, "test", scores)
    unigram = baselines.unigram(streams["train"], streams["test"], len(tokenizer), splits["test"]["text"])
    return run.finish(scores, f"{len(streams['test']) - 1:,} test tokens", {"unigram": unigram})


if __name__ == "__main__":
    cli(main, Config)
