"""From a data set's name to this rank's tensors: load rows, check them, order them, cut them into micro-batches, pack text.

The order depends on the seed and the global batch size only. How many ranks there are and how large a micro-batch is decide
who computes which rows of a step, never which rows a step has.
"""

import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import config as datasets_config
from datasets.fingerprint import Hasher

from lib.data.samples import SPLITS, split_of
from lib.data.sources import Source, find_sources, short
from lib.distributed import ranks
from lib.errors import ROOT, UserError, did_you_mean
from lib.progress import progress

# What decides what map_rows makes, besides the function: read now, as the files may change while a run goes on.
CODE = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "lib").rglob("*.py"))]
CODE += [importlib.metadata.version(package) for package in ("datasets", "tokenizers", "transformers")]


# --- rows ---------------------------------------------------------------------------------------------------------------


class Splits(dict[str, Dataset]):
    """The rows of a data set by split, {"train": ..., "validation": ..., "test": ...}, and what a run keeps and says of them."""

    fingerprint: str  # of the rows' content, whatever file they are in
    header: dict[str, str]  # lines for the header: the label names, the first training row
    notes: list[str]


@progress("loading the rows")
def load_rows(
    dataset: str, max_rows: int | None, text: dict[str, str], label: dict[str, str] | None = None, answers: dict[str, str] | None = None
) -> Splits:  # fmt: skip
    """The splits "train", "validation" and "test" of a data set, each row checked.

    dataset: see lib.data.sources.find_sources. max_rows: take only so many rows of each split, drawn at random; None: all.
    text, label, answers: the columns to keep, as {name here: name in the data}.
    - Text columns are text.
    - A label column may have text, whole numbers (1.0 is one), true and false, or class labels, and becomes class labels. Their names are
      those of all training rows, whole numbers in the order of numbers, all else in that of text; class labels keep their order.
    - Answers are as in SQuAD, {"text": [...], "answer_start": [...]}, with empty lists where there is none, and stand in the text "context".
    A split that the data does not have is taken out of its training rows, by a hash of the first text: a tenth each. Where that would leave
    no training row with some label, all rows that have the texts of its rows stay training rows.
    Rank 0 reads the data and writes it to a cache that goes by its content, which the other ranks and later starts map into memory.
    Raises UserError for the first faulty row, with file and line, and how many more there are.
    """
    columns = {**text, **(label or {}), **(answers or {})}
    for name, column in columns.items():
        other = next(other for other, its in columns.items() if its == column)
        if other != name:
            raise UserError(
                f"column '{column}' is set as the {other} and as the {name}, which are two; set the recipe's ..._column settings"
            )

    def read() -> str:
        return _read_rows(dataset, text, label or {}, answers or {})

    name_in_cache = ranks.on_rank0(read)

    @ranks.rank0_first
    def load() -> Splits:
        folder = _cache() / name_in_cache
        if not folder.is_dir() and read() != name_in_cache:  # on another machine
            raise UserError(f"dataset {dataset} has other rows on this machine than on that of rank 0")
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        rows = {split: Dataset.from_file(str(folder / f"{split}.arrow")) for split in SPLITS}
        for split in SPLITS:
            rows[
                split
            ]._fingerprint = (
                f"{facts['fingerprint']}-{split}"  # or what is cached of it would go by the time of the file
            )
            if max_rows is not None:
                rows[split] = rows[split].shuffle(seed=0).select(range(min(max_rows, len(rows[split]))))
        splits = Splits(rows)
        splits.fingerprint, splits.header, splits.notes = facts["fingerprint"], facts["header"], facts["notes"]
        return splits

    return load()


def map_rows(
    splits: dict[str, Dataset], function: Callable[..., dict[str, list[Any]]], **arguments: Any
) -> dict[str, Dataset]:
    """The splits that `function(rows, **arguments)` makes of these: {column: values} of some rows to those of as many rows, more or fewer.

    Rank 0 does it, the others read its cache.
    """
    # The name in the cache. Left to map, it would stay the same when code that it calls changes, and each rank would work it out for each split,
    # a quarter of a second for a tokenizer of 30,000 tokens.
    file = Path(inspect.getfile(getattr(function, "func", function)))  # func: of a functools.partial
    name = ranks.on_rank0(lambda: Hasher.hash((CODE, file.read_text(encoding="utf-8"), function, arguments)))

    def map_split(rows: Dataset, advance: Callable[[int], None]) -> Dataset:
        def counted(columns: dict[str, list[Any]], /, **arguments: Any) -> dict[str, list[Any]]:
            count = len(next(iter(columns.values())))
            result = function(columns, **arguments)
            advance(count)
            return result

        name_of_split = Hasher.hash((rows._fingerprint, name))
        return rows.map(
            counted, batched=True, fn_kwargs=arguments, remove_columns=rows.column_names, new_fingerprint=name_of_split
        )

    with progress("preparing the rows", sum(map(len, splits.values()))) as advance:
        return ranks.rank0_first(lambda: {split: map_split(rows, advance) for split, rows in splits.items()})()


def _cache() -> Path:
    """Of this machine: another may have another home folder."""
    return Path(datasets_config.HF_DATASETS_CACHE) / "zero_recipes"


def _read_rows(dataset: str, text: dict[str, str], label: dict[str, str], answers: dict[str, str]) -> str:
    """The name of the folder in the cache that has train.arrow, validation.arrow, test.arrow and facts.json of these rows, read if it was not there."""
    sources, notes = find_sources(dataset, {*text.values(), *label.values(), *answers.values()})
    content = [(split, source.digest) for split, part in sources.items() for source in part]
    folder = _cache() / Hasher.hash((CODE, text, label, answers, content))
    if folder.is_dir():
        return folder.name
    part = folder.with_name(f".{folder.name}-{os.getpid()}")
    part.mkdir(parents=True, exist_ok=True)
    try:
        reader = _Reader(dataset, sources, text, label, answers)
        header = reader.write(part)
        facts = {"fingerprint": reader.fingerprint(), "header": header, "notes": notes + reader.notes}
        (part / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        try:
            part.replace(folder)
        except OSError:
            if not folder.is_dir():  # else another process has read the same rows meanwhile
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder.name


class _Fault(Exception):
    """What is wrong with one row."""


class _Reader:
    """Reads the rows of a data set, checks them and writes them, as load_rows says."""

    def __init__(
        self,
        dataset: str,
        sources: dict[str, list[Source]],
        text: dict[str, str],
        label: dict[str, str],
        answers: dict[str, str],
    ):
        self.dataset, self.sources, self.text, self.label, self.answers = dataset, sources, text, label, answers
        self.missing = [split for split in SPLITS if split not in sources]
        self.notes: list[str] = []
        self.kept: set[int] = set()  # hashes of texts that stay training rows
        self.first_fault, self.faults = "", 0
        self.contents = {split: hashlib.blake2b(digest_size=16) for split in SPLITS}

    def fingerprint(self) -> str:
        """Of what `write` has written: the rows' content by split, and not its bytes, which change with the versions of pyarrow and datasets."""
        return hashlib.blake2b(
            b"".join(content.digest() for content in self.contents.values()), digest_size=16
        ).hexdigest()

    def write(self, folder: Path) -> dict[str, str]:
        """Write a file for each split. Returns lines for the header."""
        names = {name: self._label_names(name, column) for name, column in self.label.items()}
        features = Features(
            {name: Value("string") for name in self.text}
            | {name: ClassLabel(names=list(names[name])) for name in names}
        )
        features |= {
            name: {"text": List(Value("string")), "answer_start": List(Value("int64"))} for name in self.answers
        }
        schema, counts, first = features.arrow_schema, dict.fromkeys(SPLITS, 0), {}
        files = {split: pyarrow.ipc.new_stream(folder / f"{split}.arrow", schema) for split in SPLITS}
        self.contents["train"].update(json.dumps({name: list(known) for name, known in names.items()}).encode())
        waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        characters = 0

        def flush() -> None:
            for split, rows in waiting.items():
                if rows:
                    files[split].write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))
                    rows.clear()

        for split, source, place, values in self._rows():
            if split == "train" and not counts["train"]:
                first = dict(values)
            for name, known in names.items():
                if values[name] not in known:
                    self._note(
                        f"{source.name}, {place}",
                        f"label {short(values[name])} is in no training row{did_you_mean(values[name], known)} (there are {len(known)})",
                    )
                values[name] = known.get(values[name], -1)
            counts[split] += 1
            self.contents[split].update(json.dumps(values).encode())
            waiting[split].append(values)
            characters += sum(len(values[name]) for name in self.text)
            if len(waiting[split]) == 1000 or characters > 1e8:
                flush()
                characters = 0
        flush()
        for file in files.values():
            file.close()
        if self.faults:
            raise UserError(self.first_fault + (f" (one of {self.faults:,} faulty rows)" if self.faults > 1 else ""))
        for split, count in counts.items():
            if count == 0:
                raise UserError(
                    f"dataset {self.dataset}: its {split} split has no rows; give more rows, or a file for each split"
                )
        for known in names.values():
            if len(known) < 2:
                raise UserError(
                    f"the training rows have only one label ({next(iter(known))!r}); there is nothing to classify"
                )
        header = {"row 1": ", ".join(f"{name} {short(value)}" for name, value in first.items())}
        for known in names.values():
            header["labels"] = (
                f"{len(known)}: {', '.join(itertools.islice(known, 12))}{', ...' if len(known) > 12 else ''}"
            )
        return header

    def _label_names(self, name: str, column: str) -> dict[str, int]:
        """The label names of the training rows and their numbers. Notes the texts that must stay training rows."""
        first_text = next(iter(self.text))
        found: set[str] = set()
        elsewhere: dict[str, set[int]] = {}
        for split, _, _, values in self._rows():
            if split == "train":
                found.add(values[name])
            elif split in self.missing:  # it was given as a training row
                elsewhere.setdefault(values[name], set()).add(hash(values[first_text]))
        rare = elsewhere.keys() - found
        self.kept = set().union(*(elsewhere[label] for label in rare))
        if rare:
            self.notes.append(f"all rows of the rarest labels stay training rows: {short(', '.join(sorted(rare)))}")
        own = [list(source.label_names[column]) for source in self.sources["train"] if column in source.label_names]
        if len(own) == len(self.sources["train"]) and all(names == own[0] for names in own):
            return {label.strip(): number for number, label in enumerate(own[0])}
        return {label: number for number, label in enumerate(sorted(found | rare, key=_label_order))}

    def _rows(self) -> Iterator[tuple[str, Source, str, dict[str, Any]]]:
        """(split, source, place in it, values) of each row that is as it should be; the others are counted."""
        self.first_fault, self.faults = "", 0
        first_text = next(iter(self.text))
        for split, source in [(split, source) for split, part in self.sources.items() for source in part]:
            number = 0
            for number, (place, row) in enumerate(source.read(), 1):
                try:
                    self._check_columns(row, source.name, is_first=number == 1)
                    values = self._values(row)
                except _Fault as fault:
                    self._note(f"{source.name}, {place}", str(fault))
                    continue
                own = split_of(values[first_text]) if split == "train" and self.missing else split
                yield (
                    own if own in self.missing and hash(values[first_text]) not in self.kept else split,
                    source,
                    place,
                    values,
                )
            if number == 0:
                raise UserError(f"{source.name}: the file has no rows")

    def _note(self, place: str, fault: str) -> None:
        self.first_fault = self.first_fault or f"{place}: {fault}"
        self.faults += 1

    def _check_columns(self, row: Any, source: str, is_first: bool) -> None:
        """is_first: the row is the first one of a file, where a column that is missing is missing in all."""
        if not isinstance(row, dict):
            raise _Fault(f"expected an object, found {type(row).__name__}")
        if is_first:
            for column in (*self.text.values(), *self.label.values(), *self.answers.values()):
                if column not in row:
                    there = ", ".join(short(key) for key in itertools.islice(row, 12))
                    raise UserError(
                        f"{source}: no column '{column}'{did_you_mean(column, row)} (there are: {there}); set the recipe's ..._column settings"
                    )

    def _values(self, row: dict[str, Any]) -> dict[str, Any]:
        """{name: value} of a row."""
        values: dict[str, Any] = {}
        for name, column in (*self.text.items(), *self.label.items(), *self.answers.items()):
            value = row.get(column)
            if value is None or value != value:  # NaN
                raise _Fault(f"no value for '{column}'{did_you_mean(column, row) if column not in row else ''}")
            check = _text if name in self.text else _label if name in self.label else _answers
            found = check(value)
            if found is None:
                raise _Fault(f"'{column}' is {short(value)} ({type(value).__name__}), expected {EXPECTED[check]}")
            values[name] = found
        for name in self.answers:
            _check_answers(values["context"], values[name])
        return values


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and _is_unicode(value) else None


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which JSON can escape and UTF-8 cannot write."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _label(value: Any) -> str | None:
    """The name of a label, without space around it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None if isinstance(value, int | str) and _is_unicode(str(value)) else None


def _label_order(name: str) -> tuple[bool, int, str]:
    """Whole numbers first, in their order; then text."""
    is_number = re.fullmatch(r"-?[0-9]{1,18}", name) is not None
    return not is_number, int(name) if is_number else 0, name


def _answers(value: Any) -> dict[str, list[Any]] | None:
    if isinstance(value, list) and all(isinstance(answer, dict) for answer in value):  # one object an answer
        value = {name: [answer.get(name) for answer in value] for name in ("text", "answer_start")}
    if not isinstance(value, dict):
        return None
    texts, starts = value.get("text"), value.get("answer_start")
    if not (isinstance(texts, list) and isinstance(starts, list) and all(type(start) is int for start in starts)):
        return None
    return (
        {"text": texts, "answer_start": starts}
        if all(isinstance(text, str) and _is_unicode(text) for text in texts)
        else None
    )


EXPECTED: dict[Callable[[Any], Any], str] = {
    _text: "text", _label: "text, a whole number, true or false", _answers: '{"text": [...], "answer_start": [...]}, as in SQuAD',
}  # fmt: skip


def _check_answers(context: str, answers: dict[str, list[Any]]) -> None:
    """Raise a _Fault where an answer does not stand where it should."""
    if not context.strip():
        raise _Fault("the context is empty")
    if len(answers["text"]) != len(answers["answer_start"]):
        raise _Fault(f"{len(answers['text'])} answers, but {len(answers['answer_start'])} starts")
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if not text.strip() or start < 0 or context[start : start + len(text)] != text:
            raise _Fault(f"the answer {short(text)} is empty, or does not stand at character {start} of the context")
