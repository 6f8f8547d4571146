"""One checkpoint on disk: what it consists of; found again, and read at any stage on any number of ranks.

  step-00000120/
    rank-00000-of-00002.safetensors   the pieces (lib/distributed/zero_state.py) that rank 0 answers for,
                                      as <kind>/<parameter>@<first element>
    rank-00001-of-00002.safetensors   those of rank 1
    checkpoint.json                   the manifest: step, settings, versions, size, checksum and pieces of each file

Each rank writes what it holds (lib/run/checkpoint_writing.py) and reads what it needs; nothing is gathered. A folder
gets its name only when all of it is on the disk, so whatever kills a run, or a power cut, leaves complete checkpoints,
and perhaps one folder `.writing-...` that the next run removes. safetensors and JSON hold numbers and text alone:
loading runs no code. Why a format of its own: docs/checkpoints.md.
"""

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open

from lib.distributed import mesh, ranks
from lib.distributed.zero_state import (
    WEIGHT,
    Layout,
    buffers,
    layouts,
    make_optimizer_state,
    pieces,
    refresh_model,
    shapes,
    shard_name,
)
from lib.errors import UserError, display_path
from lib.progress import progress

FORMAT = 2  # 1 has no layouts: what was trained without tensor parallelism is still written as 1
MANIFEST = "checkpoint.json"
Manifest = dict[str, Any]


def folder_of(step: int) -> str:
    return f"step-{step:08d}"


def unfinished_folder_of(folder: Path) -> Path:
    """The name that a checkpoint's folder has until all of it is on the disk."""
    return folder.with_name(f".writing-{folder.name}")


def _checksum_of_file(file: Path) -> str:
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**24))
    with file.open("rb", buffering=0) as data:
        while count := data.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def checksum_of(manifest: Manifest) -> str:
    """Of a manifest, to be kept in it."""
    kept = {key: value for key, value in manifest.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True).encode())


def problem_of(do: Callable[[], object]) -> str | None:
    """What kept `do` from writing or deleting, or None: the caller tells all ranks, or goes on."""
    try:
        do()
    except OSError as error:
        return f"{error.strerror or error}"
    return None


def remove(folder: Path) -> str | None:
    """Delete a checkpoint.

    It loses its name first, so that a half deleted one is never taken for one. Returns what kept it from being deleted.
    """
    doomed = folder.with_name(f".deleting-{folder.name}")

    def delete() -> None:
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)

    return problem_of(delete)


def remove_leftovers(parent: Path) -> None:
    """Delete what a run that was killed left half written or half deleted."""
    for folder in [*parent.glob(".writing-*"), *parent.glob(".deleting-*")]:
        shutil.rmtree(folder, ignore_errors=True)


# --- finding --------------------------------------------------------------------------------------


class _Facts(BaseModel):
    """What a manifest of FORMAT must hold, whoever wrote it: no value of it may lead out of its folder, or to a
    traceback."""

    model_config = ConfigDict(strict=True)
    recipe: str
    step: NonNegativeInt
    samples: NonNegativeInt
    rows: NonNegativeInt
    # The fingerprints of the rows and of the tokens made of them, and the size of the frozen weights; the first
    # checkpoints of this format lack them.
    data: str | None = None
    sample: str | None = None
    frozen: float | None = None
    skipped_steps: NonNegativeInt
    score: float | None
    seconds: float
    stage: int
    world_size: int
    schedule: dict[str, Any]
    loss_scale: dict[str, float | None]
    settings: dict[str, Any]
    versions: dict[str, str]
    shapes: dict[str, list[NonNegativeInt]]
    layouts: dict[str, "_Layout"] = {}  # of the parameters that are there as shards, name#0, name#1 ...
    kinds: list[Annotated[str, Field(pattern=r"^[a-z_0-9]+$")]]
    scalars: dict[str, float]
    files: dict[Annotated[str, Field(pattern=r"^rank-[0-9]+-of-[0-9]+\.safetensors$")], "_File"]


class _Layout(BaseModel):
    model_config = ConfigDict(strict=True)
    shape: list[NonNegativeInt]
    dim: NonNegativeInt
    sizes: Annotated[list[PositiveInt], Field(min_length=2)]


class _File(BaseModel):
    model_config = ConfigDict(strict=True)
    bytes: NonNegativeInt
    xxh3_128: str
    pieces: list[Annotated[list[str | NonNegativeInt], Field(min_length=3, max_length=3)]]


def _check_facts(manifest: Manifest, folder: Path) -> None:
    """Raise ValueError where a manifest does not hold what it must, or its pieces leave a part of a parameter out."""
    try:
        _Facts.model_validate(manifest)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{MANIFEST}: {'.'.join(map(str, problem['loc']))[:80]!r}: {problem['msg'][:80]}") from None
    if folder_of(manifest["step"]) != folder.name:
        raise ValueError(f"{MANIFEST} is of step {manifest['step']}")
    end = dict.fromkeys(manifest["shapes"], 0)  # of what the pieces so far, in order, make up
    try:
        for name, start, size in sorted(piece for file in manifest["files"].values() for piece in file["pieces"]):
            if start > end[name]:
                raise ValueError
            end[name] = max(end[name], start + size)
        whole = all(end[name] == math.prod(shape) for name, shape in manifest["shapes"].items())
        for name, found in _layouts_of(manifest).items():
            stored = [manifest["shapes"].get(shard_name(name, rank)) for rank in range(len(found.sizes))]
            whole = whole and sum(found.sizes) == found.shape[found.dim]
            whole = whole and stored == [found.shard_shape(rank) for rank in range(len(found.sizes))]
    except (ValueError, TypeError, KeyError, IndexError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST}: its pieces do not make up its parameters")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises ValueError with what is wrong with it, UserError where it is newer than this code.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("checksum") != checksum_of(manifest)
        or not isinstance(manifest.get("format"), int)
    ):
        raise ValueError(f"{MANIFEST} is damaged: its checksum differs")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{display_path(folder)} has format {manifest['format']}, but this code reads up to {FORMAT}: "
            "resume it with the newer code that wrote it"
        )
    _check_facts(manifest, folder)
    return manifest


def list_complete(parent: Path) -> list[tuple[Path, Manifest]]:
    """The checkpoints whose manifest is whole, newest first; their files are not read."""
    complete = []
    for folder in sorted(parent.glob("step-*"), reverse=True):
        try:
            complete.append((folder, read_manifest(folder)))
        except ValueError:
            continue
    return complete


def scores_of(parent: Path) -> list[tuple[Path, float | None]]:
    """(folder, score) of the checkpoints whose manifest is whole, newest first.

    Each manifest is read once: that of 70 billion parameters on 1,024 ranks takes seconds.
    """
    found = []
    for folder in sorted(parent.glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            found.append((folder, _score(folder, (folder / MANIFEST).stat().st_mtime_ns)))
    return found


@functools.lru_cache(1000)
def _score(folder: Path, changed_at: int) -> float | None:
    """changed_at: of the manifest, which is read anew when it has changed."""
    score: float | None = read_manifest(folder)["score"]
    return score


def find_newest(parent: Path) -> tuple[Path | None, Manifest, list[str]]:
    """(folder, manifest) of the newest checkpoint of which every byte is as it was written, the same on all ranks, and
    notes.

    The ranks share the reading of its files. Each newer one that is incomplete or damaged is named in a note; nothing
    is changed (put_newer_aside). Raises UserError where some are there but none is whole.
    """
    notes: list[str] = []
    for folder in ranks.on_rank0(lambda: sorted(parent.glob("step-*"), reverse=True)):
        problem, manifest = read_whole(folder)
        if problem is None:
            return folder, manifest, [f"{note}: passed over, and called damaged-... from here on" for note in notes]
        notes.append(f"{folder.name} is damaged ({problem})")
    if notes:
        raise UserError(
            f"no checkpoint in {display_path(parent)} is whole: {', '.join(notes)}; "
            "restore one from a backup, or start anew with another --run_dir"
        )
    return None, {}, []


def put_newer_aside(newest: Path) -> None:
    """Rename what find_newest passed over to damaged-..., so that it is not counted among the good ones from then
    on."""
    for folder in newest.parent.glob("step-*"):
        if folder.name > newest.name:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
            try:
                folder.rename(aside)
            except OSError as error:
                raise UserError(
                    f"{display_path(folder)} is damaged and cannot be renamed: {error.strerror or error}; move it away"
                ) from None


def read_whole(folder: Path) -> tuple[str | None, Manifest]:
    """(what is wrong with a checkpoint or None, its manifest), the same on all ranks, which share the reading."""
    problem, manifest = ranks.on_rank0(functools.partial(_whole_manifest, folder))
    return problem or damage(folder, manifest), manifest


@progress("checking the checkpoint")
def damage(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with a checkpoint's files, the same on all ranks, or None. The ranks share the reading of them."""
    files = list(manifest["files"].items())[ranks.rank() :: ranks.world_size()]
    return ranks.first_problem_of(
        lambda: next((found for name, facts in files if (found := file_problem(folder / name, facts))), None)
    )


def _whole_manifest(folder: Path) -> tuple[str | None, Manifest]:
    """(what is wrong, manifest)"""
    try:
        return None, read_manifest(folder)
    except ValueError as error:
        return str(error), {}


def file_problem(file: Path, facts: Manifest) -> str | None:
    """What is wrong with a file of a checkpoint, given what the manifest says of it."""
    try:
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{file.name} has {file.stat().st_size:,} bytes instead of {facts['bytes']:,}"
        if _checksum_of_file(file) != facts["xxh3_128"]:
            return f"the checksum of {file.name} differs"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror or error}"
    return None


# --- reading --------------------------------------------------------------------------------------


@progress("reading the checkpoint")
def read(folder: Path, manifest: Manifest, engine: Any) -> None:
    """Bring the engine's weights and optimizer states to those of a checkpoint, whatever stage and number of ranks
    wrote it.

    Every rank must call it. Raises UserError, on all ranks, where the checkpoint is another model's or cannot be read.
    """
    present = _whole_shapes(shapes(engine), layouts(engine))
    stored = _whole_shapes(manifest["shapes"], _layouts_of(manifest))
    for name in [*present, *stored]:
        if present.get(name) != stored.get(name):
            raise UserError(
                f"{display_path(folder)} is another model's: parameter {name} is {stored.get(name, 'not')} there and "
                f"{present.get(name, 'not')} here; "
                "resume with the model and data that it was trained with, or start a new run"
            )
    make_optimizer_state(engine, manifest["kinds"], manifest["scalars"])

    def attempt() -> str | None:
        try:
            _read_pieces(folder, manifest, engine)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            return f"{display_path(folder)} cannot be read: {' '.join(str(error).split())}"
        return None

    problem = ranks.first_problem_of(attempt)
    if problem is not None:
        raise UserError(problem)
    refresh_model(engine)


def _layouts_of(manifest: Manifest) -> dict[str, Layout]:
    stored = manifest.get("layouts", {}).items()
    return {name: Layout(tuple(cut["shape"]), cut["dim"], tuple(cut["sizes"])) for name, cut in stored}


def _whole_shapes(stored: dict[str, list[int]], shared: dict[str, Layout]) -> dict[str, list[int]]:
    """Name -> shape of each parameter, where `stored` may have shards of it."""
    shards = {shard_name(name, rank) for name, found in shared.items() for rank in range(len(found.sizes))}
    whole = {name: list(shape) for name, shape in stored.items() if name not in shards}
    return whole | {name: list(found.shape) for name, found in shared.items()}


class Pieces:
    """The pieces of a checkpoint, by the names that parameters and shards have there."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.shapes, self.layouts = folder, manifest["shapes"], _layouts_of(manifest)
        self.places: dict[str, list[tuple[int, int, str]]] = {}  # parameter or shard -> (start, size, file)
        for file, facts in manifest["files"].items():
            for name, start, size in facts["pieces"]:
                self.places.setdefault(name, []).append((start, size, file))
        self._opened: dict[str, Any] = {}

    def open(self, file: str) -> Any:
        if file not in self._opened:
            self._opened[file] = safe_open(self.folder / file, framework="pt")
        return self._opened[file]

    def read(self, name: str, kind: str, start: int, target: torch.Tensor) -> None:
        """Fill target, [size], with the elements from `start` on."""
        for first, size, file in self.places[name]:
            begin, end = max(first, start), min(first + size, start + len(target))
            if begin < end:
                key = f"{kind}/{name}@{first}"
                copy(
                    target[begin - start : end - start],
                    self.open(file).get_slice(key)[begin - first : end - first],
                    key,
                )

    def read_whole(self, name: str, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """A parameter, flat, put together from its shards if it has some, in this rank's host memory.

        A change of form reads each parameter whole on every rank.
        """

        def stored(stored_name: str) -> torch.Tensor:
            found = torch.empty(math.prod(self.shapes[stored_name]), dtype=dtype)
            self.read(stored_name, kind, 0, found)
            return found

        if name not in self.layouts:
            return stored(name)
        ranks_there = range(len(self.layouts[name].sizes))
        return self.layouts[name].join([stored(shard_name(name, rank)) for rank in ranks_there]).reshape(-1)


def copy(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    if source.shape != target.shape:  # copy_ would repeat a single number
        raise ValueError(f"{name} has {list(source.shape)} elements instead of {list(target.shape)}")
    target.copy_(source)


def _read_pieces(folder: Path, manifest: Manifest, engine: Any) -> None:
    stored, shared = Pieces(folder, manifest), layouts(engine)
    names = {shard_name(name, mesh.tensor_rank()): name for name in shared}  # this rank's shard -> parameter
    with torch.no_grad():
        for piece in pieces(engine):
            name = names.get(piece.name, piece.name)
            here, there = shared.get(name), stored.layouts.get(name)
            for kind in [WEIGHT, *manifest["kinds"]]:
                target = piece.view(kind, engine.basic_optimizer)
                if here == there:  # it is cut alike, or not at all
                    stored.read(piece.name, kind, piece.start, target)
                else:
                    whole = stored.read_whole(name, kind, target.dtype)
                    cut = here.cut(whole, mesh.tensor_rank()).reshape(-1) if here is not None else whole
                    copy(target, cut[piece.start : piece.start + piece.size], piece.name)
        if buffers(engine):
            with_buffers = next(iter(manifest["files"]))  # that of rank 0
            for name, buffer in buffers(engine).items():
                key = f"buffer/{name}"
                copy(buffer, stored.open(with_buffers).get_tensor(key), key)
