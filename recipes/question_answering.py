"""Fine-tune an encoder to find the answer to a question in a text, or to say that it is not there.

    ./launch.sh question_answering --stage 2
    deepspeed --num_accelerators 2 recipes/question_answering.py --deepspeed_config ds_configs/question_answering/zero2.json

The default teaches MiniLM (22.7 M parameters) to find what a docstring says of a parameter, and compares it with answering by the
first sentence, or by the one that shares most words with the question, and with never answering.

Method: two linear layers give each token a score as the start and as the end of the answer; minimize the mean of their two cross
entropies over the tokens of the question and the text. Where there is no answer, the first token is the right one (Devlin et al. 2019,
BERT, sections 4.2 and 4.3). A long text is read in windows that overlap; the answer is the span with the highest sum of scores in any
window, or none where that of the first token is higher in all. Windows are grouped by length, and there is no dropout.

Change first: the YAML beside this file (model, dataset, columns), then tokenize() and best_spans().
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plain launcher starts in recipes/
from lib.data.batches import Batch, pad, pad_tokens, training_batches
from lib.data.rows import load_rows, map_rows
from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw, make_schedule
from lib.distributed.repairs import repair_stage0, veto_if_not_finite
from lib.errors import UserError
from lib.models.hub import load_config, load_tokenizer, load_weights
from lib.run.checkpoints import Checkpoints
from lib.run.cli import cli
from lib.run.run import Run
from lib.scores import baselines, inference
from lib.scores.evaluation import question_answering_scores
from lib.settings.config import Betas, Seed
from lib.settings.run_settings import RunSettings


@dataclass
class Config(RunSettings):
    model: str  # "minilm" (installed with the requirements), a folder, or a Hugging Face hub id
    trust_remote_code: (
        bool  # whether code and pickled weights that come with the model may run; only for sources that you trust
    )
    dataset: (
        str  # "docstring_questions" (built in), a file (.jsonl, .parquet, SQuAD's .json), a folder of them, or a hub id
    )
    question_column: str  # the column with the questions
    context_column: str  # the column with the texts that have the answers
    answers_column: str  # the column with the answers, as in SQuAD: {"text": [...], "answer_start": [...]}
    max_rows: PositiveInt | None  # rows to take of each split, drawn at random; null: all
    seed: Seed  # of the new layers' weights and the order of the windows
    precision: Literal["fp32", "bf16", "fp16"]  # of the forward and backward pass; the optimizer's is always fp32
    batch_size: PositiveInt  # windows an optimizer step, over all ranks
    max_steps: PositiveInt | None  # optimizer steps; null: epochs decide
    epochs: PositiveFloat | None  # passes over the training windows; null: max_steps decide
    max_length: PositiveInt  # tokens of a window, with the question
    stride: PositiveInt  # tokens that two windows of a text share
    max_answer_length: PositiveInt  # tokens of an answer that is given
    learning_rate: PositiveFloat  # the highest, after the warm-up
    lr_schedule: Literal["linear", "cosine", "constant"]  # what the learning rate does after the warm-up
    warmup_steps: NonNegativeInt  # optimizer steps over which the learning rate rises from 0
    weight_decay: NonNegativeFloat  # of matrices and embeddings, not of biases and norms
    adam_betas: Betas  # of AdamW: how much each step keeps of the mean gradient and of the mean squared gradient
    adam_eps: (
        PositiveFloat  # of AdamW: added to the root of the mean squared gradient, by which the mean gradient is divided
    )
    gradient_clipping: NonNegativeFloat  # highest norm of the gradient; 0: no clipping


def build_model(cfg: Config) -> torch.nn.Module:
    """The encoder with its two new layers, whole, in host memory."""
    return load_weights(
        AutoModelForQuestionAnswering,
        cfg.model,
        load_config(cfg.model, 0.0, cfg.trust_remote_code),
        cfg.trust_remote_code,
    )


def tokenize(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> dict[str, list[Any]]:
    """Questions and contexts -> windows: input_ids, token_type_ids, their length; the row that each is of; the first and last token of the
    context in it, the characters that each token stands for; start and end, the answer's first and last token (0, 0: not in this window)."""
    longest = max(len(ids) for ids in tokenizer(rows["question"])["input_ids"])
    if (
        longest + tokenizer.num_special_tokens_to_add(pair=True) - tokenizer.num_special_tokens_to_add() + stride
        >= max_length
    ):
        raise UserError(
            f"a question has {longest} tokens, which leaves no room for a text in max_length {max_length} with stride {stride}; set a larger one"
        )
    encoded = tokenizer(
        rows["question"], rows["context"], truncation="only_second", max_length=max_length, stride=stride, return_overflowing_tokens=True,
        return_token_type_ids=True, return_offsets_mapping=True,
    )  # fmt: skip
    windows: dict[str, list[Any]] = {
        "input_ids": encoded["input_ids"],
        "token_type_ids": encoded["token_type_ids"],
        "characters": encoded["offset_mapping"],
    }
    for name in ("row", "length", "first", "last", "start", "end"):
        windows[name] = []
    for window, (row, characters) in enumerate(
        zip(encoded["overflow_to_sample_mapping"], encoded["offset_mapping"], strict=True)
    ):
        context = [place for place, part in enumerate(encoded.sequence_ids(window)) if part == 1]
        if not context:
            raise UserError(
                f"question {rows['question'][row]!r}: the model's tokenizer leaves nothing of its context; take that row out"
            )
        first, last = context[0], context[-1]
        answers, start, end = rows["answers"][row], 0, 0
        if answers["text"]:
            text = answers["text"][0]
            begins = (
                answers["answer_start"][0] + len(text) - len(text.lstrip())
            )  # tokens may lack the space around them
            ends = begins + len(text.strip())
            if characters[first][0] <= begins and ends <= characters[last][1]:
                start = min(place for place in context if characters[place][1] > begins)
                end = max(
                    place for place in context if characters[place][0] < ends
                )  # a character may have several tokens
        for name, value in (
            ("row", rows["row"][row]),
            ("length", len(characters)),
            ("first", first),
            ("last", last),
            ("start", start),
            ("end", end),
        ):
            windows[name].append(value)
    return windows


def collate(windows: dict[str, list[Any]], pad_token_id: int, has_types: bool) -> Batch:
    """Windows -> input_ids, attention_mask, perhaps token_type_ids [rows, longest]; start, end, first, last [rows]."""
    types = {"token_type_ids": pad(windows["token_type_ids"], 0)} if has_types else {}
    places = {name: torch.tensor(windows[name]) for name in ("start", "end", "first", "last")}
    return pad_tokens(windows["input_ids"], pad_token_id) | types | places


def scores_of(engine: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token as the start and as the end, [rows, longest], in fp32; -inf for padding, so that it takes no part."""
    output = engine(
        **{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    )
    padding = batch["attention_mask"] == 0
    return output.start_logits.float().masked_fill(padding, -torch.inf), output.end_logits.float().masked_fill(
        padding, -torch.inf
    )


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
    engine: Any, rows: Dataset, windows: Dataset, collate_windows: Any, cfg: Config, batch_size: int
) -> list[str]:
    """The answer to the question of each row, "" for none."""
    spans = inference.for_each_row(
        engine,
        windows,
        collate_windows,
        batch_size,
        lambda batch: best_spans(engine, batch, cfg.max_answer_length),
        windows["length"],
    ).tolist()
    none, best, answers = [float("inf")] * len(rows), [-float("inf")] * len(rows), [""] * len(rows)
    contexts = rows["context"]
    for (no_answer, score, first, last), row, characters in zip(
        spans, windows["row"], windows["characters"], strict=True
    ):
        none[row] = min(none[row], no_answer)
        if score > best[row]:
            best[row], answers[row] = score, contexts[row][characters[int(first)][0] : characters[int(last)][1]]
    return [answer if best[row] > none[row] else "" for row, answer in enumerate(answers)]


def main(cfg: Config, ds_config: dict[str, Any]) -> dict[str, dict[str, float]]:
    device = ranks.init(cfg.rank_timeout)
    run = Run(cfg, ds_config, __file__)
    micro_batch_size, accumulation_steps = (
        ds_config["train_micro_batch_size_per_gpu"],
        ds_config["gradient_accumulation_steps"],
    )

    # Data: questions and contexts to windows of token ids.
    columns = {"context": cfg.context_column, "question": cfg.question_column}  # rows of one context are in one split
    splits = load_rows(cfg.dataset, cfg.max_rows, text=columns, answers={"answers": cfg.answers_column})
    numbered = {name: rows.add_column("row", list(range(len(rows)))) for name, rows in splits.items()}
    tokenizer = load_tokenizer(cfg.model, cfg.max_length, cfg.trust_remote_code)
    windows = map_rows(numbered, tokenize, tokenizer=tokenizer, max_length=cfg.max_length, stride=cfg.stride)
    train = windows["train"].remove_columns("characters")  # which only answers are made from
    collate_windows = functools.partial(
        collate, pad_token_id=tokenizer.pad_token_id, has_types="token_type_ids" in tokenizer.model_input_names
    )
    run.plan(len(train), splits)

    # Model, optimizer, engine.
    model = load_model(lambda: build_model(cfg), ds_config, cfg.seed)
    optimizer = make_adamw(cfg, model, ds_config)
    schedule = make_schedule(cfg, optimizer, run.total_steps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
    repair_stage0(engine)
    run.attach(engine)
    run.header(model, {f"{name} windows": len(rows) for name, rows in windows.items()})

    def evaluate(split: str) -> dict[str, float]:
        answers = predict(engine, splits[split], windows[split], collate_windows, cfg, micro_batch_size)
        return question_answering_scores(answers, [found["text"] for found in splits[split]["answers"]])

    checkpoints = Checkpoints(run, engine, schedule)
    done = checkpoints.restore()  # optimizer steps: 0, or those of the checkpoint that --resume found
    batches = training_batches(
        train, collate_windows, cfg.batch_size, micro_batch_size, cfg.seed, device, train["length"], start=done
    )
    for step in run.steps(done):
        micro_batches = next(batches)  # this rank's share of one optimizer step
        learning_rate = schedule.get_last_lr()[0]
        tokens = ranks.all_sum(
            torch.stack([batch["attention_mask"].sum() for batch in micro_batches]).sum()
        )  # of all ranks
        step_loss = torch.zeros((), device=device)
        for batch in micro_batches:
            starts, ends = scores_of(engine, batch)
            both = F.cross_entropy(starts, batch["start"], reduction="sum") + F.cross_entropy(
                ends, batch["end"], reduction="sum"
            )
            loss = both / (2 * cfg.batch_size)
            engine.backward(
                veto_if_not_finite(loss) * accumulation_steps * ranks.world_size()
            )  # undoes DeepSpeed's two divisions
            engine.step()  # changes the weights after the last micro-batch only
            step_loss += loss.detach()
        run.log_step(step, step_loss, tokens, learning_rate, engine.get_global_grad_norm())
        if run.due(step, cfg.eval_every):
            scores = evaluate("validation")
            run.log_evaluation(step, "validation", scores)
            checkpoints.score(step, scores["f1"])
        checkpoints.end_step(
            step, micro_batches
        )  # saves when due, or asked to stop; a loss that is not finite has changed no weight

    checkpoints.take_best()
    export(engine, tokenizer, run.folder / "model")
    scores = evaluate("test")
    run.log_evaluation(run.total_steps, "test", scores)
    test = splits["test"]
    gold = [found["text"] for found in test["answers"]]
    overlap = [
        baselines.longest_overlap(question, context)
        for question, context in zip(test["question"], test["context"], strict=True)
    ]
    beside = {
        "always none": question_answering_scores([""] * len(test), gold),
        "longest overlap": question_answering_scores(overlap, gold),
        "first sentence": question_answering_scores(
            [baselines.first_sentence(context) for context in test["context"]], gold
        ),
    }
    run.finish({f"this model, {len(test):,} test rows": scores, **beside})
    return {"model": scores, **beside}


if __name__ == "__main__":
    cli(main, Config)
