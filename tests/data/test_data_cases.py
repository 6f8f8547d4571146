"""Data as users have it: all formats, faults that would spoil a training, labels, languages without spaces."""

import bz2
import dataclasses
import gzip
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from gensim.test.utils import datapath
from transformers import AutoConfig, AutoTokenizer

from lib.compare import compare
from lib.data import rows
from lib.data import sources as rows_of_data
from lib.data.rows import Splits, load_rows
from lib.errors import UserError
from lib.models.encoder_decoder import SPECIAL_TOKENS
from lib.models.hub import load_tokenizer, model_folder
from lib.models.scratch import END_OF_TEXT, train_tokenizer
from lib.run.resume import check_data, find_checkpoint, finished_before
from lib.scores import baselines, evaluation
from lib.settings import config

NAMES = ("causal_lm", "masked_lm", "semantic_search", "word_embeddings")
causal_lm, masked_lm, semantic_search, word_embeddings = (importlib.import_module(f"recipes.{name}") for name in NAMES)

pytestmark = pytest.mark.usefixtures("one_rank")

ROWS = [{"text": f"a kettle {i}", "label": "good" if i % 2 else "bad"} for i in range(60)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


def load(path: Path | str, max_rows: int | None = None) -> Splits:
    return load_rows(str(path), max_rows, text={"text": "text"}, label={"label": "label"})


def load_text(path: Path | str) -> Splits:
    return load_rows(str(path), None, text={"text": "text"})


def refused(path: Path | str, *words: str, do: Any = load) -> None:
    with pytest.raises(UserError) as error:
        do(path)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def by_split(splits: Splits, column: str = "text") -> dict[str, list[Any]]:
    return {split: list(rows[column]) for split, rows in splits.items()}


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", JSONL),
        ("X.JSONL", JSONL),
        ("x.ndjson", JSONL),
        ("x.json", json.dumps(ROWS, indent=1)),
        ("x.json", json.dumps({"version": 1, "data": ROWS})),
        ("x.json", "\n" + json.dumps({"data": ROWS}, indent=1)),
        ("DATA.CSV", CSV),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("bom.csv", "\ufeff" + CSV),
        ("x.csv", CSV.replace(",", ";")),
        ("tabs.csv", CSV.replace(",", "\t")),
        ("bars.csv", CSV.replace(",", "|")),
        ("spaced.csv", "text, label\n" + "".join(f'"{row["text"]}", "{row["label"]}"\n' for row in ROWS)),
        ("x.tsv", CSV.replace(",", "\t")),
        ("pandas.csv", ",text,label\n" + "".join(f"{i},{row['text']},{row['label']}\n" for i, row in enumerate(ROWS))),
        ("comma_everywhere.csv", CSV.replace("\n", ",\n")),
        ("x.jsonl.gz", gzip.compress(JSONL.encode())),
        ("members.jsonl.gz", gzip.compress(JSONL[:200].encode()) + gzip.compress(JSONL[200:].encode())),
        ("x.csv.gz", gzip.compress(CSV.encode())),
        ("x.jsonl.bz2", bz2.compress(JSONL.encode())),
        ("x.jsonl.zst", pyarrow.Codec("zstd").compress(JSONL.encode(), asbytes=True)),
    ],
)
def test_the_same_rows_in_every_format(tmp_path: Path, name: str, content: str | bytes) -> None:
    expected = load(write(tmp_path / "expected", {"rows.jsonl": JSONL}) / "rows.jsonl")
    splits = load(write(tmp_path, {name: content}) / name)
    assert splits.fingerprint == expected.fingerprint and by_split(splits) == by_split(expected)
    assert splits.header == {"labels": "2: bad, good", "row 1": "text 'a kettle 0', label 'bad'"}
    assert splits.notes == []


def test_lines_of_text_are_rows(tmp_path: Path) -> None:
    splits = load_text(write(tmp_path, {"corpus.txt": "".join(f"line {i} \r\n\n" for i in range(60))}) / "corpus.txt")
    texts = [text for texts in by_split(splits).values() for text in texts]
    assert sorted(texts) == sorted(f"line {i} " for i in range(60))


def test_cells_stay_as_they_are_written(tmp_path: Path) -> None:
    cells = ["NA", "007", "1.0", "2020-01-31", 'a "b", c', "two\nlines", " space "]
    lines = "".join('"{}",x\n'.format(cell.replace('"', '""')) for cell in cells * 8)
    splits = load_text(write(tmp_path, {"train.csv": f"text,label\n{lines}", "validation.csv": CSV, "test.csv": CSV}))
    assert splits["train"]["text"][: len(cells)] == cells


def test_json_strings_that_look_like_dates_are_text(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"2020-01-{1 + i % 28:02d}T00:00:{i:02d}"}) + "\n" for i in range(60))
    splits = load_text(write(tmp_path, {"x.jsonl": rows}) / "x.jsonl")
    assert all(text.startswith("2020-01-") for text in splits["train"]["text"])


@pytest.mark.parametrize("class_label", [False, True])
def test_saved_data_sets(tmp_path: Path, class_label: bool) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    rows = Dataset.from_list(ROWS).cast(features) if class_label else Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows.select(range(40)), "test": rows.select(range(40, 60))}).save_to_disk(tmp_path / "two")
    order = ["good", "bad"] if class_label else ["bad", "good"]  # as in the data, or alphabetical
    for name in ("one", "two"):
        splits = load(tmp_path / name)
        assert splits["train"].features["label"].names == order
        loaded = {row["text"]: order[row["label"]] for rows in splits.values() for row in rows}
        assert loaded == {row["text"]: row["label"] for row in ROWS}
    assert splits["test"]["text"][:] == [row["text"] for row in ROWS[40:]]


def test_class_labels_in_parquet(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    Dataset.from_list(ROWS).cast(features).to_parquet(tmp_path / "x.parquet")
    splits = load(tmp_path / "x.parquet")
    assert splits["train"].features["label"].names == ["good", "bad"]
    loaded = {row["text"]: ["good", "bad"][row["label"]] for rows in splits.values() for row in rows}
    assert loaded == {row["text"]: row["label"] for row in ROWS}


def squad(start: int = 12) -> dict[str, Any]:
    return {
        "version": "v2.0",
        "data": [
            {
                "title": "Cats",
                "paragraphs": [
                    {
                        "context": f"The cat sat on the mat {i}.",
                        "qas": [
                            {
                                "id": f"{i}a",
                                "question": "Where?",
                                "answers": [{"text": "on the mat", "answer_start": start}],
                            },
                            {"id": f"{i}b", "question": "Why?", "answers": [], "is_impossible": True},
                        ],
                    }
                    for i in range(30)
                ],
            }
        ],
    }


def load_answers(path: Path | str) -> Splits:
    return load_rows(
        str(path), None, text={"context": "context", "question": "question"}, answers={"answers": "answers"}
    )


@pytest.mark.parametrize("indent", [None, 1])
def test_squads_own_format(tmp_path: Path, indent: int | None) -> None:
    splits = load_answers(write(tmp_path, {"train-v2.0.json": json.dumps(squad(), indent=indent)}) / "train-v2.0.json")
    assert sum(map(len, splits.values())) == 60
    answers = [answers["text"] for rows in splits.values() for answers in rows["answers"]]
    assert sorted(answers) == [[]] * 30 + [["on the mat"]] * 30
    refused(
        write(tmp_path, {"bad.json": json.dumps(squad(11))}) / "bad.json",
        "bad.json, question 0a",
        "character 11",
        "one of 30 faulty rows",
        do=load_answers,
    )


def test_answers_as_a_list_of_objects(tmp_path: Path) -> None:
    row = {"context": "The cat sat.", "question": "Who?", "answers": [{"text": "cat", "answer_start": 4}]}
    rows = "".join(json.dumps(row | {"context": f"The cat sat. {i}"}) + "\n" for i in range(60))
    splits = load_answers(write(tmp_path, {"x.jsonl": rows}) / "x.jsonl")
    assert splits["train"][0]["answers"] == {"text": ["cat"], "answer_start": [4]}


def test_the_faults_of_all_rows_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    rows = [
        {
            "context": f"The cat sat. {i}",
            "question": "Who?",
            "answers": {"text": ["cat"], "answer_start": [4 + (i in (41, 50))]},
        }
        for i in range(60)
    ]
    path = write(tmp_path, {"x.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}) / "x.jsonl"
    refused(path, "x.jsonl, line 42", "'cat'", "character 5", "one of 2 faulty rows", do=load_answers)


# --- what would be trained on wrongly -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "extra_cell.csv",
            "text,label\n" + "Sorry, a kettle,good\n" * 4,
            ["extra_cell.csv, line 2", "3 cells", "the header has 2"],
        ),
        (
            "trailing_comma.csv",
            "text,id\n" + "a kettle,100,\n" * 4,
            ["trailing_comma.csv, line 2", "3 cells", "at the end"],
        ),
        ("missing_cell.csv", "id,text,label\n1,a kettle\nthat leaks,good,x\n", ["missing_cell.csv, line 2", "2 cells"]),
        ("lines.csv", 'text,label\n"a\nb",good\n"a"b,good\n', ["lines.csv, line 4", "not valid CSV"]),
        ("open.csv", f'{CSV}"an open quote,bad\n', ["open.csv, line 62", "not valid CSV"]),
        ("twice.csv", "text,text,label\na,b,good\n", ["twice.csv, line 1", "'text' 2 times"]),
        (
            "empty_label.csv",
            CSV.replace("kettle 4,bad", "kettle 4,"),
            ["empty_label.csv, line 6", "no value for 'label'"],
        ),
        ("blank_label.csv", CSV.replace("kettle 4,bad", "kettle 4,  "), ["blank_label.csv, line 6", "'label' is '  '"]),
        ("empty_label.jsonl", JSONL.replace('"bad"', '""', 1), ["empty_label.jsonl, line 1", "'label' is ''"]),
        ("half.jsonl", JSONL.replace('"bad"', "0.5", 1), ["half.jsonl, line 1", "0.5"]),
        ("list.jsonl", JSONL.replace('"bad"', '["bad"]'), ["list.jsonl, line 1", "one of 30 faulty rows"]),
        ("surrogate.jsonl", JSONL.replace("kettle 7", "kettle \\ud800"), ["surrogate.jsonl, line 8"]),
        ("long.jsonl", JSONL.replace('"a kettle 3"', json.dumps(["word"] * 9999)), ["long.jsonl, line 4", "..."]),
        ("number.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}\n", ["number.jsonl, line 1", "not valid JSON"]),
        (
            "one.json",
            json.dumps({"text": "a", "label": "b"}, indent=1),
            ["one.json", "one object", "expected one object a line"],
        ),
        ("no_header.csv", CSV.partition("\n")[2], ["no_header.csv", "no column 'text'", "'a kettle 0'"]),
        ("cut.jsonl.gz", gzip.compress(JSONL.encode())[:-9], ["cut.jsonl.gz", "cannot be read"]),
        ("x.xlsx", b"PK", ["x.xlsx", "is not read", ".csv", "convert"]),
        ("x.parquet.gz", b"PAR1", ["x.parquet.gz", "is not read"]),
    ],
)
def test_refused_with_file_and_line(tmp_path: Path, name: str, content: str | bytes, words: list[str]) -> None:
    refused(write(tmp_path, {name: content}) / name, *words)


def test_a_file_exchanged_under_the_same_path_and_time_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    fingerprints = []
    for word in ("old", "new", "old"):
        path.write_text(JSONL.replace("kettle", word))
        os.utime(path, (0, 0))
        splits = load(path)
        assert all(f"a {word} " in text for text in splits["train"]["text"])
        fingerprints.append((splits.fingerprint, splits["train"]._fingerprint))
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


@pytest.mark.parametrize("swapped", [False, True])
def test_what_tells_rows_apart_is_their_content(tmp_path: Path, swapped: bool) -> None:
    other = JSONL.replace("good", "bad_").replace("bad", "good").replace("good_", "bad") if swapped else JSONL
    first, second = (
        load(write(tmp_path, {name: content}) / name) for name, content in (("a.jsonl", JSONL), ("b.jsonl", other))
    )
    assert (first.fingerprint == second.fingerprint) is not swapped


# --- folders and splits ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("training.jsonl", "validation.jsonl", "test.jsonl"),
        ("train.jsonl", "eval.jsonl", "testing.jsonl"),
        ("my_train.jsonl", "my-dev.jsonl", "my.test.jsonl"),
        ("trainset.jsonl", "devset.jsonl", "testset.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/val-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/0.jsonl", "evaluation/0.jsonl", "test/0.jsonl"),
        ("TRAIN.jsonl.gz", "Valid.jsonl.gz", "Test.jsonl.gz"),
    ],
)
def test_files_named_after_splits(tmp_path: Path, names: tuple[str, str, str]) -> None:
    parts = [JSONL.splitlines(keepends=True)[start : start + 20] for start in (0, 20, 40)]
    files = {name: "".join(part).encode() for name, part in zip(names, parts, strict=True)}
    not_read = {
        "README.md": "#",
        ".git/x.jsonl": "{",
        "._train.jsonl": "\0",
        "__MACOSX/train.jsonl": "\0",
        "dataset_infos.json": "{}",
        "LICENSE.txt": "a",
    }
    compressed = {name: gzip.compress(data) if name.endswith(".gz") else data for name, data in files.items()}
    write(tmp_path, compressed | not_read)
    splits = load(tmp_path)
    assert by_split(splits) == {
        split: [row["text"] for row in ROWS[start : start + 20]]
        for split, start in (("train", 0), ("validation", 20), ("test", 40))
    }


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train.jsonl", "values.jsonl"), ["values.jsonl is named after no split"]),
        (("test.jsonl", "dev.jsonl"), ["no file is named train"]),
        (("train_test.jsonl", "dev.jsonl"), ["train_test.jsonl is named after more than one split"]),
        (("de/train.jsonl", "en/train.jsonl"), ["in different folders (de, en)"]),
        (("train.jsonl", "test.csv"), ["more than one format", "train.jsonl", "test.csv"]),
        (("README.md",), ["no files there that are read"]),
    ],
)
def test_folders_of_which_the_splits_are_in_doubt(tmp_path: Path, names: tuple[str, ...], words: list[str]) -> None:
    refused(write(tmp_path, dict.fromkeys(names, JSONL)), *words)


def test_a_folder_without_splits_says_so(tmp_path: Path) -> None:
    splits = load(write(tmp_path, {"1790/a.jsonl": JSONL, "1791/b.jsonl": JSONL}))
    (note,) = splits.notes
    assert "no file" in note and "all 2 are split by hash" in note


def hub(monkeypatch: pytest.MonkeyPatch, **configurations: DatasetDict) -> None:
    """A hub that has one data set, with these configurations."""

    def load_dataset(name: str, configuration: str | None = None, streaming: bool = False) -> DatasetDict:
        assert name == "nyu/glue"
        if configuration not in configurations:
            if configuration is None:
                raise ValueError(
                    f"Config name is missing.\nPlease pick one among the available configs: {list(configurations)}\n"
                    "Example of usage: ..."
                )
            raise ValueError(f"BuilderConfig {configuration!r} not found. Available: {list(configurations)}")
        return configurations[configuration]

    monkeypatch.setattr(rows_of_data, "load_dataset", load_dataset)


def test_hub_data_sets_with_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    rows = Dataset.from_list(ROWS).cast(features)
    secret = Dataset.from_list([{"text": "a", "label": -1}]).cast(features)
    half = DatasetDict(
        {
            "train": rows,
            "validation_matched": rows.select(range(10)),
            "validation_other": rows.select(range(10, 20)),
            "test": secret,
        }
    )
    hub(monkeypatch, sst2=half, cola=half)
    splits = load("nyu/glue:sst2")
    assert len(splits["validation"]) == 20 and splits["train"].features["label"].names == ["good", "bad"]
    assert len(splits["train"]) + len(splits["test"]) == 60  # not the test rows of the hub, whose labels are secret
    assert "test of nyu/glue:sst2 has no labels" in splits.notes[0]
    assert "validation_matched and validation_other" in splits.notes[1]
    refused("nyu/glue", "several configurations", "nyu/glue:sst2", "cola")
    refused("nyu/glue:sst3", "no configuration 'sst3'", "did you mean 'sst2'")


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (list(range(12)), [str(number) for number in range(12)]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        ([True, False], ["false", "true"]),
        ([1.0, 0.0], ["0", "1"]),
        ([1, "0"], ["0", "1"]),
        (["good", " good", "bad ", "bad"], ["bad", "good"]),
        (["b", 2, "a", 10], ["2", "10", "a", "b"]),
    ],
)
def test_label_names(tmp_path: Path, labels: list[Any], names: list[str]) -> None:
    rows = [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(120)]
    splits = load(write(tmp_path, {"x.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}) / "x.jsonl")
    assert splits["train"].features["label"].names == names
    assert splits.header["labels"].startswith(f"{len(names)}: {names[0]}, ")
    if all(type(label) is int for label in labels):
        assert all(int(names[row["label"]]) == row["label"] for row in splits["train"])  # label 2 is logit 2


def test_labels_are_those_of_all_training_rows(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"item {i}", "label": f"kind {i % 100}"}) + "\n" for i in range(300))
    splits = load(write(tmp_path, {f"{name}.jsonl": rows for name in ("train", "validation", "test")}), max_rows=20)
    assert len(splits["train"]) == 20 and len(splits["train"].features["label"].names) == 100


def test_a_rare_label_stays_in_the_training_rows(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": f"rare {i}" if i < 20 else "common"} for i in range(200)]
    splits = load(write(tmp_path, {"x.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}) / "x.jsonl")
    assert set(splits["train"]["label"]) == set(range(21)) and min(map(len, splits.values())) > 10
    assert "rarest labels" in splits.notes[0]
    texts = by_split(splits)
    assert not set(texts["train"]) & set(texts["test"]) and sum(map(len, texts.values())) == 200


# --- resuming -------------------------------------------------------------------------------------


def restored(splits: Splits, manifest: dict[str, Any]) -> None:
    """What a run does before it reads the weights."""
    check_data((Path("step-2"), manifest), {"rows": 7, "data": splits.fingerprint, "sample": "tokens"}, 0, "x.jsonl")


def test_a_run_goes_on_with_the_same_rows_only(tmp_path: Path) -> None:
    same, other = (
        load(write(tmp_path, {name: text}) / name)
        for name, text in (("a.jsonl", JSONL), ("b.jsonl", JSONL.replace("kettle", "lamp")))
    )
    manifest = {"rows": 7, "data": same.fingerprint, "step": 2}
    for splits in (same, load(write(tmp_path, {"moved.csv": CSV}) / "moved.csv")):
        with pytest.raises(UserError, match=r"beyond the 0 steps"):  # the next check
            restored(splits, manifest)
    with pytest.raises(UserError, match=r"trained on 7 rows, but dataset x.jsonl now gives others, though as many"):
        restored(other, manifest)
    with pytest.raises(
        UserError, match="cut into other tokens: the model's tokenizer or its chat template has changed"
    ):
        restored(same, manifest | {"sample": "other tokens"})
    with pytest.raises(UserError, match="beyond the 0 steps"):
        restored(same, {"rows": 7, "step": 2})  # the manifest of an earlier version


@pytest.mark.parametrize(("data", "goes_on"), [("1234", True), (None, False)])
def test_the_name_of_a_dataset_may_change_where_its_rows_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: str | None, goes_on: bool
) -> None:
    cfg = config.load(causal_lm.Config, Path("recipes/causal_lm.yaml"), {})
    manifest = {"recipe": "causal_lm", "settings": dataclasses.asdict(cfg), "versions": {}, "data": data}
    monkeypatch.setattr("lib.run.checkpoint_files.find_newest", lambda folder: (folder / "step-2", manifest, []))
    moved = dataclasses.replace(cfg, dataset="moved.jsonl", resume=True)
    if goes_on:
        checkpoint, notes = find_checkpoint(tmp_path, "causal_lm", moved)
        assert checkpoint == (tmp_path / "checkpoints" / "step-2", manifest)
        assert [note for note in notes if "dataset was" in note] == [
            "dataset was 'sotu' and is 'moved.jsonl': it must have the same rows"
        ]
    else:
        with pytest.raises(UserError, match=r"dataset was 'sotu' and is 'moved.jsonl', which would change the result"):
            find_checkpoint(tmp_path, "causal_lm", moved)


@pytest.mark.parametrize(
    ("changes", "finished"), [({}, True), ({"max_steps": 9}, False), ({"dataset": "moved.jsonl"}, False)]
)
def test_a_finished_run_looks_at_data_of_another_name(tmp_path: Path, changes: dict[str, Any], finished: bool) -> None:
    cfg = config.load(causal_lm.Config, Path("recipes/causal_lm.yaml"), {})
    write(tmp_path, {"result.json": '{"steps": 2}', "config.yaml": json.dumps(dataclasses.asdict(cfg))})
    assert (finished_before(tmp_path, dataclasses.replace(cfg, **changes)) is not None) is finished


# --- tokens ---------------------------------------------------------------------------------------


def test_names_of_control_tokens_are_text_to_a_tokenizer_that_is_learned_from_it(tmp_path: Path) -> None:
    texts = ["<s>5 euros</s> now <pad> 1 euro <|endoftext|>"] * 20
    for special, template in ((SPECIAL_TOKENS, "$A </s>"), (END_OF_TEXT, "$A")):
        tokenizer = train_tokenizer(texts, 300, special, template)
        tokenizer.save_pretrained(tmp_path)
        for known in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            ids = known(texts[0], add_special_tokens=False)["input_ids"]
            assert not set(ids) & set(known.all_special_ids) and known.decode(ids, skip_special_tokens=True) == texts[0]
    tokenizer = train_tokenizer(texts, 300, SPECIAL_TOKENS, "$A </s>")
    pairs = importlib.import_module("recipes.translation").tokenize(
        {"source": texts, "target": texts}, (tokenizer, tokenizer), (99, 99)
    )
    assert not any(pairs["target_altered"]) and pairs["labels"][0].count(1) == 1  # its end, once


def test_documents_of_masked_lm_may_have_the_names_of_control_tokens() -> None:
    tokenizer = train_tokenizer(["a </s> b <mask> c"] * 20, 300, masked_lm.SPECIAL_TOKENS, "<s> $A </s>")
    blocks = masked_lm.tokenize({"text": ["a </s> b <mask> c"]}, tokenizer, 64)
    assert not set(blocks["input_ids"][0][1:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.mask_token_id in tokenizer("a <mask> c")["input_ids"]  # so that a user can ask the trained model


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    AutoConfig.from_pretrained(model_folder("minilm")).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm"))
    tokenizer.save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path), 8, trust_remote_code=False)
    tokenizer.add_tokens(["<user>"])
    tokenizer.save_pretrained(tmp_path)
    words = r"it knows 30,522 tokens, the tokenizer beside it 30,523; model.resize_token_embeddings"
    with pytest.raises(UserError, match=words):
        load_tokenizer(str(tmp_path), 8, trust_remote_code=False)


# --- scores ---------------------------------------------------------------------------------------

CHINESE = ["老师在学校买了一本书。", "母亲在公园看见了一只猫。"]


def test_macro_f1_is_over_the_labels_that_the_rows_have() -> None:
    labels, predictions = [0, 0, 1, 1], [0, 0, 1, 2]  # no row has label 2
    scores = evaluation.classification_scores(labels, predictions)
    assert scores == {"accuracy": 0.75, "macro_f1": pytest.approx((1 + 2 / 3) / 2)}
    assert baselines.majority_class([2, 2, 0], labels)["macro_f1"] == 0


def test_rouge_of_other_scripts_than_english() -> None:
    same, other = (evaluation.summarization_scores(summaries, CHINESE) for summaries in (CHINESE, CHINESE[::-1]))
    assert set(same.values()) == {100.0} and 0 < other["rouge1"] < 60 and other["rouge2"] < other["rouge1"]
    assert evaluation.rouge_tokens(CHINESE) == "letters"
    russian = ["Кошка сидела на ковре."]
    assert evaluation.summarization_scores(["Собака сидела на ковре."], russian)["rouge1"] == pytest.approx(75)
    assert "words" in evaluation.rouge_tokens(russian)
    assert "rouge-score" in evaluation.rouge_tokens(["The caf\u00e9 sat on the mat."])


def test_bleu_needs_a_tokenizer_that_suits_the_targets() -> None:
    for tokenize in ("13a", "intl"):
        with pytest.raises(UserError, match="--bleu_tokenizer zh for Chinese"):
            evaluation.check_bleu_tokenizer(tokenize, CHINESE)
        evaluation.check_bleu_tokenizer(tokenize, ["Bonjour, 北京."])
    evaluation.check_bleu_tokenizer("zh", CHINESE)


def test_words_of_languages_without_spaces() -> None:
    assert word_embeddings.words_of("老师's don't 3 書 ねこ") == ["老", "师", "s", "don't", "書", "ね", "こ"]
    sentences = ["昨天老师买了书。", "然后他回家了\uff01", "「好。」"]
    assert evaluation.sentences("".join(sentences)) == sentences
    assert baselines.longest_overlap("谁在公园\uff1f", "".join(CHINESE)) == CHINESE[1]
    assert baselines.bm25(["公园的猫"], CHINESE, 1).tolist() == [[1]]
    assert evaluation.question_answering_scores(["在公园"], [["公园"]])["f1"] == pytest.approx(80)  # letters in common
    rated = [
        word
        for file in ("simlex999.txt", "wordsim353.tsv")
        for line in Path(datapath(file)).read_text().splitlines()
        for word in line.split("\t")[:2]
    ]
    few, many = (evaluation.ratings_notes(words) for words in (word_embeddings.words_of("".join(CHINESE)), rated))
    assert len(few) == 2 and "only 0 of its pairs" in few[0] and many == []


def test_right_answers_of_the_step_are_no_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, documents = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    documents[3] = documents[0]  # the same document for another query
    queries[4] = queries[1]  # the same query with another document
    identities = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 0], [1, 4]])
    wrong = {0: [1, 2, 4], 1: [0, 2, 3], 2: [0, 1, 3, 4], 3: [1, 2, 4], 4: [0, 2, 3]}  # by hand
    scores = queries @ documents.T / 0.1
    losses = [torch.logsumexp(scores[row, [row, *columns]], 0) - scores[row, row] for row, columns in wrong.items()]
    loss = semantic_search.contrastive_loss(queries, documents, identities, 0.1)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    all_different = torch.arange(10).view(5, 2)
    loss = semantic_search.contrastive_loss(queries, documents, all_different, 0.1)
    assert loss.item() == pytest.approx(F.cross_entropy(scores, torch.arange(5)).item(), rel=1e-6)


def test_texts_are_told_apart_by_their_content() -> None:
    tokenizer = load_tokenizer("minilm", 8, trust_remote_code=False)
    documents = ["x " * 20 + "y", "x " * 20 + "z", "X"]  # the first two are the same once they are truncated
    rows = semantic_search.tokenize({"query": ["a", "b", "a"], "document": documents}, tokenizer, 8)
    identities = semantic_search.collate(rows, tokenizer.pad_token_id)["identities"]
    assert identities.shape == (3, 2) and identities[0, 0] == identities[2, 0] != identities[1, 0]
    assert len(set(identities[:, 1].tolist())) == 3


# --- compare --------------------------------------------------------------------------------------


def test_a_comparison_hashes_files_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"x.jsonl": JSONL}) / "x.jsonl"
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read into memory"))
    # The second setting is too long for the name of a file.
    settings = [f"--dataset={path}", f"--neighbours_of={'word ' * 999}"]
    _, before = compare.code_version("causal_lm", settings)
    path.write_text(JSONL.replace("kettle", "lamp"))
    assert compare.code_version("causal_lm", settings)[1] != before


def test_line_ends_and_nesting_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "mac.csv").write_bytes(b"text,label\ra b c,x\rd e f,y\r")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for file, words in (("mac.csv", "convert them to LF"), ("deep.json", "not valid JSON")):
        with pytest.raises(UserError, match=words) as error:
            load_rows(str(tmp_path / file), None, text={"text": "text"})
        assert "\n" not in str(error.value)


def test_rows_that_another_process_has_read_meanwhile_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": f"{tmp_path} row {number}"}) + "\n" for number in range(60))
    )
    write = rows._Reader.write

    def write_second(reader: Any, folder: Path) -> dict[str, str]:
        header = write(reader, folder)
        first = folder.with_name(folder.name[1:].rpartition("-")[0])  # the folder of the other process
        shutil.copytree(folder, first)
        (first / "facts.json").write_text(json.dumps({"fingerprint": "of the first", "header": {}, "notes": []}))
        return header

    monkeypatch.setattr(rows._Reader, "write", write_second)
    assert load_rows(str(tmp_path / "x.jsonl"), None, text={"text": "text"}).fingerprint == "of the first"
