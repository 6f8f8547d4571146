"""The model of a checkpoint as a folder that from_pretrained loads, made without ranks, one file at a time."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from lib.distributed.export import FORM, PLAN
from lib.distributed.model_files import write_files
from lib.distributed.zero_state import WEIGHT
from lib.errors import UserError, display_path
from lib.progress import progress
from lib.run import checkpoint_files


def write(run: Path, step: int | None, output: Path | None, overwrite: bool) -> tuple[int, Path]:
    """Write the model that a run had after a step. Returns (step, folder).

    step: None for the newest checkpoint. output: None for model-step-... in the run. Raises UserError where the run has
    no such checkpoint, where it is damaged, or where it lacks weights of the model.
    """
    form, parent = run / FORM, run / "checkpoints"
    if not (form / PLAN).is_file():
        raise UserError(
            f"{display_path(run)} has no {FORM}/{PLAN}, which a run writes before its first step; give a run folder, "
            "or --gguf FILE for a model"
        )
    found = {manifest["step"]: (folder, manifest) for folder, manifest in checkpoint_files.list_complete(parent)}
    if not found or (step is not None and step not in found):
        steps = ", ".join(map(str, sorted(found))) or "none"
        raise UserError(f"{display_path(run)} has no checkpoint{f' of step {step}' if found else ''}; it has: {steps}")
    step = max(found) if step is None else step
    output = output or run / f"model-{checkpoint_files.folder_of(step)}"
    if output.exists() and not overwrite:
        raise UserError(f"{display_path(output)} exists already; --overwrite replaces it, --output names another")
    if output.exists() and not any((output / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{display_path(output)} is no model folder, and is not deleted; choose another --output")
    unfinished = output.with_name(f".{output.name}-{os.getpid()}")
    try:
        _write(form, *found[step], unfinished)
        shutil.rmtree(output, ignore_errors=True)
        unfinished.rename(output)  # whole or not at all
    except OSError as error:
        raise UserError(f"{display_path(output)} cannot be written ({error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return step, output


@progress("exporting the model")
def _write(form: Path, folder: Path, manifest: checkpoint_files.Manifest, output: Path) -> None:
    plan = json.loads((form / PLAN).read_text(encoding="utf-8"))
    state = _StoredState(folder, manifest, plan["ties"])
    needed = [name for step in plan["steps"] for group in step["groups"] for name in group]
    absent = next((name for name in needed if state.find(name) is None), None)
    if absent is not None:
        raise UserError(
            f"{display_path(folder)} lacks {absent}: a checkpoint has what is trained, and other weights of this model "
            "are frozen; go on with the run by --resume, which exports all of it in the end"
        )
    for name, facts in manifest["files"].items():
        problem = checkpoint_files.file_problem(folder / name, facts)
        if problem is not None:
            raise UserError(f"{display_path(folder)} is damaged: {problem}; take another --checkpoint")
    shutil.copytree(form, output, ignore=shutil.ignore_patterns(PLAN))
    model = None if plan["renamed"] else _empty_model(form)

    def read(name: str) -> torch.Tensor:
        return state.read(name).to(getattr(torch, plan["types"][name]))

    write_files(output, plan, model, read, lambda do: do())


class _StoredState:
    """The tensors of a model in a checkpoint."""

    def __init__(self, folder: Path, manifest: checkpoint_files.Manifest, ties: dict[str, str]):
        self._pieces, self._ties = checkpoint_files.Pieces(folder, manifest), ties
        self._of_rank0 = self._pieces.open(next(iter(manifest["files"])))
        self._buffers = {key for key in self._of_rank0.keys() if key.startswith("buffer/")}  # noqa: SIM118

    def find(self, name: str) -> str | None:
        """The name under which a checkpoint has a tensor of the model, or the one that it is tied to."""
        first = self._ties.get(name)
        same = [name, *(other for other, found in self._ties.items() if found == first and first is not None)]
        has = (self._pieces.shapes, self._pieces.layouts)
        return next(
            (other for other in same if f"buffer/{other}" in self._buffers or any(other in h for h in has)), None
        )

    def read(self, name: str) -> torch.Tensor:
        stored = self.find(name)
        assert stored is not None
        if f"buffer/{stored}" in self._buffers:
            return self._of_rank0.get_tensor(f"buffer/{stored}")
        layout = self._pieces.layouts.get(stored)
        shape = layout.shape if layout is not None else self._pieces.shapes[stored]
        return self._pieces.read_whole(stored, WEIGHT, torch.float32).reshape(tuple(shape))


def _empty_model(form: Path) -> Any:
    """The model of a config without weights, which knows how transformers converts them."""
    config = transformers.AutoConfig.from_pretrained(form)
    with torch.device("meta"):
        return getattr(transformers, config.architectures[0])(config)
