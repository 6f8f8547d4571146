"""Teach a language model preferences: direct preference optimization.

    ./launch.sh dpo --stage 2
    ./launch.sh dpo --model runs/.../model
    deepspeed --num_accelerators 2 recipes/dpo.py --deepspeed_config ds_configs/dpo/zero2.json

The default trains a low-rank adapter for SmolLM2-135M-Instruct on pairs of answers about Python code, constructed so
that one is better (lib/data/samples.py). `--model` takes any decoder with a chat template, such as what sft.py has
trained; `--lora_rank null` trains all weights. It is compared with trivial rules, and with the model before.

Method: minimize the mean of -log sigmoid(beta m) over pairs of a chosen and a rejected answer (Rafailov et al. 2023,
Direct Preference Optimization, equation 7), where m = log p(chosen) / p_0(chosen) - log p(rejected) / p_0(rejected)
and p_0 is the model before training, whose log-probabilities are computed once, before the first step. `--method ipo`
minimizes the mean of (m - 1 / (2 beta))^2 (Azar et al. 2023, IPO, equation 17). There is no dropout.

Change first: the YAML beside this file (model, dataset, beta), then preference_losses().
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data import conversations, preferences
from lib.data.batches import Batch, rows_of_steps
from lib.data.rows import Splits, load_rows, map_rows
from lib.distributed import mesh, ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.models import chat, output_layer, packing
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import baselines
from lib.scores.answers import preference_scores
from lib.scores.inference import for_each_row
from lib.settings.config import Betas, LearningRateSchedule, Precision, Seed, Text
from lib.settings.run_settings import RunSettings


@dataclass(kw_only=True)
class Config(RunSettings):
    model: str  # "smollm2" (installed with the requirements), a folder, or a Hugging Face hub id
    trust_remote_code: bool  # whether code and pickled weights of the model may run; only for sources that you trust
    chat_template: str | None  # "chatml", "plain" or a Jinja file; null: the tokenizer's own
    lora_rank: PositiveInt | None  # rank of the adapter's matrices; null: all weights learn, without an adapter
    lora_alpha: PositiveFloat  # the adapter's output is multiplied by lora_alpha / lora_rank
    lora_targets: Text  # layers that get an adapter: "all-linear", or names with commas, such as q_proj,v_proj
    method: Literal["dpo", "ipo"]  # the loss
    beta: PositiveFloat  # the greater, the closer it stays to the model before
    dataset: str  # "preferences" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    prompt_column: str | None  # the prompt, text or messages; null: the other columns have whole conversations
    chosen_column: str  # the better answer
    rejected_column: str  # the worse answer
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    scored_rows: PositiveInt | None  # rows of the validation and of the test split to score; null: all
    seed: Seed  # of the adapter's weights and the order of the rows
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # pairs an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training pairs; null: max_steps decide
    max_length: PositiveInt  # tokens of a prompt and an answer; longer ones are truncated and counted
    packing: bool  # whether the answers of a micro-batch share a row; false: each has one, with padding
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping


def log_probabilities(engine: Any, batch: Batch, pairs: int) -> torch.Tensor:
    """[pairs, 2]: of the chosen and of the rejected answer, the sum over its tokens of log p(token | those before)."""
    places = {"position_ids": batch["position_ids"], **packing.lengths_of(engine.module, batch)}
    with output_layer.losses_for(engine.module, batch["labels"]) as losses_in:
        losses = losses_in(engine(input_ids=batch["input_ids"], use_cache=False, **places))
    sums = -conversations.sums_of_conversations(losses, batch, 2 * pairs).view(pairs, 2)
    return mesh.differentiable_sum_over_sequence(sums) if engine.module.training else sums


def margins(found: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[pairs]: how much more likely the chosen answer has become than the rejected one; both arguments [pairs, 2]."""
    chosen, rejected = (found - reference).unbind(1)
    return chosen - rejected


def preference_losses(cfg: Config, margin: torch.Tensor) -> torch.Tensor:
    """[pairs]: the loss of each pair with this margin."""
    if cfg.method == "ipo":
        return (margin - 1 / (2 * cfg.beta)) ** 2
    return -F.logsigmoid(cfg.beta * margin)


def load_pairs(cfg: Config) -> Splits:
    """The rows with the columns chosen, rejected and, if there is one, prompt."""
    columns = {"prompt": cfg.prompt_column, "chosen": cfg.chosen_column, "rejected": cfg.rejected_column}
    messages = {name: column for name, column in columns.items() if column is not None}
    return load_rows(cfg.dataset, cfg.max_rows, messages=messages, scored_rows=cfg.scored_rows)


def of_all(engine: Any, rows: Dataset, collate: Any, pairs: int, what: str = "evaluating") -> torch.Tensor:
    """[rows, 2]: the log-probabilities of all pairs, `pairs` at a time. Every rank must call it."""
    answer = functools.partial(log_probabilities, engine, pairs=pairs)
    return for_each_row(engine, rows, collate, pairs, answer=answer, lengths=rows["length"], what=what)


def before_training(run: Run, engine: Any, rows: Dataset, collate: Any, split: str) -> torch.Tensor:
    """[rows, 2]: the log-probabilities of the pairs by the model before training; NaN of pairs that no step takes."""
    count = len(rows)
    if split == "train":
        needed = rows_of_steps(run.total_steps, count, run.cfg.batch_size, run.cfg.seed)
    else:
        needed = np.arange(count)
    what = f"log-probabilities of {len(needed):,} {split} pairs"
    found = run.kept(
        what, lambda: of_all(engine, rows.select(needed), collate, run.micro_batch_size, f"{what} before").tolist()
    )
    reference = torch.full((count, 2), torch.nan)
    reference[torch.from_numpy(needed)] = torch.tensor(found)
    return reference.to(run.device)


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: pairs of conversations to tokens, of which those of the last answers have labels.
    splits = load_pairs(cfg)
    tokenizer = chat.load_tokenizer(cfg, cfg.max_length)
    tokenized = map_rows(splits, preferences.tokenize_pairs, tokenizer=tokenizer, max_length=cfg.max_length)
    rows, notes = conversations.with_answers(splits, tokenized)
    run.plan(rows["train"], splits)

    # Model, optimizer, engine.
    model = load_model(lambda: chat.build_model(cfg, tokenizer), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {name: len(part) for name, part in rows.items()}, notes, tokenizer)
    collate = functools.partial(preferences.collate_pairs, packing=cfg.packing)
    used = {split: part for split, part in rows.items() if split != "validation" or cfg.eval_every}
    reference = {split: before_training(run, engine, part, collate, split) for split, part in used.items()}
    train = preferences.with_reference(rows["train"], reference["train"])

    def evaluate(split: str) -> dict[str, float]:
        found = of_all(engine, rows[split], collate, run.micro_batch_size)
        return preference_scores(found, reference[split], cfg.beta)

    share = cfg.batch_size * mesh.sequence_size()  # ranks that share rows all have the losses of these
    for step, micro_batches in run.steps(train, collate, train["length"], cfg.packing):  # this rank's share of a step
        _, tokens = ranks.sum_over_ranks(map(conversations.count, micro_batches))
        totals = torch.zeros(2, device=run.device)
        for batch in micro_batches:
            margin = margins(log_probabilities(engine, batch, run.micro_batch_size), batch["reference"])
            loss = preference_losses(cfg, margin).sum() / share
            engine.backward(run.undivided(loss))  # DeepSpeed divides by accumulation steps and data-parallel ranks
            engine.step()  # changes the weights after the last micro-batch only
            totals += torch.stack([loss.detach(), (margin > 0).sum() / share])
        run.log_step(step, totals[0], tokens=tokens, reward_accuracy=totals[1])
        if run.evaluation_due(step):
            run.log_scores(step, "validation", evaluate("validation"), higher_is_better="reward_accuracy")

    export(engine, tokenizer, run.folder / "model")
    scores = evaluate("test")
    run.log_scores(run.total_steps, "test", scores)
    rules = baselines.preference_rules(rows["test"], reference["test"])
    return run.finish(scores, f"{len(rows['test']):,} test pairs", rules)


if __name__ == "__main__":
    cli(main, Config)
