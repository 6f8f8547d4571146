"""Train a language model to summarize.

    ./launch.sh summarization --stage 2
    deepspeed --num_accelerators 2 recipes/summarization.py --deepspeed_config ds_configs/summarization/zero2.json

The default goes on training all weights of SmolLM2-135M-Instruct, which is asked to summarize the rest of a docstring
and answers with its first paragraph, mostly a sentence. `--model` takes any decoder with a chat template, `--lora_rank
16` trains a low-rank adapter instead. The summaries are scored beside those of the model before training, the lead
sentence, and the summary of the most similar text of the training rows. (For an encoder-decoder such as T5 or BART, see
translation.py, which takes a column of texts and one of summaries as well.)

Method: minimize the mean of -log p(token | instruction, text and the tokens of the summary before it) over the tokens
of the summary (Radford et al. 2018, GPT, section 3.3: a task as text); write greedily. The rows of a micro-batch lie
one after the other, without padding, and do not see each other; there is no dropout.

Change first: the YAML beside this file (model, dataset, columns, instruction), then tokenize().
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from datasets import Dataset
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data import conversations
from lib.data.batches import Batch
from lib.data.rows import load_rows, map_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.models import chat, output_layer, packing
from lib.run.cli import cli
from lib.run.result import Scores
from lib.run.run import Run
from lib.scores import baselines
from lib.scores.answers import generate_answers
from lib.scores.evaluation import rouge_tokens, summarization_scores
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
    dataset: str  # "docstring_pairs" (built in), a file (.jsonl, .csv, .parquet, ...), a folder of them, or a hub id
    text_column: str  # the column to summarize
    summary_column: str  # the column with its summary
    instruction: Text  # what the model is asked to do with each text, which follows it
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    scored_rows: PositiveInt | None  # rows of the validation and of the test split to score; null: all
    seed: Seed  # of the order of the rows, and of the weights that start at random
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # rows an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training rows; null: max_steps decide
    max_source_length: PositiveInt  # tokens; longer texts are truncated and counted
    max_target_length: PositiveInt  # tokens, also of what is generated
    packing: bool  # whether the rows of a micro-batch lie in one; false: each is one of its own, with padding
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping


def tokenize(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, instruction: str, max_lengths: tuple[int, int]
) -> dict[str, list[Any]]:
    """Columns source and target -> input_ids, labels, length, labelled; prompt_ids; what notes_on counts.

    A truncated summary lacks its end token, or the model would learn to stop there.
    """
    names = ("input_ids", "labels", "length", "labelled", "prompt_ids", "source_truncated", "target_truncated")
    found: dict[str, list[Any]] = {name: [] for name in names}
    encoded = tokenizer(rows["source"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for source, target, places in zip(rows["source"], rows["target"], encoded["offset_mapping"], strict=True):
        text = source[: places[: max_lengths[0]][-1][1]] if places else source
        request = {"role": "user", "content": f"{instruction}\n\n{text}"}
        answer = {"role": "assistant", "content": target}
        ((whole, spans),) = conversations.answers_in(tokenizer, [request, answer])
        input_ids, labels, _ = conversations.tokens_and_labels(tokenizer, whole, spans, sys.maxsize)
        first = next(place for place, label in enumerate(labels) if label >= 0)
        end = first + max_lengths[1]
        found["prompt_ids"].append(input_ids[: first + 1])
        found["input_ids"].append(input_ids[:end])
        found["labels"].append(labels[:end])
        found["length"].append(len(found["labels"][-1]))
        found["labelled"].append(sum(label >= 0 for label in labels[:end]))
        found["source_truncated"].append(len(places) > max_lengths[0])
        found["target_truncated"].append(any(label >= 0 for label in labels[end:]))
    return found


def notes_on(train: Dataset) -> list[str]:
    """What the header says of truncated training rows."""
    sources, targets = (sum(train[name]) for name in ("source_truncated", "target_truncated"))
    truncated = f"truncated: {sources:,} texts and {targets:,} summaries of {len(train):,} training pairs"
    return [truncated] if sources or targets else []


def losses_of(engine: Any, batch: Batch) -> torch.Tensor:
    """The loss of each token in nats, [rows, length]; 0 where it has no label."""
    places = {"position_ids": batch["position_ids"], **packing.lengths_of(engine.module, batch)}
    with output_layer.losses_for(engine.module, batch["labels"]) as losses_in:
        return losses_in(engine(input_ids=batch["input_ids"], use_cache=False, **places))


def baseline_scores(before: dict[str, float], texts: tuple[list[str], list[str]], test: Dataset) -> Scores:
    """Of the model before training, the target of the most similar training source, and the text's first sentence."""
    nearest = ranks.on_rank0(lambda: baselines.nearest_training_target(*texts, test["source"]))
    lead = [baselines.first_sentence(text) for text in test["source"]]
    written = {"nearest training text's": nearest, "lead sentence": lead}
    scores = {name: summarization_scores(found, test["target"]) for name, found in written.items()}
    return {"model before training": before, **scores}


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: texts and summaries to conversations of tokens, of which those of the summaries have labels.
    columns = {"source": cfg.text_column, "target": cfg.summary_column}
    splits = load_rows(cfg.dataset, cfg.max_rows, text=columns, scored_rows=cfg.scored_rows)
    texts, test = (splits["train"]["source"], splits["train"]["target"]), splits["test"]
    limits = cfg.max_source_length, cfg.max_target_length
    tokenizer = chat.load_tokenizer(cfg, sum(limits), "max_source_length")
    rows = map_rows(splits, tokenize, tokenizer=tokenizer, instruction=cfg.instruction, max_lengths=limits)
    run.plan(rows["train"], splits)

    # Model, optimizer, engine.
    model = load_model(lambda: chat.build_model(cfg, tokenizer), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {name: len(part) for name, part in rows.items()}, notes_on(rows["train"]), tokenizer)
    collate = functools.partial(conversations.collate_conversations, packing=cfg.packing)

    def evaluate(split: str) -> tuple[dict[str, float], list[str]]:
        written = generate_answers(engine, rows[split], tokenizer, run.micro_batch_size, cfg.max_target_length)
        return summarization_scores(written, splits[split]["target"]), written

    before = run.kept(f"scores on {len(test):,} test rows", lambda: evaluate("test")[0])
    train, lengths = rows["train"], rows["train"]["length"]
    for step, micro_batches in run.steps(train, collate, lengths, cfg.packing):  # this rank's share of a step
        labels, tokens = ranks.sum_over_ranks(map(conversations.count, micro_batches))
        step_loss = torch.zeros((), device=run.device)
        for batch in micro_batches:
            loss = losses_of(engine, batch).sum() / labels
            engine.backward(run.undivided(loss))  # DeepSpeed divides by accumulation steps and data-parallel ranks
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens=tokens)
        if run.evaluation_due(step):
            run.log_scores(step, "validation", evaluate("validation")[0], higher_is_better="rouge1")

    export(engine, tokenizer, run.folder / "model")
    scores, summaries = evaluate("test")
    run.log_scores(run.total_steps, "test", scores)
    for summary, target in zip(summaries[:3], test["target"][:3], strict=True):
        run.say(f"sample   {summary}  (was: {target})")
    run.say(f"ROUGE    over {rouge_tokens(test['target'])}")
    return run.finish(scores, f"{len(test):,} test rows", baseline_scores(before, texts, test))


if __name__ == "__main__":
    cli(main, Config)
