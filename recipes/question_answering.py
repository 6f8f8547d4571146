"""Fine-tune an encoder to find the answer to a question in a text, or to say that it is not there.

    ./launch.sh question_answering --stage 2
    deepspeed --num_accelerators 2 recipes/question_answering.py \
        --deepspeed_config ds_configs/question_answering/zero2.json

The default teaches MiniLM (22.7 M parameters) to find what a docstring says of a parameter, and compares it with
answering by the first sentence, or by the one that shares most words with the question, and with never answering.

Method: two linear layers give each token a score as the start and as the end of the answer; minimize the mean of their
two cross entropies over the tokens of the question and the text. Where there is no answer, the first token is the right
one (Devlin et al. 2019, BERT, sections 4.2 and 4.3). A long text is read in windows that overlap; the answer is the
span with the highest sum of scores in any window, or none where that of the first token is higher in all. Windows are
grouped by length, and there is no dropout.

Change first: the YAML beside this file (model, dataset, columns), then tokenize() and best_spans().
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
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import Batch, pad, pad_tokens
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
from lib.settings.config import Betas, LearningRateSchedule, Precision, Seed
from lib.settings.run_settings import RunSettings


@dataclass(kw_only=True)
class Config(RunSettings):
    model: str  # "minilm" (installed with the requirements), a folder, or a Hugging Face hub id
    trust_remote_code: bool  # whether code and pickled weights of the model may run; only for sources that you trust
    dataset: str  # "docstring_questions" (built in), a file (.jsonl, SQuAD's .json), a folder of them, or a hub id
    question_column: str  # the column with the questions
    context_column: str  # the column with the texts that have the answers
    answers_column: str  # the column with the answers, as in SQuAD: {"text": [...], "answer_start": [...]}
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the new layers' weights and the order of the windows
    precision: Precision  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # windows an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training windows; null: max_steps decide
    max_length: PositiveInt  # tokens of a window, with the question
    stride: PositiveInt  # tokens that two windows of a text share
    max_answer_length: PositiveInt  # tokens of an answer that is given
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: LearningRateSchedule  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which it divides
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping


def build_model(cfg: Config) -> torch.nn.Module:
    """The encoder with its two new layers, whole, in host memory."""
    config = hub.load_config(cfg.model, 0.0, cfg.trust_remote_code)
    return hub.load_weights(AutoModelForQuestionAnswering, cfg.model, config, cfg.trust_remote_code)


def tokenize(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> dict[str, list[Any]]:
    """Questions and contexts -> windows of a context: input_ids, token_type_ids, length; the number of the row; the
    first and last token of the context, and as start and end those of the answer (see answer_tokens); the characters
    that each token stands for.
    """
    longest = max(len(ids) for ids in tokenizer(rows["question"])["input_ids"])
    special = tokenizer.num_special_tokens_to_add(pair=True) - tokenizer.num_special_tokens_to_add()
    if longest + special + stride >= max_length:
        raise UserError(
            f"a question has {longest} tokens, which leaves no room for a text in max_length {max_length} with stride "
            f"{stride}; set a larger one"
        )
    encoded = tokenizer(
        rows["question"], rows["context"], truncation="only_second", max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_token_type_ids=True, return_offsets_mapping=True,
    )  # fmt: skip
    windows: dict[str, list[Any]] = {name: encoded[name] for name in ("input_ids", "token_type_ids")}
    windows |= {name: [] for name in ("row", "length", "first", "last", "start", "end")}
    row_numbers, windows["characters"] = encoded["overflow_to_sample_mapping"], encoded["offset_mapping"]
    for window, (row, characters) in enumerate(zip(row_numbers, windows["characters"], strict=True)):
        context = [place for place, part in enumerate(encoded.sequence_ids(window)) if part == 1]
        if not context:
            raise UserError(
                f"question {rows['question'][row]!r}: the model's tokenizer leaves nothing of its context; "
                "take that row out"
            )
        start, end = answer_tokens(rows["answers"][row], context, characters)
        found = {"row": rows["row"][row], "length": len(characters), "first": context[0], "last": context[-1]}
        for name, value in (found | {"start": start, "end": end}).items():
            windows[name].append(value)
    return windows


def answer_tokens(
    answers: dict[str, list[Any]], context: list[int], characters: list[tuple[int, int]]
) -> tuple[int, int]:
    """The first and last token of a row's first answer; (0, 0) if it has none, or not whole in this window."""
    if not answers["text"]:
        return 0, 0
    text = answers["text"][0]
    begins = answers["answer_start"][0] + len(text) - len(text.lstrip())  # tokens may lack the space around them
    ends = begins + len(text.strip())
    if begins < characters[context[0]][0] or characters[context[-1]][1] < ends:
        return 0, 0
    start = min(place for place in context if characters[place][1] > begins)
    return start, max(place for place in context if characters[place][0] < ends)  # a character may have several tokens


def collate(windows: dict[str, list[Any]], pad_token_id: int, has_types: bool) -> Batch:
    """Windows -> input_ids, attention_mask, perhaps token_type_ids [rows, longest]; start, end, first, last [rows]."""
    types = {"token_type_ids": pad(windows["token_type_ids"], 0)} if has_types else {}
    places = {name: torch.tensor(windows[name]) for name in ("start", "end", "first", "last")}
    return pad_tokens(windows["input_ids"], pad_token_id) | types | places


def scores_of(engine: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of each token as the start and as the end, [rows, longest], in fp32; those of padding are -inf."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    output = engine(**{name: batch[name] for name in names if name in batch})
    scores = torch.stack([output.start_logits, output.end_logits]).float()
    starts, ends = scores.masked_fill(batch["attention_mask"] == 0, -torch.inf)
    return starts, ends


def sum_of_losses(starts: torch.Tensor, ends: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The cross entropies of all windows' first and last tokens."""
    of_starts = F.cross_entropy(starts, batch["start"], reduction="sum")
    return of_starts + F.cross_entropy(ends, batch["end"], reduction="sum")


def score(answers: list[str], rows: Dataset) -> dict[str, float]:
    return evaluation.question_answering_scores(answers, [found["text"] for found in rows["answers"]])


def baseline_scores(test: Dataset) -> Scores:
    pairs = zip(test["question"], test["context"], strict=True)
    answers = {
        "always none": [""] * len(test),
        "longest overlap": [baselines.longest_overlap(question, context) for question, context in pairs],
        "first sentence": [baselines.first_sentence(context) for context in test["context"]],
    }
    return {name: score(given, test) for name, given in answers.items()}


def best_spans(engine: Any, batch: Batch, max_answer_length: int) -> torch.Tensor:
    """For each window the score of no answer, that of the best answer, and its first and last token: [rows, 4]."""
    starts, ends = scores_of(engine, batch)
    place = torch.arange(starts.shape[1], device=starts.device)
    outside = (place < batch["first"].unsqueeze(1)) | (place > batch["last"].unsqueeze(1))
    too_long = (place > place.unsqueeze(1) + max_answer_length - 1) | (place < place.unsqueeze(1))  # [start, end]
    sums = starts.masked_fill(outside, -torch.inf).unsqueeze(2) + ends.masked_fill(outside, -torch.inf).unsqueeze(1)
    best, span = sums.masked_fill(too_long, -torch.inf).flatten(1).max(1)
    return torch.stack([starts[:, 0] + ends[:, 0], best, span // len(place), span % len(place)], dim=1)


def predict(
    engine: Any, rows: Dataset, windows: Dataset, collate_windows: Any, *, cfg: Config, batch_size: int
) -> list[str]:
    """The answer to the question of each row, "" for none."""

    def spans_of(batch: Batch) -> torch.Tensor:
        return best_spans(engine, batch, cfg.max_answer_length)

    spans = inference.for_each_row(
        engine, windows, collate_windows, batch_size, answer=spans_of, lengths=windows["length"]
    ).tolist()
    none, best, answers = [float("inf")] * len(rows), [-float("inf")] * len(rows), [""] * len(rows)
    contexts, of_windows = rows["context"], zip(spans, windows["row"], windows["characters"], strict=True)
    for (no_answer, score, first, last), row, characters in of_windows:
        none[row] = min(none[row], no_answer)
        if score > best[row]:
            best[row], answers[row] = score, contexts[row][characters[int(first)][0] : characters[int(last)][1]]
    return [answer if best[row] > none[row] else "" for row, answer in enumerate(answers)]


def main(cfg: Config, ds_config: dict[str, Any]) -> Scores:
    run = Run(cfg, ds_config, __file__)

    # Data: questions and contexts to windows of token ids.
    columns = {"context": cfg.context_column, "question": cfg.question_column}  # rows of one context are in one split
    splits = load_rows(cfg.dataset, cfg.max_rows, text=columns, answers={"answers": cfg.answers_column})
    numbered = {name: rows.add_column("row", list(range(len(rows)))) for name, rows in splits.items()}
    tokenizer = hub.load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)
    windows = map_rows(numbered, tokenize, tokenizer=tokenizer, max_length=cfg.max_length, stride=cfg.stride)
    train = windows["train"].remove_columns("characters")  # which only answers are made from
    has_types = "token_type_ids" in tokenizer.model_input_names
    collate_windows = functools.partial(collate, pad_token_id=tokenizer.pad_token_id, has_types=has_types)
    run.plan(train, splits)

    # Model, optimizer, engine.
    model = load_model(lambda: build_model(cfg), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    run.attach(engine, {f"{name} windows": len(rows) for name, rows in windows.items()}, [], tokenizer)

    def evaluate(split: str) -> dict[str, float]:
        sizes: Any = {"cfg": cfg, "batch_size": run.micro_batch_size}
        answers = predict(engine, splits[split], windows[split], collate_windows, **sizes)
        return score(answers, splits[split])

    for step, micro_batches in run.steps(train, collate_windows, train["length"]):  # this rank's share of a step
        tokens = ranks.sum_over_ranks(batch["attention_mask"].sum() for batch in micro_batches)
        step_loss = torch.zeros((), device=run.device)
        for batch in micro_batches:
            loss = sum_of_losses(*scores_of(engine, batch), batch) / (2 * cfg.batch_size)  # starts and ends
            engine.backward(run.undivided(loss))  # DeepSpeed divides by accumulation steps and data-parallel ranks
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens)
        if run.evaluation_due(step):
            run.log_scores(step, "validation", evaluate("validation"), higher_is_better="f1")

    export(engine, tokenizer, run.folder / "model")
    scores = evaluate("test")
    run.log_scores(run.total_steps, "test", scores)
    return run.finish(scores, f"{len(splits['test']):,} test rows", baseline_scores(splits["test"]))


if __name__ == "__main__":
    cli(main, Config)
