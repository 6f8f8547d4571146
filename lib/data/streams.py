"""Text that is read and tokenized while a model trains on it: for data that do not fit on the disk, and mixtures.

Which tokens a step has depends on the data and on batch_size alone. Each of the batch_size rows of a step goes on where
it stood, so a position in the data is one for each row; a checkpoint keeps it, and any number of ranks goes on from it.
All ranks read all documents; a rank tokenizes those of its own rows only.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.data.batches import Streamed
from lib.data.rows import Splits, load_rows, texts_of
from lib.data.sources import Source, find_sources
from lib.data.splits import SPLITS
from lib.distributed import ranks
from lib.errors import UserError
from lib.progress import progress

SAMPLE_CHARACTERS = 20_000_000  # of the first training documents: a tokenizer and the baseline learn from these

WEIGHTED = re.compile(r"(.+)=(\d+\.?\d*|\.\d+)")  # a data set of a mixture

Place = tuple[int, int, int]  # of a data set: sources read before, repeats included; rows read of the next; characters

# What is read before the first round that a rank still needs, and {row: (round, tokens taken)} of its rows.
Position = tuple[dict[str, Any], dict[int, tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set of a mixture. weight: its share of the training text, in proportion to the other weights."""

    name: str
    weight: float
    sources: dict[str, list[Source]]  # by split


def parts_of(dataset: str, column: str) -> tuple[list[Part], list[str]]:
    """(the data sets that `dataset` names, notes): one, or several as "a.jsonl=0.7,owner/name:configuration=0.3"."""
    found = [WEIGHTED.fullmatch(part.strip()) for part in dataset.split(",")]
    weighted = [(match[1], float(match[2])) for match in found if match]
    if not weighted or Path(dataset).expanduser().exists():
        weighted = [(dataset, 1.0)]
    elif len({name for name, weight in weighted if weight > 0}) < len(found):
        raise UserError(
            f"dataset {dataset}: each data set of a mixture stands in it once, with a weight above 0, such as "
            "a.jsonl=0.7,b/=0.3"
        )
    parts, notes = [], []
    for name, weight in weighted:
        sources, more = find_sources(name, [column], streaming=True)
        parts.append(Part(name, weight, sources))
        notes += [note for note in more if "split by hash" not in note]
    return parts, notes


class Documents:
    """The endless sequence of the training documents of a mixture, from any place on.

    The next document comes from the data set that has given the fewest characters for its weight. So the shares of the
    text are those of the weights, at any time, to within a document. A data set that ends begins anew. held_out: texts
    that are no training documents, wherever they stand.
    """

    def __init__(self, parts: Sequence[Part], column: str, held_out: Collection[str] = ()):
        self.parts, self.column, self.held_out = parts, column, held_out

    def start(self) -> list[Place]:
        return [(0, 0, 0)] * len(self.parts)

    def read(self, places: Sequence[Place]) -> Iterator[tuple[str, list[Place]]]:
        """(document, the places behind it) for each document behind these places."""
        now: list[Place] = [(source, row, characters) for source, row, characters in places]
        texts = [self._texts(part, place[0], place[1]) for part, place in zip(self.parts, now, strict=True)]
        while True:
            at = min(range(len(now)), key=lambda at: now[at][2] / self.parts[at].weight)
            text, source, row = next(texts[at])
            now[at] = (source, row, now[at][2] + len(text) + 1)  # 1: its end
            yield text, list(now)

    def _texts(self, part: Part, source: int, row: int) -> Iterator[tuple[str, int, int]]:
        """(text, sources read before, rows read of this one)"""
        sources, fruitless = part.sources["train"], 0
        while fruitless <= len(sources):  # all of them, from the beginning
            for text in texts_of(sources[source % len(sources)], self.column, start=row):
                row += 1
                if text not in self.held_out:
                    fruitless = -1
                    yield text, source, row
            source, row, fruitless = source + 1, 0, fruitless + 1
        raise UserError(f"dataset {part.name}: no document is left to train on; give more, or set a smaller --held_out")


def stream_rows(dataset: str, column: str, held_out: int, max_steps: int | None) -> Splits:
    """As load_rows, of text that is read while training. Every rank must call it.

    Its "documents" are the training documents; its "train" split has the first of them (SAMPLE_CHARACTERS).
    "validation" and "test" have the first held_out documents of those splits, of a mixture in proportion to the
    weights. A split that a data set lacks is taken from the beginning of its training documents, and training passes
    over these texts, wherever else they stand. Raises UserError as load_rows does, and without max_steps.
    """
    if max_steps is None:
        raise UserError("a stream has no end, so that epochs cannot say how long to train: set --max_steps")
    parts, notes = ranks.rank0_first(functools.partial(parts_of, dataset, column))()

    note = (
        "documents are read while training; the train tokens above are those of the first documents, from which a "
        "tokenizer from scratch and the baseline learn"
    )

    def find(dataset: str, columns: Collection[str]) -> tuple[dict[str, list[Source]], list[str]]:
        texts = _first_texts(parts, column, held_out)
        return {split: [_of_texts(f"dataset {dataset}, {split} rows", column, texts[split])] for split in SPLITS}, [
            *notes,
            note,
        ]

    splits = load_rows(dataset, None, text={"text": column}, find=find)
    splits.documents = Documents(parts, column, {*splits["validation"]["text"], *splits["test"]["text"]})
    names = [(split, source.digest) for part in parts for split in SPLITS for source in part.sources.get(split, [])]
    splits.fingerprint = hashlib.blake2b(repr([splits.fingerprint, names]).encode(), digest_size=16).hexdigest()
    return splits


@progress("reading the first documents")
def _first_texts(parts: Sequence[Part], column: str, held_out: int) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {"validation": [], "test": []}
    seen: set[str] = set()
    for part in parts:
        count = max(1, round(held_out * part.weight / sum(part.weight for part in parts)))
        for split, found in texts.items():
            sources = part.sources.get(split, part.sources["train"])
            all_texts = itertools.chain.from_iterable(texts_of(source, column) for source in sources)
            found += itertools.islice(_new(all_texts, seen), count)
    texts["train"], characters = [], 0
    documents = Documents(parts, column, seen)
    for text, places in documents.read(documents.start()):
        sizes = [len(part.sources["train"]) for part in parts]
        if all(place[0] >= size for place, size in zip(places, sizes, strict=True)):  # each has begun anew
            break
        texts["train"].append(text)
        characters += len(text)
        if characters >= SAMPLE_CHARACTERS:
            break
    return texts


def _new(texts: Iterator[str], seen: set[str]) -> Iterator[str]:
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def _of_texts(name: str, column: str, texts: Sequence[str]) -> Source:
    digest = hashlib.blake2b(repr(texts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return Source(name, digest, lambda: ((f"row {at}", {column: text}) for at, text in enumerate(texts, 1)))


@dataclasses.dataclass
class _Row:
    """One of the batch_size rows: its documents from the one on in which it stands."""

    round: int  # the document that it stands in; it gets one in each round
    taken: int  # tokens of this document that earlier steps have had
    texts: collections.deque[str] = dataclasses.field(default_factory=collections.deque)  # not yet tokenized
    tokens: collections.deque[np.ndarray] = dataclasses.field(default_factory=collections.deque)

    def available(self) -> int:
        return sum(map(len, self.tokens)) - self.taken

    def take(self, length: int) -> np.ndarray:
        """The next length + 1 tokens, the last of which comes again."""
        found = np.concatenate(self.tokens)[self.taken : self.taken + length + 1]
        self.taken += length
        while self.taken >= len(self.tokens[0]):
            self.taken -= len(self.tokens.popleft())
            self.round += 1
        return found


class StreamedBlocks(Streamed):
    """Documents as blocks of `length` tokens, as Blocks gives them: {"input_ids": ..., "labels": ...}, [rows, length].

    Documents are dealt in rounds: each row gets one of the next batch_size documents, and the row that has had the
    fewest characters gets the longest one. A row's documents, joined, are cut into its blocks. So rows move through the
    documents at nearly one speed, and few documents wait in memory for a row that is behind.
    tokens_of: texts -> the tokens of each, with an end-of-text token.
    """

    def __init__(
        self, documents: Documents, tokens_of: Callable[[list[str]], list[list[int]]], length: int, batch_size: int
    ):
        self.documents, self.tokens_of, self.length, self.batch_size = documents, tokens_of, length, batch_size
        self.own: dict[int, _Row] = {}
        # What a checkpoint of one of the last steps needs; batches are made a step ahead of training.
        self.rows_after: dict[int, dict[int, tuple[int, int]]] = {}  # step -> row -> round and tokens taken
        self.before: dict[int, dict[str, Any]] = {}  # round -> the state of what is read before it

    def begin(self, own: Sequence[int], position: dict[str, Any] | None) -> None:
        start = {"round": 0, "places": self.documents.start(), "dealt": [0] * self.batch_size}
        state = position or {"reader": start, "rows": [(0, 0)] * self.batch_size}
        self.own = {row: _Row(*state["rows"][row]) for row in own}
        reader = state["reader"]
        self.round, self.places, self.dealt = reader["round"], reader["places"], np.array(reader["dealt"])
        self.reader = self.documents.read(self.places)

    def __getitem__(self, numbers: list[int]) -> dict[str, np.ndarray]:
        self._fill()
        step = numbers[0] // self.batch_size + 1  # as the training loop counts them
        blocks = []
        for number in numbers:
            row = self.own[number % self.batch_size]
            blocks.append(row.take(self.length))
            self.rows_after.setdefault(step, {})[number % self.batch_size] = (row.round, row.taken)
        self._forget(step - 3)
        stacked = np.stack(blocks).astype(np.int64)
        return {"input_ids": stacked[:, :-1].copy(), "labels": stacked[:, 1:].copy()}

    def _fill(self) -> None:
        """Tokenize until each row of this rank has a block, all rows together."""
        while lacking := [row for row in self.own.values() if row.available() <= self.length]:
            while not all(row.texts for row in lacking):
                self._deal()
            tokens = self.tokens_of([row.texts.popleft() for row in lacking])
            for row, found in zip(lacking, tokens, strict=True):
                row.tokens.append(np.array(found, dtype=np.int32))

    def _deal(self) -> None:
        """Read a round of documents, and keep those of this rank's rows."""
        self.before[self.round] = {"round": self.round, "places": self.places, "dealt": self.dealt.tolist()}
        found = list(itertools.islice(self.reader, self.batch_size))
        lengths = np.array([len(text) for text, _ in found])
        longest_first = np.argsort(-lengths, kind="stable")
        for row, at in zip(np.argsort(self.dealt, kind="stable").tolist(), longest_first.tolist(), strict=True):
            self.dealt[row] += lengths[at]
            if row in self.own and self.round >= self.own[row].round:
                self.own[row].texts.append(found[at][0])
        self.round, self.places = self.round + 1, found[-1][1]

    def _forget(self, step: int) -> None:
        """What only checkpoints up to this step would need."""
        for old in [known for known in self.rows_after if known <= step]:
            del self.rows_after[old]
        noted = [round for rows in list(self.rows_after.values()) for round, _ in rows.values()]
        # Rows whose block of this step is still to be taken, in a later micro-batch, count too.
        needed = min(noted + [row.round for row in self.own.values()])
        for old in [known for known in self.before if known < needed]:
            del self.before[old]

    def position(self, step: int) -> dict[str, Any]:
        found = ranks.gather_on_rank0(self.position_of_own(step))
        return merged(found) if found else {}

    def position_of_own(self, step: int) -> Position:
        rows = self.rows_after[step]
        return self.before[min(round for round, _ in rows.values())], rows


def merged(positions: Sequence[Position]) -> dict[str, Any]:
    """The positions of all ranks as one, on any number of ranks."""
    rows = dict(itertools.chain.from_iterable(own.items() for _, own in positions))
    reader = min((reader for reader, _ in positions), key=lambda reader: int(reader["round"]))
    return {"reader": reader, "rows": [rows[row] for row in sorted(rows)]}
