"""From a data set's name to this rank's tensors: load rows, check them, order them, cut them into micro-batches, pack text.

The order depends on the seed and the global batch size only. How many ranks there are and how large a micro-batch is decide
who computes which rows of a step, never which rows a step has.
"""

import csv
import functools
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.parquet
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset
from datasets.fingerprint import Hasher

from lib import ranks
from lib.config import UserError, did_you_mean, shown
from lib.progress import progress
from lib.samples import SAMPLES, SPLITS, load_sample, split_of

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
IGNORED = -100  # the label that torch's cross entropy leaves out

# What decides what map_rows makes, besides the function: read now, as the files may change while a run goes on.
CODE = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
CODE += [importlib.metadata.version(package) for package in ("datasets", "tokenizers", "transformers")]

Batch = dict[str, torch.Tensor]


# --- rows ---------------------------------------------------------------------------------------------------------------


@progress("loading the rows")
def load_rows(
    dataset: str, max_rows: int | None, text: dict[str, str], label: dict[str, str] | None = None, answers: dict[str, str] | None = None
) -> dict[str, Dataset]:  # fmt: skip
    """The splits "train", "validation" and "test" of a data set, each row checked, every column as text.

    dataset: a built-in sample, a .jsonl, .csv or .parquet file, a folder of such files, or an id on the Hugging Face hub.
    max_rows: take only so many rows of each split, drawn at random; None: all.
    text, label, answers: the columns to keep, as {name here: name in the data}. A label may be a number or a hub's class label. Answers
    are as in SQuAD: {"text": [...], "answer_start": [...]}, with empty lists for a question that has none.
    A split that the data does not have is taken out of its training rows, by a hash of the text: a tenth each.
    In a folder, files whose names begin with train, validation (valid, val, dev) or test are those splits.
    Rank 0 loads first, the others from its cache. Raises UserError, naming file and row where there are any.
    """
    splits = ranks.rank0_first(lambda: _load_rows(dataset, text, label or {}, answers or {}))
    if max_rows is None:
        return splits
    return {split: rows.shuffle(seed=0).select(range(min(max_rows, len(rows)))) for split, rows in splits.items()}


def map_rows(splits: dict[str, Dataset], function: Callable[..., dict[str, list[Any]]], **arguments: Any) -> dict[str, Dataset]:
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
        return rows.map(counted, batched=True, fn_kwargs=arguments, remove_columns=rows.column_names, new_fingerprint=name_of_split)

    with progress("preparing the rows", sum(map(len, splits.values()))) as advance:
        return ranks.rank0_first(lambda: {split: map_split(rows, advance) for split, rows in splits.items()})


def _load_rows(dataset: str, text: dict[str, str], label: dict[str, str], answers: dict[str, str]) -> dict[str, Dataset]:
    columns = {**text, **label, **answers}
    for name, column in columns.items():
        other = next(other for other, its in columns.items() if its == column)
        if other != name:
            raise UserError(f"column '{column}' is set as the {other} and as the {name}, which are two; set the recipe's ..._column settings")
    files: dict[str, list[Path]] = {}
    path = Path(dataset)
    if dataset in SAMPLES:
        loaded = load_sample(dataset)
    elif path.exists():
        files = _files(path)
        loaded = _load_files(files, columns, set(text.values()), set(answers.values()))
    elif path.suffix in FORMATS or dataset.startswith((".", "/", "~")):
        raise UserError(f"dataset {dataset}: no such file or folder (looked from {Path.cwd()})")
    else:
        loaded = _load_hub(dataset)
    splits = {}
    for split, rows in loaded.items():
        for column in columns.values():
            if column not in rows.column_names:
                raise UserError(
                    f"dataset {dataset}: no column '{column}' in its {split} rows{did_you_mean(column, rows.column_names)} "
                    f"(there are: {', '.join(rows.column_names)}); set the recipe's ..._column settings"
                )
        rows = rows.select_columns(list(columns.values())).rename_columns({old: new for new, old in columns.items() if old != new})
        for name in answers:
            if not _are_answers(rows.features[name]):
                raise UserError(f"dataset {dataset}, {split} rows, column '{columns[name]}': expected {ANSWERS}, found {rows.features[name]}")
        for name in (*text, *label):
            rows = _as_text(rows, name, f"dataset {dataset}, {split} rows, column '{columns[name]}'", number_allowed=name in label)
        splits[split] = rows
    for split in SPLITS[1:]:
        if split not in splits:
            first = next(iter(text))
            of_row = [split_of(row) for row in splits["train"][first]]
            splits[split] = splits["train"].select([row for row, its in enumerate(of_row) if its == split])
            splits["train"] = splits["train"].select([row for row, its in enumerate(of_row) if its != split])
    for split, rows in splits.items():
        if len(rows) == 0:
            raise UserError(f"dataset {dataset}: its {split} split has no rows; give more rows, or a file for each split")
    return splits


def _files(path: Path) -> dict[str, list[Path]]:
    """Split -> files. A single file, or a folder without files named after splits, is all training rows."""
    found = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in FORMATS and file.is_file())
    if not found or (path.is_file() and path.suffix not in FORMATS):
        raise UserError(f"dataset {path}: no {', '.join(FORMATS)} files there")
    if len({FORMATS[file.suffix] for file in found}) > 1:
        raise UserError(f"dataset {path}: files of more than one format: {', '.join(file.name for file in found)}; keep one")
    for file in found:
        if file.stat().st_size == 0:
            raise UserError(f"{shown(file)}: the file is empty")
    by_split = {split: [file for file in found if re.match(rf"({'|'.join(names)})([^a-z]|$)", file.stem.lower())] for split, names in SPLIT_NAMES.items()}
    if path.is_file() or not by_split["train"]:
        return {"train": found}
    other = set(found) - set(itertools.chain.from_iterable(by_split.values()))
    if other:
        raise UserError(f"dataset {path}: {min(other).name} is named after no split, but other files are; rename it (train-..., say) or move it away")
    return {split: files for split, files in by_split.items() if files}


ANSWERS = '{"text": [...], "answer_start": [...]}, as in SQuAD'


def _are_answers(feature: Any) -> bool:
    """Whether a column holds what ANSWERS says (lists that are empty in all rows have no type)."""
    of = {name: getattr(getattr(feature.get(name), "feature", None), "dtype", None) for name in ("text", "answer_start")} if isinstance(feature, dict) else {}
    return bool(of) and of["text"] in ("string", "large_string", "null") and str(of["answer_start"]).startswith(("int", "null"))


def _load_files(files: dict[str, list[Path]], columns: dict[str, str], text_columns: set[str], answers_columns: set[str]) -> DatasetDict:
    kind = FORMATS[next(iter(files.values()))[0].suffix]
    cause: BaseException | None = None
    try:
        options: dict[str, Any] = {}
        if kind == "csv":  # no guessing: "NA" and "007" are text
            with next(iter(files.values()))[0].open(encoding="utf-8-sig", newline="") as file:
                header = next(csv.reader(file))
            options = {"features": Features(dict.fromkeys(header, Value("string"))), "keep_default_na": False}
        loaded = load_dataset(kind, data_files={split: [str(file) for file in part] for split, part in files.items()}, **options)
        for rows in loaded.values():
            rows.data.validate(full=True)  # pyarrow reads bytes that are not UTF-8 without a word
        wrong = any(
            rows.data.column(column).null_count
            or (column in text_columns and rows.features[column] != Value("string"))
            or (column in answers_columns and not _are_answers(rows.features[column]))
            or (kind == "csv" and pyarrow.compute.any(pyarrow.compute.equal(rows.data.column(column), "")).as_py())  # an empty cell, or a missing one
            for rows in loaded.values()
            for column in columns.values()
            if column in rows.column_names
        )
    except Exception as error:  # each format's reader has its own kinds
        wrong, cause = True, error.__cause__ or error
    if wrong:
        for path in itertools.chain.from_iterable(files.values()):
            _find_bad_row(path, columns.values(), text_columns, answers_columns)
        if cause is not None:
            raise UserError(f"dataset {shown(next(iter(files.values()))[0])}: cannot be read: {cause}")
    return loaded


def _rows_of_file(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) for each row of a file, read slowly and plainly. Raises UserError where a row cannot be read."""
    if file.suffix == ".parquet":
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            for number, row in enumerate(itertools.chain.from_iterable(part.to_pylist() for part in parquet.iter_batches()), 1):
                yield f"{shown(file)}, row {number}", row
        except pyarrow.ArrowException as error:
            raise UserError(f"{shown(file)}: not a readable Parquet file: {error}") from None
        return
    lines: list[tuple[int, str]] = []
    for number, raw in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            lines.append((number, raw.decode("utf-8-sig" if number == 1 else "utf-8")))
        except UnicodeDecodeError as error:
            raise UserError(f"{shown(file)}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8; convert the file to UTF-8") from None
    if file.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(f"{line}\n" for _, line in lines)
        header = next(reader, [])
        for cells in reader:
            if len(cells) > len(header):
                raise UserError(f"{shown(file)}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}; quote cells that contain commas")
            if cells:
                yield f"{shown(file)}, line {reader.line_num}", dict(zip(header, cells, strict=False))
        return
    text = "\n".join(line for _, line in lines)
    if text.lstrip()[:1] == "[":  # one array of objects
        try:
            yield from ((f"{shown(file)}, element {number}", row) for number, row in enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise UserError(f"{shown(file)}, line {error.lineno}: not valid JSON: {error.msg}") from None
        return
    for number, line in lines:  # one object a line
        if line.strip():
            try:
                yield f"{shown(file)}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{shown(file)}, line {number}: not valid JSON: {error.msg}") from None


def _find_bad_row(file: Path, columns: Iterable[str], text_columns: set[str], answers_columns: set[str]) -> None:
    """Raise a UserError that names the first row of a file that is not what it should be, if there is one."""
    place = None
    for place, row in _rows_of_file(file):
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object, found {type(row).__name__}")
        for column in columns:
            if row.get(column) is None:
                raise UserError(f"{place}: no value for '{column}'{did_you_mean(column, row) if column not in row else ''}")
            if column in answers_columns:
                texts, starts = (row[column].get(name) if isinstance(row[column], dict) else None for name in ("text", "answer_start"))
                if not (
                    isinstance(texts, list)
                    and isinstance(starts, list)
                    and all(isinstance(text, str) for text in texts)
                    and all(type(start) is int for start in starts)
                ):
                    raise UserError(f"{place}: '{column}' is {row[column]!r}, expected {ANSWERS}")
                continue
            allowed = str if column in text_columns else (str, int)
            if not isinstance(row[column], allowed):
                wanted = "text" if column in text_columns else "text or a whole number"
                raise UserError(f"{place}: '{column}' is {row[column]!r} ({type(row[column]).__name__}), expected {wanted}")
    if place is None:
        raise UserError(f"{shown(file)}: the file has no rows")


def _load_hub(dataset: str) -> DatasetDict:
    try:
        loaded = load_dataset(dataset)
    except Exception as error:  # network, missing, gated, broken: the library has a class for each
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"dataset {dataset}: no built-in sample ({', '.join(SAMPLES)}), no file or folder, and not to be had from the "
            f"Hugging Face hub ({type(error).__name__}: {reason})"
        ) from None
    named: dict[str, list[Dataset]] = {}
    for name, rows in loaded.items():
        for split, names in SPLIT_NAMES.items():
            if str(name).startswith(names):
                named.setdefault(split, []).append(rows)
    if "train" not in named:
        raise UserError(f"dataset {dataset}: it has no train split (there are: {', '.join(map(str, loaded))})")
    return DatasetDict({split: concatenate_datasets(parts) for split, parts in named.items()})


def _as_text(rows: Dataset, column: str, where: str, number_allowed: bool) -> Dataset:
    feature = rows.features[column]
    nulls = rows.data.column(column).null_count
    if nulls:
        raise UserError(f"{where}: {nulls} rows have no value")
    if isinstance(feature, ClassLabel):
        if min(rows[column], default=0) < 0:
            raise UserError(f"{where}: rows without a label (-1, as in test splits kept secret); take a data set with labels")
        return rows.map(lambda batch: {column: feature.int2str(batch[column])}, batched=True, features=rows.features.copy() | {column: Value("string")})
    if feature == Value("string"):
        return rows
    if feature == Value("large_string") or (number_allowed and isinstance(feature, Value) and "int" in feature.dtype):
        return rows.cast_column(column, Value("string"))
    raise UserError(f"{where}: expected {'text or whole numbers' if number_allowed else 'text'}, found {feature}")


def label_ids(splits: dict[str, Dataset], label: str = "label") -> list[str]:
    """The label names, sorted; id i is the i-th. They are those of the training rows: an unknown one elsewhere is an error."""
    names = sorted(set(splits["train"][label]))
    if len(names) < 2:
        raise UserError(f"the training rows have only one label ({names[0]!r}); there is nothing to classify")
    for split in SPLITS[1:]:
        for number, value in enumerate(splits[split][label], 1):
            if value not in names:
                raise UserError(f"{split} rows, row {number}: label {value!r} is in no training row{did_you_mean(value, names)} (there are {len(names)})")
    return names


def check_answers(splits: dict[str, Dataset]) -> None:
    """Raise a UserError where an answer does not stand where it should in the context, as "answers" and "context" say."""
    for split, rows in splits.items():
        for number, (context, answers) in enumerate(zip(rows["context"], rows["answers"], strict=True), 1):
            if not context.strip():
                raise UserError(f"{split} rows, row {number}: the context is empty")
            if len(answers["text"]) != len(answers["answer_start"]):
                raise UserError(f"{split} rows, row {number}: {len(answers['text'])} answers, but {len(answers['answer_start'])} starts")
            for text, start in zip(answers["text"], answers["answer_start"], strict=True):
                if not text.strip() or context[start : start + len(text)] != text:
                    raise UserError(f"{split} rows, row {number}: the answer {text!r} is empty, or does not stand at character {start} of the context")


# --- batches ------------------------------------------------------------------------------------------------------------


class StepRows:
    """Which rows an optimizer step trains on, as a function of the step alone, so that a run can start at any step.

    Epochs follow each other without a gap: step s takes the rows s * batch_size up to (s + 1) * batch_size of the endless
    sequence of the epochs' shuffles, so each row comes exactly once an epoch. With `lengths`, the sequence is taken in windows of
    up to 64 steps, sorted by length inside a window and cut into batches, whose order is shuffled again: rows of one batch
    then have nearly one length, and little is padded.
    """

    def __init__(self, total: int, batch_size: int, seed: int, lengths: Sequence[int] | np.ndarray | None = None):
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.steps_per_window = 1 if lengths is None else max(1, min(64, total // batch_size))
        self.epoch = functools.lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(total))
        self.window = functools.lru_cache(1)(self._window)

    def _window(self, window: int) -> np.ndarray:
        """[steps_per_window, batch_size] row numbers."""
        positions = np.arange(self.steps_per_window * self.batch_size) + window * self.steps_per_window * self.batch_size
        rows = np.concatenate([self.epoch(e)[positions[positions // self.total == e] % self.total] for e in np.unique(positions // self.total)])
        if self.lengths is None:
            return rows.reshape(1, -1)
        rows = rows[np.argsort(self.lengths[rows], kind="stable")].reshape(self.steps_per_window, -1)
        return rows[np.random.default_rng((self.seed, window, 1)).permutation(self.steps_per_window)]

    def __getitem__(self, step: int) -> np.ndarray:
        """[batch_size] row numbers of step 0, 1, ..."""
        return self.window(step // self.steps_per_window)[step % self.steps_per_window]


def training_batches(
    rows: Any, collate: Callable[[dict[str, Any]], Batch], batch_size: int, micro_batch_size: int, seed: int,
    device: torch.device, lengths: Sequence[int] | None = None, start: int = 0,
) -> Iterator[list[Batch]]:  # fmt: skip
    """For each optimizer step, this rank's micro-batches: a list of accumulation_steps dicts of tensors on `device`.

    rows: indexed with a list of row numbers it gives {column: values}, as a datasets.Dataset does; collate makes tensors of that.
    Beside the columns it gets "draw", one random 64-bit number a row and step: what is random in a batch and made from these (masks,
    negatives) does not depend on the number of ranks. batch_size: rows a step over all ranks; a multiple of micro_batch_size *
    world_size. lengths: see StepRows.
    """
    step_rows = StepRows(len(rows), batch_size, seed, lengths)
    for step in itertools.count(start):
        draws = np.random.SeedSequence((seed, step, 2)).generate_state(batch_size, np.uint64)
        # Neighbours in length go to different ranks at the same time, so that no rank waits long for another.
        own = np.arange(batch_size).reshape(-1, micro_batch_size)[ranks.rank() :: ranks.world_size()]
        yield [to_device(collate({**rows[step_rows[step][part].tolist()], "draw": draws[part]}), device) for part in own]


def evaluation_batches(
    rows: Any, collate: Callable[[dict[str, Any]], Batch], batch_size: int, device: torch.device,
    lengths: Sequence[int] | None = None,
) -> Iterator[tuple[Batch, torch.Tensor]]:  # fmt: skip
    """(batch, row numbers [batch_size]) until every row was on exactly one rank.

    All ranks get the same number of batches, because under ZeRO-3 a forward pass needs all of them. Where rows do not suffice,
    fillers (copies of a row) have the row number -1: leave their results out. "draw" is the same number for a row at each evaluation.
    """
    draws = np.random.SeedSequence(0).generate_state(len(rows), np.uint64)
    order = np.arange(len(rows)) if lengths is None else np.argsort(np.asarray(lengths), kind="stable")[::-1]
    share = batch_size * ranks.world_size()
    fillers = -len(order) % share
    numbers = np.concatenate([order, np.full(fillers, -1)]).reshape(-1, batch_size)
    for batch in numbers[ranks.rank() :: ranks.world_size()]:
        filled = np.where(batch < 0, order[-1], batch)
        yield to_device(collate({**rows[filled.tolist()], "draw": draws[filled]}), device), torch.as_tensor(batch, device=device)


def pad(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Sequences of any lengths, filled up with `value`: [rows, longest], int64."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(sequence, dtype=torch.long) for sequence in sequences], batch_first=True, padding_value=value)


def pad_tokens(sequences: Sequence[Sequence[int]], pad_token_id: int) -> Batch:
    """Token ids of any lengths -> input_ids and attention_mask (1: a token, 0: padding), [rows, longest]."""
    return {"input_ids": pad(sequences, pad_token_id), "attention_mask": pad([[1] * len(sequence) for sequence in sequences], 0)}


def random_numbers(draws: np.ndarray, count: int) -> np.ndarray:
    """[rows, count] random numbers, uniform on [0, 1), that depend on each row's draw alone: splitmix64 (Steele et al. 2014)."""
    bits = draws[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


# --- language modelling -------------------------------------------------------------------------------------------------


class Blocks:
    """A stream of tokens cut into blocks without padding: indexed with a list of numbers, it gives their inputs and labels.

    Block i has the inputs tokens[i*length : (i+1)*length] and, as labels, the tokens that follow each of them, so every token of the
    stream but the first is predicted exactly once. A last, shorter block is filled up with ignored labels, or left out with drop_last.
    """

    def __init__(self, tokens: np.ndarray, length: int, drop_last: bool):
        self.tokens, self.length = tokens, length
        predicted = len(tokens) - 1
        self.count = predicted // length if drop_last else -(-predicted // length)
        if self.count == 0:
            raise UserError(f"{len(tokens)} tokens of text do not fill one block of max_length {length}; give more rows, or set a smaller --max_length")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, numbers: list[int]) -> dict[str, np.ndarray]:
        """{"input_ids": [n, length], "labels": [n, length]}, int64."""
        input_ids = np.zeros((len(numbers), self.length), dtype=np.int64)
        labels = np.full((len(numbers), self.length), IGNORED, dtype=np.int64)
        for row, number in enumerate(numbers):
            part = self.tokens[number * self.length : (number + 1) * self.length + 1]
            input_ids[row, : len(part) - 1] = part[:-1]
            labels[row, : len(part) - 1] = part[1:]
        return {"input_ids": input_ids, "labels": labels}


def collate_blocks(blocks: dict[str, Any]) -> Batch:
    """What Blocks give -> input_ids and labels, [rows, length]."""
    return {name: torch.from_numpy(blocks[name]) for name in ("input_ids", "labels")}


def token_streams(splits: dict[str, Dataset], tokenizer: Any) -> dict[str, np.ndarray]:
    """The documents (column "text") of each split as one stream of tokens, an end-of-text token after each."""

    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end-of-text token, which is to stand between documents; take a decoder, or set its eos_token and save it")

    def tokenize(rows: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
        encoded = tokenizer(rows["text"], add_special_tokens=False, verbose=False)  # verbose: a document may exceed the model's limit
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}

    return {split: token_stream(rows) for split, rows in map_rows(splits, tokenize, tokenizer=tokenizer).items()}


@progress("joining the tokens")
def token_stream(rows: Dataset, column: str = "input_ids") -> np.ndarray:
    """All token ids (or other numbers in lists) of a data set one after the other, [tokens] int32, in a file that all ranks map into memory.

    Rank 0 writes it beside the data set's own cache, under its fingerprint.
    """
    folder = Path(rows.cache_files[0]["filename"]).parent if rows.cache_files else None
    if folder is None:
        return np.asarray(list(itertools.chain.from_iterable(rows[column])), dtype=np.int32)
    file = folder / f"{column}-{rows._fingerprint}.npy"

    def write() -> None:
        if not file.exists():
            chunks = rows.with_format("arrow")[:].column(column).chunks
            part = file.with_name(f".{file.name}-{os.getpid()}")
            with part.open("wb") as out:
                np.save(out, np.concatenate([chunk.flatten().to_numpy().astype(np.int32) for chunk in chunks]))
            part.replace(file)

    ranks.rank0_first(write)  # once on each machine
    return np.load(file, mmap_mode="r")
