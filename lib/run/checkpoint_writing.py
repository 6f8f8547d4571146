"""One checkpoint, written beside training.

Training waits while a rank copies its part to host memory. A thread then writes, hashes and flushes the copy, and once
every rank's is on the disk, the folder gets its name (see lib/run/checkpoint_files.py for what is in it).
"""

import contextlib
import errno
import json
import math
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from deepspeed.accelerator import get_accelerator

from lib.distributed import ranks
from lib.distributed.memory import free_host_memory
from lib.distributed.zero_state import (
    WEIGHT,
    buffers,
    frozen_size,
    layouts,
    optimizer_state,
    owned_pieces,
    shapes,
)
from lib.progress import progress
from lib.run.checkpoint_files import MANIFEST, Manifest, checksum_of, folder_of, problem_of, unfinished_folder_of

# How safetensors calls what a weight, an optimizer state or a buffer can be.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
AT_ONCE = 2**24  # bytes that are hashed, then written: they stay in the processor's cache between the two


class HostCopies:
    """The host memory that a rank's part of a checkpoint is copied to, kept from one checkpoint to the next.

    On a GPU it is pinned, so that the copy runs at the speed of the bus.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._is_pinned = False

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether every rank of this machine could copy as much and leave half of its free memory."""
        missing = _places(tensors)[-1] - self.nbytes
        return missing * ranks.on_this_machine() <= free_host_memory() / 2

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies, until the next call. It waits for the device."""
        places = _places(tensors)
        if self.nbytes < places[-1]:
            self._allocate(places[-1])
        copies = {}
        for (name, tensor), begin in zip(tensors.items(), places, strict=False):
            place = self._memory[begin : begin + tensor.nbytes]
            copies[name] = place.view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor, non_blocking=True)
        get_accelerator().synchronize()
        return copies

    def _allocate(self, size: int) -> None:
        if get_accelerator().device_name() != "cuda":
            self._memory = torch.empty(size, dtype=torch.uint8)
            return
        # torch's pin_memory would take the next power of two.
        cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if self._is_pinned:
            cuda.cudaHostUnregister(self._memory.data_ptr())
        self._memory = torch.empty(size, dtype=torch.uint8)
        self._is_pinned = int(cuda.cudaHostRegister(self._memory.data_ptr(), size, 0)) == 0
        if not self._is_pinned:  # the copy is slower then; the error would be taken for that of the next kernel
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")


def _places(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Where each tensor begins in one piece of memory, in bytes, and the size of all, for any dtype aligned."""
    places = [0]
    for tensor in tensors.values():
        places.append(places[-1] + math.ceil(tensor.nbytes / 64) * 64)
    return places


class WrittenBeside:
    """A checkpoint of the engine's present state, from the copy to the folder that has its name. Every rank makes it.

    facts: what to keep beside the weights, as JSON; its "step" names the folder. Training may go on at once; where
    memory does not suffice for copies, only when all is written.
    """

    @progress("saving a checkpoint")
    def __init__(self, parent: Path, engine: Any, facts: Manifest, memory: HostCopies):
        self.step, self.folder = int(facts["step"]), parent / folder_of(facts["step"])
        self._unfinished = unfinished_folder_of(self.folder)
        kinds, scalars = optimizer_state(engine)
        owned, shared = owned_pieces(engine), layouts(engine)
        self._manifest = facts | {
            "format": 2 if shared else 1,
            **({"layouts": {name: asdict(found) for name, found in shared.items()}} if shared else {}),
            "world_size": ranks.world_size(),
            "shapes": shapes(engine),
            "kinds": kinds,
            "scalars": scalars,
            "frozen": frozen_size(engine),
        }
        self._pieces = [[piece.name, piece.start, piece.size] for piece in owned]
        self._problem = ranks.on_rank0(lambda: problem_of(self._make_folder))
        self._writing: _Writing | None = None
        if self._problem is not None:
            return
        tensors = {
            f"{kind}/{piece.name}@{piece.start}": piece.view(kind, engine.basic_optimizer)
            for piece in owned
            for kind in [WEIGHT, *kinds]
        }
        if ranks.rank() == 0:
            tensors |= {f"buffer/{name}": buffer for name, buffer in buffers(engine).items()}
        file = self._unfinished / f"rank-{ranks.rank():05d}-of-{ranks.world_size():05d}.safetensors"
        if ranks.largest([float(not memory.fit(tensors))])[0]:
            self._writing = _Writing(file, tensors)
            ranks.together(self._writing.join)
        else:
            self._writing = _Writing(file, memory.of(tensors))

    def is_busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._writing is not None and self._writing.is_alive()

    @progress("saving a checkpoint")
    def finish(self) -> str | None:
        """Wait until every rank's part is on the disk, and give the folder its name. Every rank must call it.

        Returns what went wrong, the same on all ranks, or None. A failure removes what was written, and touches no
        other checkpoint.
        """
        problem, writing = self._problem, self._writing
        if writing is not None:
            problem = ranks.first_problem_of(writing.outcome)
            files = ranks.gather_on_rank0({"pieces": self._pieces, **writing.facts})
            if problem is None:
                problem = ranks.on_rank0(lambda: problem_of(lambda: self._publish(files)))
        if problem is not None:
            ranks.on_rank0(lambda: shutil.rmtree(self._unfinished, ignore_errors=True))
        return problem

    def _make_folder(self) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.parent.mkdir(exist_ok=True)  # but no new folder of the run, whose disk may be away for now
        self._unfinished.mkdir()

    def _publish(self, files: list[Manifest]) -> None:
        manifest = self._manifest | {"files": {file.pop("name"): file for file in files}}
        path = self._unfinished / MANIFEST
        path.write_text(json.dumps(manifest | {"checksum": checksum_of(manifest)}), encoding="utf-8")
        _flush(path)
        _flush(self._unfinished)
        self._unfinished.rename(self.folder)
        _flush(self.folder.parent)


class _Writing(threading.Thread):
    """Writes one rank's file. facts: what the manifest says of it, once it is written."""

    def __init__(self, file: Path, tensors: Mapping[str, torch.Tensor]):
        super().__init__(daemon=True)  # a run that ends with an error does not wait for it
        self.file, self.tensors = file, tensors
        self.facts: Manifest = {}
        self._problem: str | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._problem = problem_of(self._write)
        except Exception as error:  # a thread's own would be printed and forgotten
            self._error = error

    def _write(self) -> None:
        size, checksum = write_safetensors(self.file, self.tensors)
        self.facts = {"name": self.file.name, "bytes": size, "xxh3_128": checksum}

    def outcome(self) -> str | None:
        """What went wrong, when it is done."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._problem


def write_safetensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Write a safetensors file and bring it to the disk. Returns its size in bytes and its xxh3_128.

    The library's save_file would need the whole file to be read again for the checksum. The format: the length of the
    header in 8 bytes, the header in JSON, padded to a multiple of 8 bytes, the tensors one after the other
    (https://github.com/huggingface/safetensors#format). The widest come first, so that each is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksum = xxhash.xxh3_128()
    with file.open("wb") as output:

        def write(data: memoryview) -> None:
            for begin in range(0, len(data), AT_ONCE):
                part = data[begin : begin + AT_ONCE]
                checksum.update(part)
                output.write(part)

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for _, tensor in ordered:
            write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    _flush(file)
    return 8 + len(text) + end, checksum.hexdigest()


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, from the memory of the operating system to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
