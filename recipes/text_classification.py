"""Fine-tune an encoder to classify text.

    ./launch.sh text_classification --stage 2
    deepspeed --num_accelerators 2 recipes/text_classification.py \
        --deepspeed_config ds_configs/text_classification/zero2.json

The default teaches MiniLM (22.7 M parameters) from which of eight Python libraries the first paragraph of a docstring
comes, the libraries' names masked, and compares it with logistic regression on TF-IDF fitted on the same rows.

Method: minimize the cross entropy -log softmax(W h + b)[label] over the encoder and a new linear layer W, b, where h is
the encoder's pooled vector of the first token (Devlin et al. 2019, BERT, section 4.1). Batches are grouped by length,
and there is no dropout unless it is set, so that the losses do not depend on the number of ranks.

Change first: the YAML beside this file (model, dataset, columns), then tokenize(), build_model() and the scores in
evaluate().
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import Batch, pad_tokens
from lib.data.rows import load_rows, map_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.errors import UserError
from lib.models import hub
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import baselines, evaluation, inference
from lib.settings.config import Betas, LearningRateSchedule, Precision, Probability, Seed
from lib.settings.run_settings import RunSettings


@dataclass(kw_only=True)
class Config(RunSettings):
    model: str  # "minilm" (installed with the requirements), a folder, or a Hugging Face hub id
    trust_remote_code: bool  # whether code and pickled weights of the model may run; only for sources that you trust
    dataset: str  # "docstrings" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    text_column: str  # the column to read
    label_column: str  # the column to predict; text, whole numbers, true or false
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the new layer's weights, the order of the rows and the dropout
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # rows an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training rows; null: max_steps decide
    max_length: PositiveInt  # tokens; longer texts are truncated and counted
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    dropout: Probability  # of every dropout in the model; above 0, the losses depend on the number of ranks
    num_layers: PositiveInt | None  # keep only the first layers of the encoder; null: all


def build_model(cfg: Config, label_names: list[str], pad_token_id: int) -> torch.nn.Module:
    """The encoder with a new linear layer on top, whole, in host memory."""
    config = hub.load_config(
        cfg.model, cfg.dropout, cfg.trust_remote_code, pad_token_id=pad_token_id, num_labels=len(label_names),
        id2label=dict(enumerate(label_names)), label2id={name: number for number, name in enumerate(label_names)},
    )  # fmt: skip
    if cfg.num_layers is not None:
        if cfg.num_layers > config.num_hidden_layers:
            raise UserError(
                f"num_layers is {cfg.num_layers}, but the model has {config.num_hidden_layers} layers; "
                "set --num_layers null to keep all"
            )
        config.num_hidden_layers = cfg.num_layers
        # Lists with an entry for each layer, in architectures that have layers of several kinds.
        for name in ("layer_types", "mlp_layer_types", "attention_window"):
            if isinstance(getattr(config, name, None), list):
                setattr(config, name, getattr(config, name)[: cfg.num_layers])
    return hub.load_weights(
        AutoModelForSequenceClassification, cfg.model, config, cfg.trust_remote_code, ignore_mismatched_sizes=True
    )


def tokenize(rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Any]]:
    """Texts -> token ids, their number, and whether each text was truncated; the labels' numbers stay."""
    encoded = tokenizer(rows["text"], truncation=True, max_length=max_length)
    return {
        "input_ids": encoded["input_ids"],
        "labels": rows["label"],
        "length": [len(ids) for ids in encoded["input_ids"]],
        "truncated": [bool(encoding.overflowing) for encoding in encoded.encodings],
    }


def truncation_notes(train: Dataset, max_length: int) -> list[str]:
    truncated = sum(train["truncated"])
    return [f"{truncated:,} training texts truncated to {max_length} tokens"] if truncated else []


def collate(rows: dict[str, list[Any]], pad_token_id: int) -> Batch:
    """Token ids of any lengths -> input_ids and attention_mask [rows, longest], labels [rows]."""
    return pad_tokens(rows["input_ids"], pad_token_id) | {"labels": torch.tensor(rows["labels"])}


def logits_of(engine: Any, batch: Batch) -> torch.Tensor:
    """[rows, label names], in fp32."""
    return engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def evaluate(engine: Any, rows: Dataset, collate_rows: Any, batch_size: int) -> dict[str, float]:
    """Accuracy and macro-F1 over all rows."""
    predicted = inference.for_each_row(
        engine, rows, collate_rows, batch_size, answer=lambda batch: logits_of(engine, batch).argmax(-1),
        lengths=rows["length"],
    )  # fmt: skip
    return evaluation.classification_scores(rows["labels"], predicted.tolist())


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: texts and labels to token ids.
    splits = load_rows(cfg.dataset, cfg.max_rows, text={"text": cfg.text_column}, label={"label": cfg.label_column})
    label_names = splits["train"].features["label"].names
    tokenizer = hub.load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)
    tokenized = map_rows(splits, tokenize, tokenizer=tokenizer, max_length=cfg.max_length)
    train, test = tokenized["train"], tokenized["test"]
    collate_rows = functools.partial(collate, pad_token_id=tokenizer.pad_token_id)
    run.plan(train, splits)

    # Model, optimizer, engine.
    model = load_model(lambda: build_model(cfg, label_names, tokenizer.pad_token_id), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    counts = {name: len(rows) for name, rows in tokenized.items()}
    run.attach(engine, counts, truncation_notes(train, cfg.max_length), tokenizer)

    for step, micro_batches in run.steps(train, collate_rows, train["length"]):  # this rank's share of a step
        tokens = ranks.sum_over_ranks(batch["attention_mask"].sum() for batch in micro_batches)
        step_loss = torch.zeros((), device=run.device)
        for batch in micro_batches:
            loss = F.cross_entropy(logits_of(engine, batch), batch["labels"], reduction="sum") / cfg.batch_size
            engine.backward(run.undivided(loss))  # DeepSpeed divides by accumulation steps and data-parallel ranks
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens)
        if run.evaluation_due(step):
            scores = evaluate(engine, tokenized["validation"], collate_rows, run.micro_batch_size)
            run.log_scores(step, "validation", scores, higher_is_better="macro_f1")

    export(engine, tokenizer, run.folder / "model")
    scores = evaluate(engine, test, collate_rows, run.micro_batch_size)
    run.log_scores(run.total_steps, "test", scores)
    texts = splits["train"]["text"], train["labels"], splits["test"]["text"], test["labels"]
    baseline_scores = {
        "TF-IDF + logistic regression": ranks.on_rank0(lambda: baselines.tfidf_logistic_regression(*texts)),
        "majority class": baselines.majority_class(train["labels"], test["labels"]),
    }
    return run.finish(scores, f"{len(test):,} test rows", baseline_scores)


if __name__ == "__main__":
    cli(main, Config)
