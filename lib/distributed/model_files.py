"""The files of a model: which tensors are in which, under which names, written one file at a time.

They are those that save_pretrained would write of the whole model, which is never in memory here.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lib.distributed import memory

SHARD_SIZE = "5GB"  # of a large model's files, which model.safetensors.index.json lists

Kinds = dict[str, tuple[list[int], torch.dtype]]  # name of a tensor -> its shape and type
Tensors = dict[str, torch.Tensor]


class Step(TypedDict):
    """A file to write: its name, the names of its tensors, and, in groups that must be converted together, those
    tensors of the model that are still to be read for it."""

    file: str
    names: list[str]
    groups: list[list[str]]


class Plan(TypedDict):
    """How the files of a model come to be, as JSON can hold it."""

    steps: list[Step]
    types: dict[str, str]  # name of a tensor of the model -> torch's name for its type
    renamed: dict[str, str]  # name of a tensor of the model -> in the files; empty where some tensors are converted
    metadata: dict[str, int]  # of the index


def plan_files(model: Any, kinds: Kinds) -> Plan:
    """The plan for a model that has tensors of these kinds. One with an adapter has the adapter's alone."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in kinds.items()}
    has_adapter = bool(getattr(model, "peft_config", None))
    if has_adapter:
        found = model.get_adapter_state_dict(state_dict=empty)
        written, groups = {f"base_model.model.{name}": tensor for name, tensor in found.items()}, [list(empty)]
    elif isinstance(model, PreTrainedModel):
        written, groups = revert_weight_conversion(model, dict(empty)), _groups(model, empty)
    else:
        written, groups = empty, [[name] for name in empty]
    names = {id(tensor): name for name, tensor in empty.items()}
    renamed = {names[id(tensor)]: name for name, tensor in written.items() if id(tensor) in names}
    pattern = "adapter_model{suffix}.safetensors" if has_adapter else "model{suffix}.safetensors"
    limit = SHARD_SIZE if isinstance(model, PreTrainedModel) and not has_adapter else "1000TB"
    split = split_torch_state_dict_into_shards(written, filename_pattern=pattern, max_shard_size=limit)
    # A group is read for the first file that has a tensor of it.
    files = {name: file for file, inside in split.filename_to_tensors.items() for name in inside}
    of_file: dict[str, list[list[str]]] = {file: [] for file in split.filename_to_tensors}
    for group in groups:
        made = _converted(model, {name: empty[name] for name in group}, renamed, has_adapter)
        of_file[min(files[name] for name in made)].append(group)
    return {
        "steps": [
            {"file": file, "names": inside, "groups": of_file[file]}
            for file, inside in split.filename_to_tensors.items()
        ],
        "types": {name: str(dtype).removeprefix("torch.") for name, (_, dtype) in kinds.items()},
        "renamed": renamed if has_adapter or len(renamed) == len(empty) == len(written) else {},
        "metadata": {"total_parameters": sum(tensor.numel() for tensor in empty.values()), **split.metadata},
    }


def _groups(model: PreTrainedModel, empty: Tensors) -> list[list[str]]:
    """The names of tensors in the smallest groups that transformers converts to what it makes of all of them together.

    It joins and divides some, such as those of experts; which ones, only trying tells.
    """

    def kinds(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    wanted = kinds(revert_weight_conversion(model, dict(empty)))
    for key in (r".*", r".*?\.\d+\.|.*"):  # each for itself, each layer for itself
        groups: dict[str, list[str]] = {}
        for name in empty:
            match = re.match(key, name)
            groups.setdefault(match[0] if match else name, []).append(name)
        found: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for group in groups.values():
            found |= kinds(revert_weight_conversion(model, {name: empty[name] for name in group}))
        if found == wanted:
            return list(groups.values())
    return [list(empty)]


def _converted(model: Any, tensors: Tensors, renamed: dict[str, str], has_adapter: bool) -> Tensors:
    """Tensors as they are in files."""
    if has_adapter or all(name in renamed for name in tensors):
        return {renamed[name]: tensor for name, tensor in tensors.items() if name in renamed}
    return revert_weight_conversion(model, tensors)


def write_files(
    folder: Path, plan: Plan, model: Any, read: Callable[[str], torch.Tensor | None],
    alone: Callable[[Callable[[], None]], None],
) -> None:  # fmt: skip
    """Write the files of a plan, and their index if there are several.

    read(name): a tensor of the model, whole, in host memory; None on a rank that writes nothing. alone: calls what one
    process does while others wait. model: is asked how to convert tensors, where some are converted.
    """
    ready: Tensors = {}
    for step in plan["steps"]:
        for group in step["groups"]:
            tensors = {name: tensor for name in group if (tensor := read(name)) is not None}
            if tensors:
                has_adapter = step["file"].startswith("adapter_")
                ready |= _converted(model, tensors, plan["renamed"], has_adapter)
        alone(functools.partial(_save, ready, step["names"], folder / step["file"]))
        memory.trim()
    if len(plan["steps"]) > 1:
        alone(lambda: _write_index(folder, plan))


def _save(ready: Tensors, names: list[str], file: Path) -> None:
    save_file({name: ready.pop(name).contiguous() for name in names}, file, {"format": "pt"})


def _write_index(folder: Path, plan: Plan) -> None:
    places = {name: step["file"] for step in plan["steps"] for name in step["names"]}
    index = {"metadata": plan["metadata"], "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def without_copies(model: PreTrainedModel, ties: dict[str, str]) -> Iterator[str]:
    """The names of a model's tensors, of tied ones only the one that transformers expects in files.

    ties: name -> the name of the first tensor that is the same.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, list[str]] = {}
    for name, first in ties.items():
        groups.setdefault(first, []).append(name)
    for names in groups.values():
        yield next((name for name in names if name not in tied), names[0])
