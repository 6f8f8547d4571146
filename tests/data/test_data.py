"""Data: a user's own files and their faults, the order of rows, padding, blocks of tokens, random draws."""

import functools
import importlib
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from lib.data.batches import (
    IGNORED,
    StepRows,
    evaluation_batches,
    in_reach_of,
    pad_tokens,
    random_numbers,
    rows_of_steps,
    training_batches,
)
from lib.data.blocks import Blocks, token_stream, token_streams
from lib.data.docstrings import LIBRARIES
from lib.data.rows import load_rows, map_rows
from lib.data.samples import load_sample
from lib.data.splits import split_of
from lib.distributed import mesh
from lib.errors import UserError
from lib.models.hub import load_tokenizer
from lib.scores.search import Corpus

ROWS = [{"body": f"row number {i}, NA", "kind": "even" if i % 2 == 0 else "odd"} for i in range(100)]


pytestmark = pytest.mark.usefixtures("one_rank")

BATCHES: Any = {"batch_size": 16, "micro_batch_size": 2, "seed": 0, "device": torch.device("cpu")}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


def load(path: Path | str, max_rows: int | None = None) -> dict[str, Dataset]:
    return load_rows(str(path), max_rows, text={"text": "body"}, label={"label": "kind"})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_is_split_by_hash_and_no_row_is_lost(tmp_path: Path, suffix: str) -> None:
    splits = load(write(tmp_path / f"mine{suffix}", ROWS))
    found = {text: split for split, rows in splits.items() for text in rows["text"]}
    assert found == {row["body"]: split_of(row["body"]) for row in ROWS}
    assert splits["train"].features["label"].names == ["even", "odd"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_folder_with_a_file_for_each_split(tmp_path: Path, suffix: str) -> None:
    for name, part in {"train-0": ROWS[:50], "train-1": ROWS[50:80], "dev": ROWS[80:90], "test": ROWS[90:]}.items():
        write(tmp_path / f"{name}{suffix}", part)
    splits = load(tmp_path)
    assert {split: list(rows["text"]) for split, rows in splits.items()} == {
        "train": [row["body"] for row in ROWS[:80]],
        "validation": [row["body"] for row in ROWS[80:90]],
        "test": [row["body"] for row in ROWS[90:]],
    }
    assert len(load(tmp_path, max_rows=7)["train"]) == 7


def test_a_file_that_is_no_split_beside_files_that_are(tmp_path: Path) -> None:
    for name in ("train", "values"):
        write(tmp_path / f"{name}.jsonl", ROWS)
    with pytest.raises(UserError, match=r"values.jsonl is named after no split"):
        load(tmp_path)


def test_numbers_as_labels(tmp_path: Path) -> None:
    splits = load(write(tmp_path / "mine.jsonl", [row | {"kind": i % 12} for i, row in enumerate(ROWS)]))
    assert splits["train"].features["label"].names == [str(number) for number in range(12)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", ["empty.jsonl", "empty"]),
        ("headed.csv", b"body,kind\n", ["headed.csv", "no rows"]),
        ("typo.jsonl", b'{"bodi": "a", "kind": "x"}\n' * 3, ["body", "did you mean 'bodi'"]),
        ("hole.jsonl", b'{"body": "a", "kind": "x"}\n{"kind": "x"}\n', ["hole.jsonl, line 2", "'body'"]),
        ("null.jsonl", b'{"body": "a", "kind": "x"}\n{"body": null, "kind": "x"}\n', ["null.jsonl, line 2", "'body'"]),
        (
            "number.jsonl",
            b'{"body": "a", "kind": "x"}\n\n{"body": 5, "kind": "x"}\n',
            ["number.jsonl, line 3", "5", "text"],
        ),
        (
            "numbers.jsonl",
            b'{"body": 5, "kind": "x"}\n{"body": 6, "kind": "x"}\n',
            ["numbers.jsonl, line 1", "5", "text"],
        ),
        ("list.jsonl", b'{"body": "a", "kind": "x"}\n{"body": ["b"], "kind": "x"}\n', ["list.jsonl, line 2", "text"]),
        ("array.jsonl", b'{"body": "a", "kind": "x"}\n["b", "x"]\n', ["array.jsonl, line 2", "object"]),
        (
            "array.json",
            b'[{"body": "a", "kind": "x"}, {"body": 7, "kind": "x"}]',
            ["array.json, element 2", "7", "text"],
        ),
        (
            "broken.jsonl",
            b'{"body": "a", "kind": "x"}\n{"body": "b", "kind": \n',
            ["broken.jsonl, line 2", "not valid JSON"],
        ),
        (
            "latin.jsonl",
            b'{"body": "a", "kind": "x"}\n{"body": "caf\xe9", "kind": "x"}\n',
            ["latin.jsonl, line 2", "0xe9", "UTF-8"],
        ),
        ("latin.csv", b"body,kind\na,x\ncaf\xe9,x\n", ["latin.csv, line 3", "0xe9", "UTF-8"]),
        ("cells.csv", b"body,kind\na,x\nb,x,y,z\n", ["cells.csv, line 3", "4 cells"]),
        ("text.parquet", b"no parquet", ["text.parquet", "Parquet"]),
        ("one.csv", b"body,kind\na,x\nb,x\n", ["split has no rows"]),
    ],
)
def test_a_faulty_file_is_refused_by_name_and_row(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(path)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_a_parquet_file_with_a_hole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hole.parquet, row 2: no value for 'body'"):
        load(write(tmp_path / "hole.parquet", [ROWS[0], {"body": None, "kind": "odd"}]))


def test_an_unknown_label_in_the_test_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [ROWS[0], {"body": "new", "kind": "evne"}])
    with pytest.raises(UserError, match=r"test.jsonl, line 2: label 'evne' is in no training row; did you mean 'even'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
        ("./nowhere", ["./nowhere", "no such file"]),
        ("somebody/something", ["somebody/something", "hub"]),
    ],
)
def test_a_dataset_that_is_not_there(dataset: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(dataset)
    for word in words:
        assert word in str(error.value)


def test_the_docstring_sample_keeps_groups_apart_and_masks_names() -> None:
    splits = load_sample("docstrings")
    texts = {split: set(rows["text"]) for split, rows in splits.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert len(texts["train"]) >= 8000 and set(splits["test"]["label"]) == set(LIBRARIES)
    own_names = [name for row in splits["test"] for name in LIBRARIES[row["label"]][:1] if name in row["text"].lower()]
    assert own_names == []


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize(("total", "batch_size"), [(100, 8), (103, 10), (5, 8), (64, 64)])
def test_every_row_comes_once_an_epoch(total: int, batch_size: int, lengths: bool) -> None:
    steps = StepRows(total, batch_size, seed=3, lengths=np.arange(total) % 17 if lengths else None)
    whole_epochs = range(steps.steps_per_window * total)  # and whole windows
    taken = np.concatenate([steps[step] for step in whole_epochs])
    assert (np.bincount(taken, minlength=total) == len(taken) // total).all()
    for step in (7, 3):  # the rows are a function of the step, whatever was asked for before
        assert (steps[step] == StepRows(total, batch_size, 3, steps.lengths)[step]).all()


@pytest.mark.parametrize("steps", [1, 3, 4, 99])
def test_the_rows_of_some_steps_are_those_that_they_take(steps: int) -> None:
    rows, lengths = Dataset.from_dict({"value": list(range(50))}), list(range(50))
    batches = training_batches(rows, collate, **BATCHES, lengths=lengths, packing=True)
    taken = {int(value) for _ in range(steps) for batch in next(batches) for value in batch["value"]}
    assert rows_of_steps(steps, 50, BATCHES["batch_size"], BATCHES["seed"]).tolist() == sorted(taken)


def test_the_order_depends_on_the_seed_and_groups_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 6400)
    grouped, other, ungrouped = StepRows(6400, 16, 1, lengths), StepRows(6400, 16, 2, lengths), StepRows(6400, 16, 1)
    assert not (grouped[0] == other[0]).all()

    def padding(steps: StepRows) -> float:
        batches = [lengths[steps[step]] for step in range(100)]
        return 1 - sum(batch.sum() for batch in batches) / sum(batch.max() * len(batch) for batch in batches)

    assert padding(grouped) < 0.05 < 0.3 < padding(ungrouped)


def collate(rows: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    return {"value": torch.tensor(rows["value"])}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_each_step(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    rows = Dataset.from_dict({"value": list(range(50))})
    steps: list[list[int]] = [[], [], []]
    for rank in range(world_size):
        monkeypatch.setattr(mesh, "data_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(mesh, "data_parallel_size", lambda: world_size)
        batches = training_batches(rows, collate, **BATCHES, lengths=list(range(50)))
        for step in steps:
            micro_batches = next(batches)
            assert len(micro_batches) == 16 // 2 // world_size
            step += torch.cat([batch["value"] for batch in micro_batches]).tolist()
    assert [sorted(step) for step in steps] == [
        sorted(StepRows(50, 16, 0, range(50))[step].tolist()) for step in range(3)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("total", [1, 7, 16, 33])
def test_evaluation_sees_every_row_once_in_equally_many_batches(
    monkeypatch: pytest.MonkeyPatch, world_size: int, total: int
) -> None:
    rows = Dataset.from_dict({"value": list(range(total))})
    seen: list[int] = []
    counts = set()
    for rank in range(world_size):
        monkeypatch.setattr(mesh, "gradient_rank", lambda rank=rank: rank)
        monkeypatch.setattr(mesh, "gradient_size", lambda: world_size)
        batches = list(evaluation_batches(rows, collate, 4, torch.device("cpu"), lengths=list(range(total))))
        counts.add(len(batches))
        for batch, numbers in batches:
            assert (batch["value"][numbers >= 0] == numbers[numbers >= 0]).all()
            seen += numbers[numbers >= 0].tolist()
    assert sorted(seen) == list(range(total)) and len(counts) == 1


@pytest.mark.parametrize("tokens", [2, 16, 17, 18, 100])
def test_blocks_predict_every_token_but_the_first_once(tokens: int) -> None:
    stream = np.arange(1000, 1000 + tokens)
    blocks = Blocks(stream, 8, drop_last=False)
    got = blocks[list(range(len(blocks)))]
    real = got["labels"] != IGNORED
    assert got["labels"][real].tolist() == stream[1:].tolist()
    assert (got["labels"][real] == got["input_ids"][real] + 1).all()
    if tokens > 8:
        assert len(Blocks(stream, 8, drop_last=True)) == (tokens - 1) // 8
    else:
        with pytest.raises(UserError, match="do not fill one block"):
            Blocks(stream, 8, drop_last=True)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_is_drawn_for_a_row_does_not_depend_on_the_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    rows = Dataset.from_dict({"value": list(range(64))})

    def with_draws(part: dict[str, Any]) -> dict[str, torch.Tensor]:
        return collate(part) | {"draw": torch.from_numpy(part["draw"].astype(np.int64))}

    def drawn(world_size: int, step: int) -> dict[int, int]:
        """{row: its draw}"""
        found: dict[int, int] = {}
        for rank in range(world_size):
            monkeypatch.setattr(mesh, "data_parallel_rank", lambda rank=rank: rank)
            monkeypatch.setattr(mesh, "data_parallel_size", lambda: world_size)
            for batch in next(training_batches(rows, with_draws, **BATCHES, start=step)):
                found.update(zip(batch["value"].tolist(), batch["draw"].tolist(), strict=True))
        return found

    assert drawn(world_size, 3) == drawn(1, 3)
    assert len(set(drawn(1, 3).values())) == 16 and not set(drawn(1, 3).values()) & set(drawn(1, 4).values())


def test_the_next_step_is_made_while_this_one_is_computed() -> None:
    rows, made, main = Dataset.from_dict({"value": list(range(64))}), threading.Semaphore(0), threading.get_ident()
    before = threading.active_count()

    def note(part: dict[str, Any]) -> dict[str, torch.Tensor]:
        if threading.get_ident() != main:
            made.release()
        return collate(part)

    batches: Any = training_batches(rows, note, **BATCHES)
    for _ in next(batches):  # and as many of the next step
        assert made.acquire(timeout=20)
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: np.random.rand(), random.random])
def test_a_collate_that_draws_from_a_global_generator_is_refused(draw: Callable[[], Any]) -> None:
    rows = Dataset.from_dict({"value": list(range(64))})
    with pytest.raises(UserError, match="collate draws from the global random generator"):
        next(training_batches(rows, lambda part: (draw(), collate(part))[1], **BATCHES))


def test_what_is_pinned_is_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch cannot pin an expanded tensor, and there is no GPU here to say so."""
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = {"position_ids": torch.arange(4).expand(3, 4), "value": torch.ones(2)}
    found = in_reach_of(torch.device("cuda"), batch)
    assert len(pinned) == 2 and all(tensor.is_contiguous() for tensor in pinned)
    assert torch.equal(found["position_ids"], batch["position_ids"])


def test_a_fault_is_raised_at_the_step_that_has_it() -> None:
    rows, step_rows = Dataset.from_dict({"value": list(range(64))}), StepRows(64, 16, 0)

    def refuse(part: dict[str, Any]) -> dict[str, torch.Tensor]:
        if 5 in part["value"]:
            raise UserError("row 5")
        return collate(part)

    batches = training_batches(rows, refuse, **BATCHES)
    for _ in range(next(step for step in range(4) if 5 in step_rows[step])):
        next(batches)
    with pytest.raises(UserError, match="row 5"):
        next(batches)


def test_random_numbers_are_uniform_and_each_rows_own() -> None:
    draws = np.random.SeedSequence(7).generate_state(2000, np.uint64)
    numbers = random_numbers(draws, 50)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(np.histogram(numbers, 20)[0] / 5000 - 1).max() < 0.1
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.1
    assert (random_numbers(draws[5:6], 50) == numbers[5:6]).all() and len(np.unique(numbers)) == numbers.size


def test_token_ids_are_padded_to_the_longest() -> None:
    batch = pad_tokens([[5, 6, 7], [8]], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


SQUAD = {
    "context": "The cat sat on the mat.",
    "question": "Where did it sit?",
    "answers": {"text": ["on the mat"], "answer_start": [12]},
}


def load_squad(path: Path, rows: list[dict[str, Any]]) -> dict[str, Dataset]:
    numbered = [row | {"context": f"{row['context']} {number}"} for number, row in enumerate(rows)]
    return load_rows(
        str(write(path, numbered)),
        None,
        text={"context": "context", "question": "question"},
        answers={"answers": "answers"},
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_answers_as_in_squad(tmp_path: Path, suffix: str) -> None:
    none: dict[str, Any] = SQUAD | {"answers": {"text": [], "answer_start": []}}
    splits = load_squad(tmp_path / f"mine{suffix}", [SQUAD, none] * 50)
    assert sum(len(answers["text"]) for rows in splits.values() for answers in rows["answers"]) == 50
    assert load_squad(tmp_path / f"none{suffix}", [none] * 50)["train"]["answers"][0]["text"] == []


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"text": ["on the mat"], "answer_start": [11]}, ["'on the mat'", "character 11"]),
        ({"text": ["on the mat"], "answer_start": []}, ["1 answers, but 0 starts"]),
        ({"text": [""], "answer_start": [3]}, ["''", "empty"]),
        ({"text": [" "], "answer_start": [3]}, ["' '", "empty"]),
        ({"text": "on the mat", "answer_start": 12}, ["line 1", "as in SQuAD"]),
        ("on the mat", ["line 1", "as in SQuAD"]),
        ({"text": ["on the mat"]}, ["line 1", "as in SQuAD"]),
    ],
)
def test_faulty_answers(tmp_path: Path, answers: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_squad(tmp_path / "mine.jsonl", [SQUAD | {"answers": answers}] * 60)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_one_column_is_not_two_things(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="column 'text' is set as the source and as the target"):
        load_rows(str(path), None, text={"source": "text", "target": "text"})


def test_documents_need_a_token_between_them() -> None:
    rows = Dataset.from_dict({"text": ["a"]})
    tokenizer = load_tokenizer("minilm", 8, trust_remote_code=False)
    with pytest.raises(UserError, match="no end-of-text token"):
        token_streams({"train": rows}, tokenizer)


def test_what_is_relevant_to_a_query() -> None:
    corpus = Corpus(["b", "a", "b", "c"], ["x", "y", "z", "x"])
    assert (corpus.queries, corpus.documents, corpus.relevant) == (["b", "a", "c"], ["x", "y", "z"], [{0, 2}, {1}, {0}])


def test_a_stream_for_each_column(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [{"a": [1, 2], "b": [3, 4]}, {"a": [5], "b": [6]}])
    rows = Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
    assert token_stream(rows, "a").tolist() == [1, 2, 5] and token_stream(rows, "b").tolist() == [3, 4, 6]


def test_changed_code_does_not_meet_the_cache_of_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    splits = {"train": Dataset.from_parquet(str(write(tmp_path / "x.parquet", [{"a": 1}])), cache_dir=str(tmp_path))}
    for answer in (1, 2):  # datasets hashes only the name of a function that can be imported
        (tmp_path / "own.py").write_text(
            f"ANSWER = {answer}\n\n\ndef answers(rows):\n    return {{'answer': [ANSWER] * len(rows['a'])}}\n"
        )
        module = importlib.reload(importlib.import_module("own"))
        for function in (module.answers, functools.partial(module.answers)):
            first, second = (map_rows(splits, function)["train"] for _ in range(2))
            assert first["answer"][:] == [answer] and first.cache_files == second.cache_files
    before = map_rows(splits, module.answers)["train"].cache_files
    monkeypatch.setattr("lib.data.rows.CODE", [])  # the code of lib/, which the function may call
    assert map_rows(splits, module.answers)["train"].cache_files != before
