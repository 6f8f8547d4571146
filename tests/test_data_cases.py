"""Data as people have it: every format that is read, what must be refused rather than trained on wrongly, labels, scores of languages without spaces."""

import bz2
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lib import rows as rows_of_data
from lib.config import UserError
from lib.data import Splits, load_rows

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


# --- formats ------------------------------------------------------------------------------------------------------------


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
    assert splits.header == {"labels": "2: bad, good", "row 1": "text 'a kettle 0', label 'bad'"} and splits.notes == []


def test_lines_of_text_are_rows(tmp_path: Path) -> None:
    splits = load_text(write(tmp_path, {"corpus.txt": "".join(f"line {i} \r\n\n" for i in range(60))}) / "corpus.txt")
    assert sorted(sum(by_split(splits).values(), [])) == sorted(f"line {i} " for i in range(60))


def test_cells_stay_as_they_are_written(tmp_path: Path) -> None:
    cells = ["NA", "007", "1.0", "2020-01-31", 'a "b", c', "two\nlines", " space "]
    lines = "".join('"{}",x\n'.format(cell.replace('"', '""')) for cell in cells * 8)
    splits = load_text(write(tmp_path, {"train.csv": f"text,label\n{lines}", "validation.csv": CSV, "test.csv": CSV}))
    assert splits["train"]["text"][: len(cells)] == cells


def test_json_strings_that_look_like_dates_are_text(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"2020-01-{1 + i % 28:02d}T00:00:{i:02d}"}) + "\n" for i in range(60))
    assert all(text.startswith("2020-01-") for text in load_text(write(tmp_path, {"x.jsonl": rows}) / "x.jsonl")["train"]["text"])


@pytest.mark.parametrize("class_label", [False, True])
def test_saved_data_sets(tmp_path: Path, class_label: bool) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    rows = Dataset.from_list(ROWS).cast(features) if class_label else Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows.select(range(40)), "test": rows.select(range(40, 60))}).save_to_disk(tmp_path / "two")
    order = ["good", "bad"] if class_label else ["bad", "good"]  # the data's own, or that of text
    for name in ("one", "two"):
        splits = load(tmp_path / name)
        assert splits["train"].features["label"].names == order
        assert {row["text"]: order[row["label"]] for rows in splits.values() for row in rows} == {row["text"]: row["label"] for row in ROWS}
    assert splits["test"]["text"][:] == [row["text"] for row in ROWS[40:]]


def test_class_labels_in_parquet(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    Dataset.from_list(ROWS).cast(features).to_parquet(tmp_path / "x.parquet")
    splits = load(tmp_path / "x.parquet")
    assert splits["train"].features["label"].names == ["good", "bad"]
    assert {row["text"]: ["good", "bad"][row["label"]] for rows in splits.values() for row in rows} == {row["text"]: row["label"] for row in ROWS}


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
                            {"id": f"{i}a", "question": "Where?", "answers": [{"text": "on the mat", "answer_start": start}]},
                            {"id": f"{i}b", "question": "Why?", "answers": [], "is_impossible": True},
                        ],
                    }
                    for i in range(30)
                ],
            }
        ],
    }


def load_answers(path: Path | str) -> Splits:
    return load_rows(str(path), None, text={"context": "context", "question": "question"}, answers={"answers": "answers"})


@pytest.mark.parametrize("indent", [None, 1])
def test_squads_own_format(tmp_path: Path, indent: int | None) -> None:
    splits = load_answers(write(tmp_path, {"train-v2.0.json": json.dumps(squad(), indent=indent)}) / "train-v2.0.json")
    assert sum(map(len, splits.values())) == 60
    answers = [answers["text"] for rows in splits.values() for answers in rows["answers"]]
    assert sorted(answers) == [[]] * 30 + [["on the mat"]] * 30
    refused(write(tmp_path, {"bad.json": json.dumps(squad(11))}) / "bad.json", "bad.json, question 0a", "character 11", "29 more rows", do=load_answers)


def test_answers_as_a_list_of_objects(tmp_path: Path) -> None:
    row = {"context": "The cat sat.", "question": "Who?", "answers": [{"text": "cat", "answer_start": 4}]}
    rows = "".join(json.dumps(row | {"context": f"The cat sat. {i}"}) + "\n" for i in range(60))
    assert load_answers(write(tmp_path, {"x.jsonl": rows}) / "x.jsonl")["train"][0]["answers"] == {"text": ["cat"], "answer_start": [4]}


def test_the_faults_of_all_rows_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    rows = [{"context": f"The cat sat. {i}", "question": "Who?", "answers": {"text": ["cat"], "answer_start": [4 + (i in (41, 50))]}} for i in range(60)]
    path = write(tmp_path, {"x.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}) / "x.jsonl"
    refused(path, "x.jsonl, line 42", "'cat'", "character 5", "1 more row", do=load_answers)


# --- what would be trained on wrongly -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("extra_cell.csv", "text,label\n" + "Sorry, a kettle,good\n" * 4, ["extra_cell.csv, line 2", "3 cells", "the header has 2"]),
        ("trailing_comma.csv", "text,id\n" + "a kettle,100,\n" * 4, ["trailing_comma.csv, line 2", "3 cells", "at the end"]),
        ("missing_cell.csv", "id,text,label\n1,a kettle\nthat leaks,good,x\n", ["missing_cell.csv, line 2", "2 cells"]),
        ("lines.csv", 'text,label\n"a\nb",good\n"a"b,good\n', ["lines.csv, line 4", "not valid CSV"]),
        ("open.csv", f'{CSV}"an open quote,bad\n', ["open.csv, line 62", "not valid CSV"]),
        ("twice.csv", "text,text,label\na,b,good\n", ["twice.csv, line 1", "'text' 2 times"]),
        ("empty_label.csv", CSV.replace("kettle 4,bad", "kettle 4,"), ["empty_label.csv, line 6", "no value for 'label'"]),
        ("blank_label.csv", CSV.replace("kettle 4,bad", "kettle 4,  "), ["blank_label.csv, line 6", "'label' is '  '"]),
        ("empty_label.jsonl", JSONL.replace('"bad"', '""', 1), ["empty_label.jsonl, line 1", "'label' is ''"]),
        ("half.jsonl", JSONL.replace('"bad"', "0.5", 1), ["half.jsonl, line 1", "0.5"]),
        ("list.jsonl", JSONL.replace('"bad"', '["bad"]'), ["list.jsonl, line 1", "29 more rows"]),
        ("surrogate.jsonl", JSONL.replace("kettle 7", "kettle \\ud800"), ["surrogate.jsonl, line 8"]),
        ("long.jsonl", JSONL.replace('"a kettle 3"', json.dumps(["word"] * 9999)), ["long.jsonl, line 4", "..."]),
        ("number.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}\n", ["number.jsonl, line 1", "not valid JSON"]),
        ("one.json", json.dumps({"text": "a", "label": "b"}, indent=1), ["one.json", "one object", "expected one object a line"]),
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
    first, second = (load(write(tmp_path, {name: content}) / name) for name, content in (("a.jsonl", JSONL), ("b.jsonl", other)))
    assert (first.fingerprint == second.fingerprint) is not swapped


# --- folders and splits -------------------------------------------------------------------------------------------------


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
    beside = {"README.md": "#", ".git/x.jsonl": "{", "._train.jsonl": "\0", "__MACOSX/train.jsonl": "\0", "dataset_infos.json": "{}", "LICENSE.txt": "a"}
    write(tmp_path, {name: gzip.compress(data) if name.endswith(".gz") else data for name, data in files.items()} | beside)
    splits = load(tmp_path)
    assert by_split(splits) == {split: [row["text"] for row in ROWS[start : start + 20]] for split, start in (("train", 0), ("validation", 20), ("test", 40))}


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

    def load_dataset(name: str, configuration: str | None = None) -> DatasetDict:
        assert name == "nyu/glue"
        if configuration not in configurations:
            if configuration is None:
                raise ValueError(f"Config name is missing.\nPlease pick one among the available configs: {list(configurations)}\nExample of usage: ...")
            raise ValueError(f"BuilderConfig {configuration!r} not found. Available: {list(configurations)}")
        return configurations[configuration]

    monkeypatch.setattr(rows_of_data, "load_dataset", load_dataset)


def test_hub_data_sets_with_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    rows = Dataset.from_list(ROWS).cast(features)
    secret = Dataset.from_list([{"text": "a", "label": -1}]).cast(features)
    half = DatasetDict({"train": rows, "validation_matched": rows.select(range(10)), "validation_other": rows.select(range(10, 20)), "test": secret})
    hub(monkeypatch, sst2=half, cola=half)
    splits = load("nyu/glue:sst2")
    assert len(splits["validation"]) == 20 and splits["train"].features["label"].names == ["good", "bad"]
    assert len(splits["train"]) + len(splits["test"]) == 60  # labels that are kept secret are no test
    assert "test of nyu/glue:sst2 has no labels" in splits.notes[0] and "validation_matched and validation_other" in splits.notes[1]
    refused("nyu/glue", "several configurations", "nyu/glue:sst2", "cola")
    refused("nyu/glue:sst3", "no configuration 'sst3'", "did you mean 'sst2'")


# --- labels -------------------------------------------------------------------------------------------------------------


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
    assert splits["train"].features["label"].names == names and splits.header["labels"].startswith(f"{len(names)}: {names[0]}, ")
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
