"""Which rows a step trains on, which of them are this rank's, and how they become tensors.

The order depends on the seed and the global batch size only. How many ranks there are and how large a micro-batch is
decide who computes which rows of a step, never which rows a step has."""

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from lib.distributed import mesh
from lib.errors import UserError

IGNORED = -100  # the label that torch's cross entropy leaves out

FIRST_ROWS = 64  # by which training rows are known

Batch = dict[str, torch.Tensor]
Collate = Callable[[dict[str, Any]], Batch]  # {column: values} of some rows -> their batch


class Streamed:
    """Training rows that come one after the other, without a number of them: step s has those from s * batch_size on.

    A rank asks for the numbers of its own rows only, step after step.
    """

    def begin(self, own: Sequence[int], position: dict[str, Any] | None) -> None:
        """Before the first step. own: which rows of each step this rank will ask for, from 0 to batch_size - 1.
        position: where to go on; None: at the beginning."""
        raise NotImplementedError

    def position(self, step: int) -> dict[str, Any]:
        """Where all rows are after a step; any number of ranks goes on from it. Every rank must call it; rank 0 gets
        it."""
        raise NotImplementedError

    def __getitem__(self, numbers: list[int]) -> dict[str, Any]:
        raise NotImplementedError


def position(rows: Any, step: int) -> dict[str, Any]:
    """What a checkpoint keeps of the training rows: nothing, unless they are Streamed. Every rank must call it."""
    return {"stream": rows.position(step)} if isinstance(rows, Streamed) else {}


class InOrder:
    """As StepRows, for rows that come one after the other."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size)


class StepRows:
    """Which rows an optimizer step trains on, as a function of the step alone, so that a run can start at any step.

    Epochs follow each other without a gap: step s takes the rows s * batch_size up to (s + 1) * batch_size of the
    endless sequence of the epochs' shuffles, so each row comes exactly once an epoch. With `lengths`, the sequence is
    taken in windows of up to 64 steps, sorted by length inside a window and cut into batches, whose order is shuffled
    again: rows of one batch then have nearly one length, and little is padded.
    """

    def __init__(self, total: int, batch_size: int, seed: int, lengths: Sequence[int] | np.ndarray | None = None):
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.steps_per_window = 1 if lengths is None else max(1, min(64, total // batch_size))
        self.epoch = functools.lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(total))
        self.window = functools.lru_cache(1)(self._window)

    def _window(self, window: int) -> np.ndarray:
        """[steps_per_window, batch_size] row numbers."""
        positions = (
            np.arange(self.steps_per_window * self.batch_size) + window * self.steps_per_window * self.batch_size
        )
        rows = np.concatenate(
            [
                self.epoch(e)[positions[positions // self.total == e] % self.total]
                for e in np.unique(positions // self.total)
            ]
        )
        if self.lengths is None:
            return rows.reshape(1, -1)
        rows = rows[np.argsort(self.lengths[rows], kind="stable")].reshape(self.steps_per_window, -1)
        return rows[np.random.default_rng((self.seed, window, 1)).permutation(self.steps_per_window)]

    def __getitem__(self, step: int) -> np.ndarray:
        """[batch_size] row numbers of step 0, 1, ..."""
        return self.window(step // self.steps_per_window)[step % self.steps_per_window]


def fingerprint(rows: Any) -> str:
    """A hash of the first training rows: of what a tokenizer and a chat template have made of the data.

    rows: as in training_batches.
    """
    found, digest = rows[list(range(min(FIRST_ROWS, len(rows))))], hashlib.blake2b(digest_size=16)
    for name in sorted(found):
        values = [value.tolist() if hasattr(value, "tolist") else value for value in found[name]]
        digest.update(json.dumps([name, values], default=repr).encode())
    return digest.hexdigest()


def rows_of_steps(steps: int, total: int, batch_size: int, seed: int) -> np.ndarray:
    """The numbers of the rows, of `total`, that so many steps take in StepRows without lengths, in order."""
    step_rows = StepRows(total, batch_size, seed)
    return np.unique(np.concatenate([step_rows[step] for step in range(min(steps, -(-total // batch_size)))]))


def training_batches(
    rows: Any, collate: Collate, *, batch_size: int, micro_batch_size: int, seed: int,
    device: torch.device, lengths: Sequence[int] | None = None, packing: bool | None = None, start: int = 0,
    position: dict[str, Any] | None = None,
) -> Iterator[list[Batch]]:  # fmt: skip
    """For each optimizer step, this rank's micro-batches: a list of accumulation_steps dicts of tensors on `device`.

    rows: indexed with a list of row numbers it gives {column: values}, as a datasets.Dataset does; or Streamed. collate
    makes tensors of that. Beside the columns it gets "draw", one random 64-bit number a row and step: what is random in
    a batch and made from these (masks, negatives) does not depend on the number of ranks. batch_size: rows a step over
    all ranks; a multiple of micro_batch_size * the data-parallel ranks. lengths: the rows' lengths, which put rows of
    nearly one length into a step, so that little is padded (StepRows). packing: None for that; otherwise a step has
    rows of any lengths, the same with packing and without. With it, each of its micro-batches gets nearly as many
    tokens; without it, rows of nearly one length. start, position: the steps done before, and where Streamed rows were
    then. A thread makes the batches of the next step while the device computes this one, so collate must not draw from
    a global generator, which raises UserError.
    """
    sizes = None if lengths is None else np.asarray(lengths)  # once: a column of a data set is read from its file
    rank, data_parallel_size = mesh.data_parallel_rank(), mesh.data_parallel_size()
    step_rows: StepRows | InOrder
    if isinstance(rows, Streamed):
        step_rows = InOrder(batch_size)
        own = np.arange(batch_size).reshape(-1, micro_batch_size)[rank::data_parallel_size]
        rows.begin(own.flatten().tolist(), position)
    else:
        step_rows = StepRows(len(rows), batch_size, seed, sizes if packing is None else None)

    def batches_of(step: int) -> list[Batch]:
        draws = np.random.SeedSequence((seed, step, 2)).generate_state(batch_size, np.uint64)
        # Neighbours in length go to different ranks at the same time, so that no rank waits long for another.
        micro_batches = np.arange(batch_size).reshape(-1, micro_batch_size)
        if packing is not None:
            assert sizes is not None
            micro_batches = deal(sizes[step_rows[step]], micro_batch_size, alike_sums=packing)
        local = micro_batches[rank::data_parallel_size]
        batches = (collate({**rows[step_rows[step][part].tolist()], "draw": draws[part]}) for part in local)
        return [in_reach_of(device, part_of_rows(batch)) for batch in batches]

    generators = _generators()
    ready = batches_of(start)
    if generators != _generators():
        raise UserError(
            "collate draws from the global random generator of torch, numpy or Python; batches are made beside "
            "training, so that its numbers would be others in each run: draw from the column 'draw' (random_numbers "
            "in lib/data/batches.py), or from a generator made of it"
        )
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as one_ahead:
        for step in itertools.count(start + 1):
            following = one_ahead.submit(batches_of, step)
            yield [to_device(batch, device) for batch in ready]
            ready = following.result()


def _generators() -> tuple[str, ...]:
    """The states of the global random generators."""
    return str(torch.get_rng_state().tolist()), str(np.random.get_state()), str(random.getstate())


def deal(lengths: np.ndarray, size: int, alike_sums: bool) -> np.ndarray:
    """[batches, size]: the places of the lengths, dealt to batches of `size`: so that each has nearly the same sum, or
    nearly equal lengths.

    For equal sums they are dealt from the longest on, to the batches in turn, and in each round the other way round.
    """
    from_longest = np.argsort(-lengths, kind="stable")
    if not alike_sums:
        return from_longest.reshape(-1, size)
    dealt = from_longest.reshape(size, -1)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.T


def part_of_rows(batch: Batch) -> Batch:
    """This rank's part of a training batch: its tensors [rows, length, ...], cut along the length.

    A batch that can be cut has `position_ids`, [rows, length]: the place of each token in its row, which the model
    must get. Raises UserError for another batch.
    """
    size = mesh.sequence_size()
    if size == 1:
        return batch
    if "position_ids" not in batch:
        raise UserError(
            f"sequence_parallel_size is {size}, but this recipe's batches have no position_ids, so that their rows "
            "cannot be cut; take a JSON without it"
        )
    length = batch["position_ids"].shape[1]
    if length % size:
        raise UserError(f"sequence_parallel_size is {size}, which does not divide rows of {length} tokens")
    begin, end = length * mesh.sequence_rank() // size, length * (mesh.sequence_rank() + 1) // size
    has_tokens = {name: tensor.shape[:2] == batch["position_ids"].shape for name, tensor in batch.items()}
    return {name: tensor[:, begin:end].contiguous() if has_tokens[name] else tensor for name, tensor in batch.items()}


def evaluation_batches(
    rows: Any, collate: Collate, batch_size: int, device: torch.device,
    lengths: Sequence[int] | None = None,
) -> Iterator[tuple[Batch, torch.Tensor]]:  # fmt: skip
    """(batch, row numbers [batch_size]) until every row was on exactly one rank.

    All ranks get the same number of batches, because under ZeRO-3 a forward pass needs all of them. Where rows do not
    suffice, fillers (copies of a row) have the row number -1: leave their results out. "draw" is the same number for a
    row at each evaluation.
    """
    draws = np.random.SeedSequence(0).generate_state(len(rows), np.uint64)
    order = np.arange(len(rows)) if lengths is None else np.argsort(np.asarray(lengths), kind="stable")[::-1]
    share = batch_size * mesh.gradient_size()
    fillers = -len(order) % share
    numbers = np.concatenate([order, np.full(fillers, -1)]).reshape(-1, batch_size)
    for batch in numbers[mesh.gradient_rank() :: mesh.gradient_size()]:
        filled = np.where(batch < 0, order[-1], batch)
        yield (
            to_device(collate({**rows[filled.tolist()], "draw": draws[filled]}), device),
            torch.as_tensor(batch, device=device),
        )


def pad(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Sequences of any lengths, filled up with `value`: [rows, longest], int64."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sequence, dtype=torch.long) for sequence in sequences], batch_first=True, padding_value=value
    )


def pad_tokens(sequences: Sequence[Sequence[int]], pad_token_id: int) -> Batch:
    """Token ids of any lengths -> input_ids and attention_mask (1: a token, 0: padding), [rows, longest]."""
    return {
        "input_ids": pad(sequences, pad_token_id),
        "attention_mask": pad([[1] * len(sequence) for sequence in sequences], 0),
    }


def random_numbers(draws: np.ndarray, count: int) -> np.ndarray:
    """[rows, count] random numbers, uniform on [0, 1), that depend on each row's draw alone: splitmix64 (Steele et
    al. 2014)."""
    bits = draws[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def tensors_of(**arrays: np.ndarray) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def in_reach_of(device: torch.device, batch: Batch) -> Batch:
    """The batch in memory from which the device copies while it computes; on a CPU as it is."""
    # Contiguous: torch cannot pin what has been expanded.
    return (
        {name: tensor.contiguous().pin_memory() for name, tensor in batch.items()} if device.type == "cuda" else batch
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
