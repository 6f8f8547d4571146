"""Text as blocks of tokens for language models."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from lib.data.batches import IGNORED, Batch
from lib.data.rows import map_rows
from lib.distributed import ranks
from lib.errors import UserError
from lib.progress import progress


class Blocks:
    """A stream of tokens, cut into blocks of `length` without padding. A list of block numbers as index gives a batch.

    Block i has the inputs tokens[i*length : (i+1)*length]; the label of each input is the next token of the stream. So
    every token of the stream but the first is predicted exactly once. The last block may be shorter: it is filled up
    with ignored labels, or left out with drop_last. Raises UserError if there is no block at all.
    """

    def __init__(self, tokens: np.ndarray, length: int, drop_last: bool):
        self.tokens, self.length = tokens, length
        predicted = len(tokens) - 1
        self.count = predicted // length if drop_last else -(-predicted // length)
        if self.count == 0:
            raise UserError(
                f"{len(tokens)} tokens of text do not fill one block of max_length {length}; "
                "give more rows, or set a smaller --max_length"
            )

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
    """A batch of input_ids, labels and position_ids (0, 1, ...), [rows, length], from what Blocks give."""
    input_ids, labels = (torch.from_numpy(blocks[name]) for name in ("input_ids", "labels"))
    places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return {"input_ids": input_ids, "labels": labels, "position_ids": places}


def token_streams(splits: dict[str, Dataset], tokenizer: Any) -> dict[str, np.ndarray]:
    """{split: tokens}: the documents (column "text") as one stream, with an end-of-text token after each document.

    Every rank must call it. Raises UserError where the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the model's tokenizer has no end-of-text token, which is to stand between documents; "
            "take a decoder, or set its eos_token and save it"
        )

    def tokenize(rows: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": document_tokens(rows["text"], tokenizer)}

    return {split: token_stream(rows) for split, rows in map_rows(splits, tokenize, tokenizer=tokenizer).items()}


def document_tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each document, and the end-of-text token."""
    # verbose=False: a document may be longer than the model's limit, of which the tokenizer would warn.
    encoded = tokenizer(
        texts, add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
    )
    return [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]


@progress("joining the tokens")
def token_stream(rows: Dataset, column: str = "input_ids") -> np.ndarray:
    """The lists of numbers in a column, joined: [tokens], int32. Every rank must call it.

    Rank 0 writes the array to a file next to the cached data set, and all ranks map the file into memory. The name of
    the file has the data set's fingerprint. A data set without a cache gives an array in memory.
    """
    folder = Path(rows.cache_files[0]["filename"]).parent if rows.cache_files else None
    if folder is None:
        return np.asarray(list(itertools.chain.from_iterable(rows[column])), dtype=np.int32)
    file = folder / f"{column}-{rows._fingerprint}.npy"

    @ranks.rank0_first  # a rank on another machine writes its own file
    def write() -> None:
        if not file.exists():
            parts = [chunk.flatten() for chunk in rows.with_format("arrow")[:].column(column).chunks]  # on the disk
            unfinished, begin = file.with_name(f".{file.name}-{os.getpid()}"), 0
            joined = np.lib.format.open_memmap(unfinished, "w+", np.int32, (sum(map(len, parts)),))
            for part in parts:
                joined[begin : begin + len(part)] = part.to_numpy()
                begin += len(part)
            joined.flush()
            unfinished.replace(file)

    write()
    return np.load(file, mmap_mode="r")
