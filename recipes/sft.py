"""Fine-tune a language model on conversations: supervised fine-tuning, or instruction tuning.

    ./launch.sh sft --stage 2
    ./launch.sh chat runs/...
    deepspeed --num_accelerators 2 recipes/sft.py --deepspeed_config ds_configs/sft/zero2.json

The default trains a low-rank adapter for SmolLM2-135M-Instruct on instructions about Python code, and compares it with
the model before. `--lora_rank null` trains all weights; `--model <hub id or folder>` takes another decoder, with its
own chat template.

Method: minimize the mean of -log p(token | the tokens before it in its conversation) over the tokens of the
assistant's answers (Ouyang et al. 2022, InstructGPT, section 3.5), with W x + (alpha / rank) B A x in the place of each
linear layer's W x, where A and B alone learn (Hu et al. 2021, LoRA). The conversations of a micro-batch lie one after
the other in one row, without padding, and do not see each other; there is no dropout.

Change first: the YAML beside this file (model, dataset, columns), then evaluate(); which tokens are answers is found
in lib/data/conversations.py.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data import conversations
from lib.data.batches import Batch
from lib.data.rows import Splits, load_rows, map_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.models import chat, output_layer, packing
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores.answers import answer_scores, conversation_scores, generate_answers, tokenize_prompts
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
    dataset: str  # "instructions" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    prompt_column: str  # the column with conversations (lists of messages), or with the user's prompt
    completion_column: str | None  # the column with the answer to the prompt; null: prompt_column has all messages
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    scored_rows: PositiveInt | None  # rows of the validation and of the test split to score; null: all
    seed: Seed  # of the adapter's weights and the order of the rows
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # conversations an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training conversations; null: max_steps decide
    max_length: PositiveInt  # tokens of a conversation; longer ones are truncated and counted
    packing: bool  # whether the conversations of a micro-batch share a row; false: each has one, with padding
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping
    answer_tokens: PositiveInt  # the longest answer that is generated for the scores


def losses_of(engine: Any, batch: Batch) -> torch.Tensor:
    """The loss of each token in nats, [rows, length]; 0 where it has no label."""
    places = {"position_ids": batch["position_ids"], **packing.lengths_of(engine.module, batch)}
    with output_layer.losses_for(engine.module, batch["labels"]) as losses_in:
        return losses_in(engine(input_ids=batch["input_ids"], use_cache=False, **places))


def load_conversations(cfg: Config) -> Splits:
    """The rows with the column prompt, which has whole conversations if there is no column completion."""
    columns = {"prompt": cfg.prompt_column} | ({"completion": cfg.completion_column} if cfg.completion_column else {})
    return load_rows(cfg.dataset, cfg.max_rows, messages=columns, scored_rows=cfg.scored_rows)


def limits_of(cfg: Config) -> dict[str, Any]:
    """How long a prompt of the test rows and its answer may be, in tokens."""
    return {"max_length": cfg.max_length, "answer_tokens": cfg.answer_tokens}


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: conversations to tokens, of which those of the answers have labels.
    splits = load_conversations(cfg)
    tokenizer = chat.load_tokenizer(cfg, cfg.max_length)
    tokenized = map_rows(splits, conversations.tokenize_conversations, tokenizer=tokenizer, max_length=cfg.max_length)
    prompts = map_rows({"test": splits["test"]}, tokenize_prompts, tokenizer=tokenizer, **limits_of(cfg))
    rows, notes = conversations.with_answers(splits, tokenized)
    run.plan(rows["train"], splits)

    # Model, optimizer, engine.
    model = load_model(lambda: chat.build_model(cfg, tokenizer), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {name: len(part) for name, part in rows.items()}, notes, tokenizer)
    collate = functools.partial(conversations.collate_conversations, packing=cfg.packing)

    def evaluate(split: str) -> dict[str, float]:
        return conversation_scores(engine, rows[split], collate, run.micro_batch_size, losses_of=losses_of)

    def test() -> tuple[dict[str, float], list[str]]:
        written = generate_answers(engine, prompts["test"], tokenizer, run.micro_batch_size, cfg.answer_tokens)
        return answer_scores(written, prompts["test"]["expected"]) | evaluate("test"), written

    before = run.kept(f"scores on {len(rows['test']):,} test conversations", lambda: test()[0])
    in_order = rows["train"]["length"], cfg.packing
    for step, micro_batches in run.steps(rows["train"], collate, *in_order):  # this rank's share of a step
        labels, tokens = ranks.sum_over_ranks(map(conversations.count, micro_batches))
        step_loss = torch.zeros((), device=run.device)
        for batch in micro_batches:
            loss = losses_of(engine, batch).sum() / labels
            engine.backward(run.undivided(loss))  # DeepSpeed divides by accumulation steps and data-parallel ranks
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens=tokens)
        if run.evaluation_due(step):
            run.log_scores(step, "validation", evaluate("validation"), lower_is_better="perplexity")

    export(engine, tokenizer, run.folder / "model")
    scores, answers = test()
    run.log_scores(run.total_steps, "test", scores)
    run.say("\n".join(f"sample   {' '.join(answer.split())}" for answer in answers[:3]))
    return run.finish(scores, f"{len(rows['test']):,} test conversations", {"model before training": before})


if __name__ == "__main__":
    cli(main, Config)
