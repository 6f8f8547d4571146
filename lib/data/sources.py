"""The rows of a user's data set, each with its place in the file. Values are taken as they are written, never guessed.

Rows are read one after the other. Only a JSON document that is one array or one object is read into memory whole.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, load_dataset, load_from_disk

from lib.data.samples import SAMPLES, load_sample
from lib.data.splits import SPLITS
from lib.errors import UserError, did_you_mean, display_path

FORMATS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
SPLIT_NAMES = {  # split -> the words in the name of a file or folder that stand for it
    "train": r"train(ing)?(set|data)?",
    "validation": r"(val(id(ation)?)?|dev(el(opment)?)?|eval(uation)?)(set|data)?",
    "test": r"test(ing)?(set|data)?",
}
# Files and folders that lie beside the data and have no rows.
NO_DATA = re.compile(r"[._].*|(readme|licen[cs]e)\..*|(dataset_infos?|dataset_dict|state)\.json", re.IGNORECASE)

Rows = Iterator[tuple[str, Any]]  # (place in the source, row), such as ("line 3", {"text": ...})


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, or a part of a data set, with rows of one split."""

    name: str
    digest: str  # changes with the content
    read: Callable[[], Rows]  # raises UserError where the source cannot be read
    # {column: the name of each label number}, for the columns that are class labels
    label_names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def find_sources(
    dataset: str, columns: Collection[str], streaming: bool = False
) -> tuple[dict[str, list[Source]], list[str]]:
    """({split: sources}, notes for the user). There is a "train" split; "validation" and "test" may be missing.

    dataset: a built-in sample, a file, a folder of files, a folder of save_to_disk, or `name[:configuration]` on the
    Hugging Face hub.
    columns: those that will be read; others may be left out of the rows.
    streaming: read nothing whole now, and no data set of the hub to the disk; then a file's digest is of its name and
    size alone, and the labels of a data set on the hub stay numbers.
    Raises UserError where there is no such data set, or where it is not clear which rows are of which split.
    """
    path = Path(dataset).expanduser()
    if dataset in SAMPLES:
        return _of_datasets(dataset, load_sample(dataset), columns)
    if os.path.exists(path):  # noqa: PTH110  (Path.exists raises an error where a name is too long)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved(path, columns, streaming)
        files, notes = _files(path)
        return {split: [_of_file(file, columns, streaming) for file in part] for split, part in files.items()}, notes
    if _format(path) or dataset.startswith((".", "/", "~")):
        raise UserError(f"dataset {dataset}: no such file or folder (looked from {Path.cwd()})")
    if re.search(r"=[0-9.]+(,|$)", dataset):
        raise UserError(f"dataset {dataset}: a mixture of data sets is read with --streaming, where the recipe has it")
    loaded = _load_hub(dataset, streaming)
    return _of_streams(dataset, loaded) if streaming else _of_datasets(dataset, loaded, columns)


def digest_of(files: Sequence[Path]) -> str:
    """A hash of the content of files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def short(value: Any) -> str:
    """A value as a message shows it: at most 80 characters, the end cut off."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- which files, which splits ---------------------------------------------------------------------------------------


def _suffix(file: Path) -> tuple[str, str | None]:
    """(the suffix of the format in lower case, the kind of compression or None)"""
    name = Path(file.name.lower())
    compression = COMPRESSIONS.get(name.suffix)
    return Path(name.stem).suffix if compression else name.suffix, compression


def _format(file: Path) -> str | None:
    suffix, compression = _suffix(file)
    return None if compression and suffix == ".parquet" else FORMATS.get(suffix)


def _splits_named(name: str) -> list[str]:
    """The splits whose words are in a name, such as dev-00000-of-00001.jsonl or my_train.csv."""
    words = re.split(r"[^a-z]+", name.lower())
    return [split for split, pattern in SPLIT_NAMES.items() if any(re.fullmatch(pattern, word) for word in words)]


def _files(path: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """({split: files}, notes). A single file, or a folder without files named after splits, is all training rows."""
    readable = f"{', '.join(FORMATS)}, each but .parquet also with {', '.join(COMPRESSIONS)}"
    if path.is_file():
        if _format(path) is None:
            raise UserError(
                f"dataset {path}: a file of this kind is not read ({readable} are); convert it to one of them"
            )
        files = [path]
    else:
        inner = sorted(
            file
            for file in path.rglob("*")
            if not any(map(NO_DATA.fullmatch, file.relative_to(path).parts)) and file.is_file()
        )
        files = [file for file in inner if _format(file)]
        files = [file for file in files if _format(file) != "text"] or files  # a text beside rows describes them
        if not files:
            raise UserError(f"dataset {path}: no files there that are read ({readable})")
    formats = {_format(file): file for file in files}
    if len(formats) > 1:
        raise UserError(
            f"dataset {path}: files of more than one format, such as "
            f"{' and '.join(str(file.relative_to(path)) for file in formats.values())}; keep one"
        )
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{display_path(file)}: the file is empty")
    if path.is_file():
        return {"train": files}, []
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        parts = reversed(file.relative_to(path).parts)
        # The file's own name decides, then the name of the nearest folder that is named after a split.
        named = next(filter(None, map(_splits_named, parts)), [None])
        if len(named) > 1:
            raise UserError(
                f"{display_path(file)} is named after more than one split ({', '.join(map(str, named))}); rename it"
            )
        by_split.setdefault(named[0], []).append(file)
    if set(by_split) == {None}:
        note = f"no file of {path} is named after a split: the rows of all {len(files)} are split by hash"
        return {"train": files}, [note] if len(files) > 1 else []
    if None in by_split:
        other = display_path(by_split[None][0])
        raise UserError(
            f"dataset {path}: {other} is named after no split, but other files are; "
            "rename it (train-..., say) or move it away"
        )
    if "train" not in by_split:
        raise UserError(
            f"dataset {path}: {display_path(files[0])} is named after a split, but no file is named train; "
            "rename the training rows, or give their file itself"
        )
    folders = {
        "/".join(part for part in file.relative_to(path).parts[:-1] if not _splits_named(part)) or "." for file in files
    }
    if len(folders) > 1:
        raise UserError(
            f"dataset {path}: the files of its splits are in different folders ({', '.join(sorted(folders)[:5])}); "
            "give the one to train on"
        )
    return {split: by_split[split] for split in SPLITS if split in by_split}, []


# --- files -----------------------------------------------------------------------------------------------------------


def _of_file(file: Path, columns: Collection[str], streaming: bool) -> Source:
    read = {"JSON": _json_rows, "CSV": _csv_rows, "Parquet": _parquet_rows, "text": _text_rows}[str(_format(file))]
    names = _parquet_label_names(file) if read is _parquet_rows else {}
    digest = f"{file.name} {file.stat().st_size}" if streaming else f"{_suffix(file)[0]} {digest_of([file])}"
    return Source(display_path(file), digest, functools.partial(read, file, columns), names)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, text with the line end) of each line."""
    with io.BufferedReader(pyarrow.input_stream(str(file), compression=_suffix(file)[1])) as lines:
        number = 0
        try:
            for number, raw in enumerate(lines, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{display_path(file)}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8; "
                "convert the file to UTF-8"
            ) from None
        except OSError as error:  # a damaged compressed file
            raise UserError(f"{display_path(file)}, after line {number}: cannot be read: {error}") from None


def _text_rows(file: Path, columns: Collection[str]) -> Rows:
    """A row {"text": ...} for each line that is not blank."""
    for number, line in _lines(file):
        if line.strip():
            yield f"line {number}", {"text": line.rstrip("\r\n")}


def _csv_rows(file: Path, columns: Collection[str]) -> Rows:
    """The cells of each line as {name in the header: text}, with None for an empty cell.

    Raises UserError for a line that has more or fewer cells than the header.
    """
    csv.field_size_limit(sys.maxsize)
    lines = _lines(file)
    number, header = next(((number, line) for number, line in lines if line.strip()), (0, ""))

    def names(delimiter: str) -> list[str]:
        try:
            return [name.strip() for name in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True))]
        except csv.Error:
            raise UserError(
                f"{display_path(file)}, line {number}: no header of a CSV; if its lines end in CR alone, "
                "as old Macs have it, convert them to LF"
            ) from None

    delimiters = "\t" if _suffix(file)[0] == ".tsv" else ",;\t|"
    # The delimiter that gives the header all wanted columns; else the one that gives it the most columns.
    delimiter = max(delimiters, key=lambda delimiter: (set(columns) <= set(names(delimiter)), len(names(delimiter))))
    known = names(delimiter)
    twice = next((name for name in columns if known.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"{display_path(file)}, line {number}: the header has the column '{twice}' {known.count(twice)} times; "
            "rename the others"
        )
    spaced = f"{delimiter} " in header  # if so, spaces before a quotation mark do not belong to the cell
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    while True:
        place = f"line {number + reader.line_num + 1}"  # the row's first line: a cell may have several lines
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{display_path(file)}, {place}: not valid CSV: {error}; "
                "a cell that has quotation marks is quoted, and they are doubled in it"
            ) from None
        if cells is None:
            return
        if len(cells) > len(known):
            remedy = (
                f"quote cells that contain '{delimiter}'"
                if cells[-1]
                else f"take the '{delimiter}' at the end away, or put one after the header too"
            )
            raise UserError(
                f"{display_path(file)}, {place}: {len(cells)} cells, but the header has {len(known)}; {remedy}"
            )
        if cells and len(cells) < len(known):
            raise UserError(
                f"{display_path(file)}, {place}: {len(cells)} cells, but the header has {len(known)}; "
                "quote cells that have several lines"
            )
        if cells:
            yield place, {name: cell or None for name, cell in zip(known, cells, strict=True)}


def _json_rows(file: Path, columns: Collection[str]) -> Rows:
    """One object for each line, or the rows of a whole document: see _rows_of_document."""
    lines = _lines(file)
    first_number, first = next(((number, line) for number, line in lines if line.strip()), (0, ""))
    if not first:
        return
    document = first.lstrip().startswith("[")
    if not document:
        try:
            row = json.loads(first)
            document = isinstance(row, dict) and isinstance(row.get("data"), list) and not set(columns) <= set(row)
        except (ValueError, RecursionError):
            document = _suffix(file)[0] == ".json"  # an object over several lines
    if document:
        try:
            whole = json.loads(first + "".join(line for _, line in lines))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{display_path(file)}, line {first_number - 1 + getattr(error, 'lineno', 1)}: "
                f"not valid JSON: {getattr(error, 'msg', error)}"
            ) from None
        yield from _rows_of_document(file, whole)
        return
    for number, line in itertools.chain([(first_number, first)], lines):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{display_path(file)}, line {number}: not valid JSON: {getattr(error, 'msg', error)}"
                ) from None
            yield f"line {number}", row


def _rows_of_document(file: Path, document: Any) -> Rows:
    """The objects of an array, or of the array "data" in an object.

    In SQuAD's own format, these are articles with paragraphs; a row is one question of a paragraph.
    """
    elements = document.get("data") if isinstance(document, dict) else document
    if not isinstance(elements, list):
        keys = ", ".join(map(str, itertools.islice(document, 8)))
        raise UserError(
            f"{display_path(file)}: one object (with {keys}); "
            "expected one object a line, an array of objects, or SQuAD's own format"
        )
    for number, element in enumerate(elements, 1):
        place = f"element {number}"
        if not (isinstance(element, dict) and isinstance(element.get("paragraphs"), list)):
            yield place, element
            continue
        for paragraph in element["paragraphs"]:
            try:
                for question in paragraph["qas"]:
                    answers = {
                        name: [answer[name] for answer in question.get("answers") or []]
                        for name in ("text", "answer_start")
                    }
                    row = question | {
                        "title": element.get("title"),
                        "context": paragraph["context"],
                        "answers": answers,
                    }
                    yield f"question {question.get('id', short(question.get('question')))}", row
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{display_path(file)}, {place}: a paragraph that is not as in SQuAD "
                    f"({type(error).__name__}: {error})"
                ) from None


def _open_parquet(file: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{display_path(file)}: not a readable Parquet file: {error}") from None


def _parquet_label_names(file: Path) -> dict[str, list[str]]:
    # `datasets` writes the types of the columns under this key.
    metadata = (_open_parquet(file).schema_arrow.metadata or {}).get(b"huggingface")
    try:
        return _label_names(Features.from_dict(json.loads(metadata)["info"]["features"])) if metadata else {}
    except (ValueError, KeyError, TypeError):  # written by another version of `datasets`
        return {}


def _label_names(features: Features) -> dict[str, list[str]]:
    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


def _parquet_rows(file: Path, columns: Collection[str]) -> Rows:
    parquet, names = _open_parquet(file), _parquet_label_names(file)
    file_columns = parquet.schema_arrow.names
    number = 0
    try:
        for batch in parquet.iter_batches(1000, columns=[name for name in file_columns if name in columns] or None):
            for row in batch.to_pylist():
                number += 1
                row = _named(row, names)
                # The first row has all columns of the file, so that a message can name them.
                yield f"row {number}", dict.fromkeys(file_columns) | row if number == 1 else row
    except UnicodeDecodeError as error:
        raise UserError(
            f"{display_path(file)}, after row {number}: byte {error.object[error.start]:#04x} is not UTF-8"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{display_path(file)}, after row {number}: not a readable Parquet file: {error}") from None


def _named(row: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The row with the names of class labels in place of numbers. A number without a name, as -1, becomes None."""
    named = {
        column: names[column][row[column]] if 0 <= row[column] < len(names[column]) else None
        for column in names
        if row.get(column) is not None
    }
    return row | named


# --- data sets of the library `datasets` -----------------------------------------------------------------------------


def _saved(path: Path, columns: Collection[str], streaming: bool) -> tuple[dict[str, list[Source]], list[str]]:
    """The sources of a data set that save_to_disk wrote."""
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # damaged or unknown: each case has an exception class of its own
        raise UserError(
            f"dataset {path}: saved by save_to_disk, but it cannot be read "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from None
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in (".arrow", ".json"))
    digest = str(sum(file.stat().st_size for file in files)) if streaming else digest_of(files)
    return _of_datasets(
        str(path), loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded}), columns, digest
    )


def _load_hub(dataset: str, streaming: bool) -> Any:
    name, _, configuration = dataset.partition(":")
    try:
        return load_dataset(name, configuration or None, streaming=streaming)
    except Exception as error:  # network, missing, gated, broken: each case has an exception class of its own
        reason = " ".join(str(error).split())
        available = re.search(r"[Aa]vailable(?: configs)?: \[(.*?)\]", reason)
        if available or "BuilderConfig" in reason:
            names = [part.strip(" '\"") for part in available[1].split(",")] if available else []
            wanted = (
                f"no configuration '{configuration}'{did_you_mean(configuration, names)}"
                if configuration
                else "several configurations"
            )
            example = (
                f"; name one as {name}:{names[0]}, say (there are: {', '.join(names[:20])})"
                if names
                else f" ({reason[:200]})"
            )
            raise UserError(f"dataset {dataset}: the Hugging Face hub has {wanted}{example}") from None
        raise UserError(
            f"dataset {dataset}: no built-in sample ({', '.join(SAMPLES)}), no file or folder, and not to be had from "
            f"the Hugging Face hub ({type(error).__name__}: {reason[:200]}); "
            "a data set there is written owner/name, a configuration of it owner/name:configuration"
        ) from None


def _of_datasets(
    dataset: str, loaded: Mapping[Any, Dataset], columns: Collection[str], digest: str | None = None
) -> tuple[dict[str, list[Source]], list[str]]:
    """(sources, notes) as find_sources returns them. digest: of all the data, if there is one."""
    named: dict[str, list[str]] = {}
    notes = []
    for name, rows in loaded.items():
        for split in _splits_named(str(name))[:1]:
            unlabelled = [  # as in a benchmark that keeps the labels of its test rows secret
                column
                for column in columns
                if isinstance(rows.features.get(column), ClassLabel) and len(rows) and _largest(rows, column) < 0
            ]
            if unlabelled and split != "train":
                notes.append(
                    f"{name} of {dataset} has no labels: another {split} split is taken out of the training rows"
                )
            else:
                named.setdefault(split, []).append(str(name))
    if "train" not in named:
        raise UserError(f"dataset {dataset}: it has no train split (there are: {', '.join(map(str, loaded))})")
    notes += [
        f"the {split} rows are those of {' and '.join(names)}" for split, names in named.items() if len(names) > 1
    ]
    sources = {
        split: [
            Source(
                f"dataset {dataset}, {name} rows",
                f"{name} {digest or loaded[name]._fingerprint}",
                functools.partial(_rows_of_dataset, loaded[name], columns),
                _label_names(loaded[name].features),
            )
            for name in named[split]
        ]
        for split in SPLITS
        if split in named
    }
    return sources, notes


def _of_streams(dataset: str, loaded: Mapping[Any, IterableDataset]) -> tuple[dict[str, list[Source]], list[str]]:
    """As _of_datasets, of data sets that are not on the disk: a source for each of their files."""
    sources: dict[str, list[Source]] = {}
    for name, rows in loaded.items():
        for split in _splits_named(str(name))[:1]:
            for part in range(rows.num_shards):
                shard = rows.shard(rows.num_shards, part)
                place = f"dataset {dataset}, {name} rows, part {part}"
                sources.setdefault(split, []).append(Source(place, place, functools.partial(_rows_of_stream, shard)))
    if "train" not in sources:
        raise UserError(f"dataset {dataset}: it has no train split (there are: {', '.join(map(str, loaded))})")
    return {split: sources[split] for split in SPLITS if split in sources}, []


def _rows_of_stream(rows: IterableDataset) -> Rows:
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _largest(rows: Dataset, column: str) -> int:
    return pyarrow.compute.max(rows.data.column(column)).as_py() or 0


def _rows_of_dataset(rows: Dataset, columns: Collection[str]) -> Rows:
    names = _label_names(rows.features)
    wanted = [column for column in rows.column_names if column in columns]
    number = 0
    for batch in rows.with_format(None).select_columns(wanted or rows.column_names).iter(1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            row = _named(dict(zip(batch, values, strict=True)), names)
            yield f"row {number}", dict.fromkeys(rows.column_names) | row if number == 1 else row
