"""The rows of a data set: loaded and checked, cached under a hash of their content, and changed by functions."""

import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import config as datasets_config
from datasets.fingerprint import Hasher

from lib.data.sources import Source, find_sources, short
from lib.data.splits import SPLITS, split_of
from lib.distributed import ranks
from lib.errors import ROOT, UserError, did_you_mean
from lib.progress import progress

# What is cached depends on this code, so each name in the cache has it in its hash. It is read now, because the files
# may change while a run goes on.
CODE = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "lib").rglob("*.py"))]
CODE += [importlib.metadata.version(package) for package in ("datasets", "tokenizers", "transformers")]


# Like find_sources: (dataset, columns) -> ({split: sources}, notes)
Find = Callable[[str, Collection[str]], tuple[dict[str, list[Source]], list[str]]]


class Splits(dict[str, Dataset]):
    """The rows of a data set by split, {"train": ..., "validation": ..., "test": ...}, and facts that a run records."""

    fingerprint: str  # a hash of the rows' content, whatever file the rows are in
    header: dict[str, str]  # lines for the header of the run: the label names, the first training row
    notes: list[str]
    documents: Any = None  # lib.data.streams.Documents, where the training rows are only the first of a stream


@progress("loading the rows")
def load_rows(
    dataset: str,
    max_rows: int | None,
    text: dict[str, str] | None = None,
    label: dict[str, str] | None = None,
    answers: dict[str, str] | None = None,
    messages: dict[str, str] | None = None,
    scored_rows: int | None = None,
    find: Find = find_sources,
) -> Splits:
    """The splits "train", "validation" and "test" of a data set, each row checked. Every rank must call it.

    dataset: see lib.data.sources.find_sources. max_rows: how many rows of each split to draw at random; None: all.
    scored_rows: how many of the validation and of the test split at most; None: all.
    find: gives the sources of the data set.
    messages, text, label, answers: the columns to keep, as {name here: name in the data}.
    - A column of messages has a list of them, {"role": ..., "content": ...} or {"from": ..., "value": ...}, or the text
      of one message. It becomes JSON, which lib.data.conversations.messages_of reads.
    - A text column has text.
    - A label column has text, whole numbers (1.0 is one), true and false, or class labels. It becomes class labels,
      whose names are those of all training rows: whole numbers in numerical order, then text in alphabetical order.
      Class labels keep their order.
    - Answers are as in SQuAD, {"text": [...], "answer_start": [...]}, with empty lists where there is no answer. Each
      answer stands in the text "context".
    A split that the data lacks is taken out of the training rows by a hash of the first text, a tenth of them for each
    split. If this would leave a label without training rows, the rows with that label stay training rows, and so do all
    other rows with the same first texts.
    Rank 0 reads the data and writes them to the cache; the other ranks and later starts map the cache into memory.
    Raises UserError for the first faulty row, with its file and line, and with the number of faulty rows.
    """
    messages, text = messages or {}, text or {}
    columns = {**messages, **text, **(label or {}), **(answers or {})}
    for name, column in columns.items():
        first_name = next(key for key, value in columns.items() if value == column)
        if first_name != name:
            raise UserError(
                f"column '{column}' is set as the {first_name} and as the {name}, which are two; "
                "set the recipe's ..._column settings"
            )

    def read() -> str:
        return _read_rows(dataset, find, messages, text, label or {}, answers or {})

    def content(name: str) -> str:
        return json.loads((_cache() / name / "facts.json").read_text(encoding="utf-8"))["fingerprint"]

    name_in_cache, expected = ranks.on_rank0(lambda: (name := read(), content(name)))

    @ranks.rank0_first
    def load() -> Splits:
        folder = _cache() / name_in_cache
        if not folder.is_dir():  # another machine than rank 0's: the same rows may be under another name there, since
            folder = _cache() / read()  # `datasets` tells versions of a file apart by its time and place
            if content(folder.name) != expected:
                raise UserError(f"dataset {dataset} has other rows on this machine than on that of rank 0")
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        rows = {split: Dataset.from_file(str(folder / f"{split}.arrow")) for split in SPLITS}
        for split in SPLITS:
            # `datasets` caches what it makes of the rows under this name; its own choice depends on the file's time.
            rows[split]._fingerprint = f"{facts['fingerprint']}-{split}"
            limits = [limit for limit in (max_rows, None if split == "train" else scored_rows) if limit is not None]
            if limits:
                rows[split] = rows[split].shuffle(seed=0).select(range(min(*limits, len(rows[split]))))
        splits = Splits(rows)
        splits.fingerprint, splits.header, splits.notes = facts["fingerprint"], facts["header"], facts["notes"]
        return splits

    return load()


def texts_of(source: Source, column: str, start: int = 0) -> Iterator[str]:
    """The text of each row of a source, from row number `start` (0, 1, ...) on. Raises UserError for a faulty row."""
    reader = _Reader(source.name, {}, messages={}, text={"text": column}, label={}, answers={})
    for number, (place, row) in enumerate(itertools.islice(source.read(), start, None), start):
        try:
            _check_columns(row, [column], source.name, is_first=number == 0)
            text = reader._values(row)["text"]
        except _Fault as fault:
            raise UserError(f"{source.name}, {place}: {fault}") from None
        yield text


def map_rows(
    splits: dict[str, Dataset], function: Callable[..., dict[str, list[Any]]], **arguments: Any
) -> dict[str, Dataset]:
    """The splits with the rows that `function(rows, **arguments)` returns. Every rank must call it.

    The function takes some rows as {column: values}, and returns as many rows, more or fewer in the same form. Rank 0
    calls it; the other ranks read the cache.
    """
    # The name in the cache, which `datasets` could choose too. But its name stays the same when code changes that the
    # function calls, and each rank would compute it for each split: 0.25 s for a tokenizer of 30,000 tokens.
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
    """The folder of the cache on this machine; the home folder of another machine may be a different one."""
    return Path(datasets_config.HF_DATASETS_CACHE) / "zero_recipes"


def _read_rows(
    dataset: str, find: Find, messages: dict[str, str], text: dict[str, str], label: dict[str, str],
    answers: dict[str, str],
) -> str:  # fmt: skip
    """Read the rows into a folder of the cache, if it is not there yet, and return the name of the folder.

    The folder has train.arrow, validation.arrow, test.arrow and facts.json.
    """
    sources, notes = find(dataset, {*messages.values(), *text.values(), *label.values(), *answers.values()})
    content = [(split, source.digest) for split, part in sources.items() for source in part]
    folder = _cache() / Hasher.hash((CODE, messages, text, label, answers, content))
    if folder.is_dir():
        return folder.name
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        reader = _Reader(dataset, sources, messages=messages, text=text, label=label, answers=answers)
        header = reader.write(unfinished)
        facts = {"fingerprint": reader.fingerprint(), "header": header, "notes": notes + reader.notes}
        (unfinished / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        try:
            unfinished.replace(folder)
        except OSError:
            if not folder.is_dir():  # if it is there, another process has read the same rows in the meantime
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder.name


class _Fault(Exception):
    """What is wrong with one row."""


class _Reader:
    """Reads the rows of a data set, checks them and writes them to files, as load_rows says."""

    def __init__(
        self,
        dataset: str,
        sources: dict[str, list[Source]],
        *,
        messages: dict[str, str],
        text: dict[str, str],
        label: dict[str, str],
        answers: dict[str, str],
    ):
        self.dataset, self.sources, self.label, self.answers = dataset, sources, label, answers
        self.messages, self.text = messages, {**messages, **text}  # which become text, too
        self.columns = {**messages, **text, **label, **answers}
        self.missing = [split for split in SPLITS if split not in sources]
        self.notes: list[str] = []
        self.kept: set[int] = set()  # hashes of first texts whose rows stay training rows
        self.first_fault, self.faults = "", 0
        self.contents = {split: hashlib.blake2b(digest_size=16) for split in SPLITS}

    def fingerprint(self) -> str:
        """A hash of the rows that `write` has written, by split.

        It is of their content: the bytes of the files change with the versions of pyarrow and datasets.
        """
        return hashlib.blake2b(
            b"".join(content.digest() for content in self.contents.values()), digest_size=16
        ).hexdigest()

    def write(self, folder: Path) -> dict[str, str]:
        """Write a file for each split. Returns lines for the header."""
        label_numbers = {name: self._label_numbers(name, column) for name, column in self.label.items()}
        schema = _features(self.text, label_numbers, self.answers).arrow_schema
        counts, first_row = dict.fromkeys(SPLITS, 0), {}
        files = {split: pyarrow.ipc.new_stream(folder / f"{split}.arrow", schema) for split in SPLITS}
        label_names = {name: list(numbers) for name, numbers in label_numbers.items()}
        self.contents["train"].update(json.dumps(label_names).encode())
        waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        characters = 0

        def flush() -> None:
            for split, rows in waiting.items():
                if rows:
                    files[split].write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))
                    rows.clear()

        for split, source, place, values in self._rows():
            if split == "train" and not counts["train"]:
                first_row = dict(values)
            for name, numbers in label_numbers.items():
                if values[name] not in numbers:
                    self._note(
                        f"{source.name}, {place}",
                        f"label {short(values[name])} is in no training row"
                        f"{did_you_mean(values[name], numbers)} (there are {len(numbers)})",
                    )
                values[name] = numbers.get(values[name], -1)
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
        for numbers in label_numbers.values():
            if len(numbers) < 2:
                raise UserError(
                    f"the training rows have only one label ({next(iter(numbers))!r}); there is nothing to classify"
                )
        return _header(first_row, label_names)

    def _label_numbers(self, name: str, column: str) -> dict[str, int]:
        """{label name: number} of the training rows. Sets self.kept to the texts whose rows must stay training rows."""
        first_text = next(iter(self.text))
        in_train: set[str] = set()
        taken_out: dict[str, set[int]] = {}  # label -> hashes of the texts that go to a split that the data lacks
        for split, _, _, values in self._rows():
            if split == "train":
                in_train.add(values[name])
            elif split in self.missing:
                taken_out.setdefault(values[name], set()).add(hash(values[first_text]))
        rare = taken_out.keys() - in_train
        self.kept = set().union(*(taken_out[label] for label in rare))
        if rare:
            self.notes.append(f"all rows of the rarest labels stay training rows: {short(', '.join(sorted(rare)))}")
        class_labels = [
            list(source.label_names[column]) for source in self.sources["train"] if column in source.label_names
        ]
        if len(class_labels) == len(self.sources["train"]) and all(names == class_labels[0] for names in class_labels):
            return {label.strip(): number for number, label in enumerate(class_labels[0])}
        return {label: number for number, label in enumerate(sorted(in_train | rare, key=_label_order))}

    def _rows(self) -> Iterator[tuple[str, Source, str, dict[str, Any]]]:
        """(split, source, place in the source, values) of each row without a fault. Faulty rows are counted."""
        self.first_fault, self.faults = "", 0
        first_text = next(iter(self.text))
        for given_split, source in [(split, source) for split, part in self.sources.items() for source in part]:
            number = 0
            for number, (place, row) in enumerate(source.read(), 1):
                try:
                    _check_columns(row, self.columns.values(), source.name, is_first=number == 1)
                    values = self._values(row)
                except _Fault as fault:
                    self._note(f"{source.name}, {place}", str(fault))
                    continue
                split = given_split
                if given_split == "train" and self.missing and hash(values[first_text]) not in self.kept:
                    hashed_split = split_of(values[first_text])
                    split = hashed_split if hashed_split in self.missing else given_split
                yield split, source, place, values
            if number == 0:
                raise UserError(f"{source.name}: the file has no rows")

    def _note(self, place: str, fault: str) -> None:
        self.first_fault = self.first_fault or f"{place}: {fault}"
        self.faults += 1

    def _values(self, row: dict[str, Any]) -> dict[str, Any]:
        """{name: value} of a row."""
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            value = row.get(column)
            if value is None or value != value:  # NaN
                raise _Fault(f"no value for '{column}'{did_you_mean(column, row) if column not in row else ''}")
            check = _check_of(name, self.messages, self.text, self.label)
            checked = check(value)
            if checked is None:
                raise _Fault(f"'{column}' is {short(value)} ({type(value).__name__}), expected {EXPECTED[check]}")
            values[name] = checked
        for name in self.answers:
            _check_answers(values["context"], values[name])
        return values


def _check_of(name: str, messages: Iterable[str], text: Iterable[str], label: Iterable[str]) -> Callable[[Any], Any]:
    if name in messages:
        return _messages
    return _text if name in text else _label if name in label else _answers


def _features(text: Iterable[str], label_names: Mapping[str, Iterable[str]], answers: Iterable[str]) -> Features:
    """The types of the columns in a file of rows."""
    columns: dict[str, Any] = {name: Value("string") for name in text}
    columns |= {name: ClassLabel(names=list(names)) for name, names in label_names.items()}
    columns |= {name: {"text": List(Value("string")), "answer_start": List(Value("int64"))} for name in answers}
    return Features(columns)


def _header(first_row: dict[str, Any], label_names: dict[str, list[str]]) -> dict[str, str]:
    """Lines for the header of the run."""
    header = {"row 1": ", ".join(f"{name} {short(value)}" for name, value in first_row.items())}
    for names in label_names.values():
        header["labels"] = f"{len(names)}: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    return header


def _check_columns(row: Any, columns: Iterable[str], source: str, is_first: bool) -> None:
    """Raise a _Fault if the row is no object; raise UserError if it is the first of a file and lacks a column.

    A column that the first row lacks is missing in the whole file.
    """
    if not isinstance(row, dict):
        raise _Fault(f"expected an object, found {type(row).__name__}")
    if is_first:
        for column in columns:
            if column not in row:
                known = ", ".join(short(key) for key in itertools.islice(row, 12))
                raise UserError(
                    f"{source}: no column '{column}'{did_you_mean(column, row)} (there are: {known}); "
                    "set the recipe's ..._column settings"
                )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and _is_unicode(value) else None


ROLES = {"human": "user", "gpt": "assistant"}  # the names in {"from": ..., "value": ...}, where they are others


def _messages(value: Any) -> str | None:
    if isinstance(value, str) and _is_unicode(value):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, list) or not value:
        return None
    found = []
    for message in value:
        if not isinstance(message, dict):
            return None
        known = {name: part for name, part in message.items() if part is not None}  # Parquet has all names in each row
        if "from" in known and "value" in known:
            known = {"role": ROLES.get(str(known["from"]), known["from"]), "content": known["value"]}
        content = known.get("content", "")  # which a call of a tool lacks
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text")) for part in content)
        if not isinstance(known.get("role"), str) or not isinstance(content, str) or not _is_unicode(content):
            return None
        found.append(known | {"content": content})
    return json.dumps(found, ensure_ascii=False)


def _is_unicode(text: str) -> bool:
    """Whether the text has no half of a surrogate pair: JSON can have one as an escape, UTF-8 cannot encode it."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _label(value: Any) -> str | None:
    """The name of a label, without space around it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None if isinstance(value, int | str) and _is_unicode(str(value)) else None


def _label_order(name: str) -> tuple[bool, int, str]:
    """A sorting key: whole numbers in numerical order, then text."""
    is_number = re.fullmatch(r"-?[0-9]{1,18}", name) is not None
    return not is_number, int(name) if is_number else 0, name


def _answers(value: Any) -> dict[str, list[Any]] | None:
    if isinstance(value, list) and all(isinstance(answer, dict) for answer in value):  # one object for each answer
        value = {name: [answer.get(name) for answer in value] for name in ("text", "answer_start")}
    if not isinstance(value, dict):
        return None
    texts, starts = value.get("text"), value.get("answer_start")
    if not (isinstance(texts, list) and isinstance(starts, list) and all(type(start) is int for start in starts)):
        return None
    if not all(isinstance(text, str) and _is_unicode(text) for text in texts):
        return None
    return {"text": texts, "answer_start": starts}


EXPECTED: dict[Callable[[Any], Any], str] = {
    _messages: 'text, or a list of {"role": ..., "content": ...} or {"from": ..., "value": ...}',
    _text: "text",
    _label: "text, a whole number, true or false",
    _answers: '{"text": [...], "answer_start": [...]}, as in SQuAD',
}


def _check_answers(context: str, answers: dict[str, list[Any]]) -> None:
    """Raise a _Fault where an answer is not in the context at the place that it names."""
    if not context.strip():
        raise _Fault("the context is empty")
    if len(answers["text"]) != len(answers["answer_start"]):
        raise _Fault(f"{len(answers['text'])} answers, but {len(answers['answer_start'])} starts")
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if not text.strip() or start < 0 or context[start : start + len(text)] != text:
            raise _Fault(f"the answer {short(text)} is empty, or does not stand at character {start} of the context")
