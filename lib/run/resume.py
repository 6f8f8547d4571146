"""Going on with an earlier start of a run: is it finished, which checkpoint is the newest whole one, does it fit?"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import yaml

from lib.distributed import ranks
from lib.errors import UserError, did_you_mean, display_path
from lib.run import checkpoint_files
from lib.run.console import Console
from lib.run.signs import Signs
from lib.settings.run_settings import MAY_CHANGE, NEWER

VERSIONS_OF = ("deepspeed", "torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")

Checkpoint = tuple[Path, checkpoint_files.Manifest]


def versions() -> dict[str, str]:
    """The versions of the packages that a run's numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}


def finished_before(folder: Path, cfg: Any) -> str | None:
    """Why there is nothing to do, if the run in the folder has ended well and is asked for neither more steps nor
    other data."""
    try:
        steps = json.loads((folder / "result.json").read_text(encoding="utf-8"))["steps"]
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if any(before.get(name) != getattr(cfg, name, None) for name in ("dataset", "max_steps", "epochs")):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):  # not whole
        return None
    (folder / "result.json").touch()  # by which lib/launch/supervise.py sees that this start has succeeded too
    more = "a larger --max_steps or --epochs would go on with it"
    return f"{display_path(folder)} has finished already, after {steps} steps; {more}"


def find_checkpoint(run_folder: Path, recipe: str, cfg: Any) -> tuple[Checkpoint | None, list[str]]:
    """With --resume, the newest whole checkpoint of the run, whose settings fit these; and notes for the user.

    Every rank must call it.
    """
    if not cfg.resume:
        return None, []
    parent = run_folder / "checkpoints"
    with Signs(Console(1)) if ranks.rank() == 0 else contextlib.nullcontext():
        folder, manifest, notes = checkpoint_files.find_newest(parent)
    if folder is None:
        if (run_folder / "result.json").is_file():
            raise UserError(
                f"{display_path(run_folder)} has finished without a checkpoint to go on from; "
                "start a new run with another --run_dir"
            )
        return None, [*notes, f"there is no checkpoint in {display_path(parent)}: starting from the first step"]
    if manifest["recipe"] != recipe:
        raise UserError(
            f"{display_path(folder)} was made by the recipe {manifest['recipe']}, not {recipe}; "
            "give that recipe's run another --run_dir"
        )
    notes += _changes(folder, manifest, dataclasses.asdict(cfg))
    for name, version in versions().items():
        before = manifest["versions"].get(name)
        if before != version:
            notes.append(f"{name} was {before} and is {version}: the numbers may differ slightly")
    return (folder, manifest), notes


def _changes(folder: Path, manifest: checkpoint_files.Manifest, now: dict[str, Any]) -> list[str]:
    """Notes on settings that differ from the checkpoint's. Raises UserError for one that would change the result."""
    notes = []
    before = {name: value for name, value in NEWER.items() if name in now} | manifest["settings"]
    for name in {**before, **now}:
        if name in now and name in before and now[name] != before[name]:
            change = f"{name} was {before[name]!r} and is {now[name]!r}"
            if name not in MAY_CHANGE or (name == "dataset" and manifest.get("data") is None):
                raise UserError(
                    f"{display_path(folder)}: {change}, which would change the result; "
                    "set it back, or start a new run with another --run_dir"
                )
            if name == "dataset":
                notes.append(f"{change}: it must have the same rows")
            if name in ("max_steps", "epochs"):
                notes.append(f"{change}: the learning-rate schedule is that of the new length from here on")
        elif name not in MAY_CHANGE and name not in now:
            raise UserError(
                f"{display_path(folder)} has a setting '{name}' that this recipe does not have"
                f"{did_you_mean(name, now)}; resume with the code that wrote it"
            )
        elif name not in MAY_CHANGE and name not in before:
            raise UserError(f"{display_path(folder)} lacks the setting '{name}'; resume with the code that wrote it")
    return notes


def check_data(checkpoint: Checkpoint, data: dict[str, Any], total_steps: int, dataset: str) -> None:
    """Raise a UserError where a checkpoint was trained on other rows, or is beyond this run's end.

    data: "rows", the number of training rows; "data", the fingerprint of what they are made from; "sample", that of the
    first of them. The first checkpoints lack these two.
    """
    folder, manifest = checkpoint
    if manifest["rows"] != data["rows"] or manifest.get("data", data["data"]) != data["data"]:
        gives = f"{data['rows']:,}" if manifest["rows"] != data["rows"] else "others, though as many"
        raise UserError(
            f"{display_path(folder)} was trained on {manifest['rows']:,} rows, but dataset {dataset} now gives "
            f"{gives}; resume with the same data, or start a new run"
        )
    if manifest.get("sample", data["sample"]) != data["sample"]:
        raise UserError(
            f"{display_path(folder)} was trained on the same texts cut into other tokens: the model's tokenizer or its "
            "chat template has changed; set it back, or start a new run"
        )
    if manifest["step"] > total_steps:
        raise UserError(
            f"{display_path(folder)} is beyond the {total_steps} steps that this run is to have; "
            "give a larger --max_steps or --epochs"
        )


def steps_until(lines: list[str], step: int) -> list[str]:
    """The lines of metrics.jsonl up to a step; of a line that a killed run left half written, the step is not known."""
    kept = []
    for line in lines:
        try:
            is_done = float(json.loads(line)["step"]) <= step
        except (ValueError, KeyError, TypeError):
            continue
        if is_done:
            kept.append(line)
    return kept
