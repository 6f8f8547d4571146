"""200 faulty settings, DeepSpeed JSONs, data files and checkpoints, generated from seeds: each is a one-line error.

Every generated input has a fault: a draw that happens to be valid is drawn again. So a test fails if its input is
accepted. The inputs go to the functions that a launch calls first; tests/launch/test_launch.py has some real launches.
"""

import copy
import importlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import RECIPES, ROOT, run_ranks

from lib.data.rows import load_rows
from lib.errors import UserError
from lib.run import checkpoint_files
from lib.settings import config
from lib.settings.ds_config import load_ds_config

pytestmark = pytest.mark.usefixtures("one_rank")
SEEDS = 50  # inputs of each kind
Draw = random.Random


def refused(do: Callable[[], Any]) -> str:
    """The text of the UserError that `do` must raise: one line, not long, and no other exception."""
    with pytest.raises(UserError) as error:
        do()
    text = str(error.value)
    assert 10 < len(text) < 600 and "\n" not in text and "Traceback" not in text, text
    return text


def misspelt(draw: Draw, word: str, known: list[str]) -> str:
    """The word with a letter dropped, doubled or exchanged with the next one."""
    while True:
        at = draw.randrange(len(word) - 1)
        found = draw.choice(
            [
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            ]
        )
        if found not in known:
            return found


# --- settings -------------------------------------------------------------------------------------

NUMBERS = [
    "batch_size",
    "max_length",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "gradient_clipping",
    "log_every",
    "rank_timeout",
    "keep_checkpoints",
]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_faulty_settings(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    name = draw.choice(RECIPES)
    recipe: Any = importlib.import_module(f"recipes.{name}")
    text = (ROOT / "recipes" / f"{name}.yaml").read_text().split("quick:")[0]
    settings = yaml.safe_load(text)
    key, number = draw.choice(list(settings)), draw.choice([name for name in NUMBERS if name in settings])
    lines = text.splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith(f"{key}:"))
    at_number = next(at for at, line in enumerate(lines) if line.startswith(f"{number}:"))
    path = tmp_path / "faulty.yaml"
    arguments: list[str] = ["--deepspeed_config", "x.json", "--config", str(path)]
    fault = draw.choice(
        [
            "misspelt",
            "missing",
            "twice",
            "word",
            "negative",
            "null",
            "list",
            "not yaml",
            "not utf-8",
            "misspelt argument",
            "argument",
        ]
    )
    if fault == "misspelt":
        lines[at] = misspelt(draw, key, list(settings)) + lines[at][len(key) :]
    elif fault == "missing":
        del lines[at]
    elif fault == "twice":
        lines.append(lines[at])
    elif fault in ("word", "negative", "null", "list"):
        value = {
            "word": draw.choice(["much", "1,5", "0x1g", "ten"]),
            "negative": "-1",
            "null": "null",
            "list": "[1, 2]",
        }[fault]
        lines[at_number] = f"{number}: {value}"
    elif fault == "not yaml":
        lines[at] = draw.choice(["{key", "key: [1", "  : : :", "key: 'x", "\tkey: 1", "just words"])
    elif fault == "misspelt argument":
        arguments += [f"--{misspelt(draw, key, [*settings, 'config', 'quick', 'help'])}", "1"]
    elif fault == "argument":
        arguments += [f"--{number}", draw.choice(["much", "-3", "1e400x", "", "nan,", "true?"])]
    path.write_text("\n".join(lines) + "\n")
    if fault == "not utf-8":
        path.write_bytes(path.read_bytes().replace(b"seed", b"se\xffed"))
    refused(lambda: config.parse(recipe.Config, recipe.__file__, arguments))


# --- DeepSpeed JSONs ------------------------------------------------------------------------------


def json_fault(draw: Draw, whole: dict[str, Any]) -> str:
    """A DeepSpeed JSON with one fault in it, as text."""
    changed = copy.deepcopy(whole)
    zero = changed["zero_optimization"]
    fault = draw.choice(
        [
            "top",
            "inner",
            "type",
            "stage",
            "removed",
            "batch",
            "contradiction",
            "auto",
            "truncated",
            "no object",
            "refused",
        ]
    )
    if fault == "top":
        key = draw.choice(list(changed))
        changed[misspelt(draw, key, list(changed))] = changed.pop(key)
    elif fault == "inner":
        key = draw.choice(
            ["overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "contiguous_gradients", "offload_optimizer"]
        )
        zero[misspelt(draw, key, [])] = 1
    elif fault == "type":
        zero[draw.choice(["overlap_comm", "reduce_bucket_size", "allgather_bucket_size"])] = draw.choice(
            ["large", [], {}, "-5"]
        )
    elif fault == "stage":
        zero["stage"] = draw.choice([4, -1, "2", True, 2.5, None, [2]])
    elif fault == "removed":
        changed[
            draw.choice(
                [
                    "nebula",
                    "compression_training",
                    "amp",
                    "sparse_attention",
                    "elasticity",
                    "curriculum_learning",
                    "eigenvalue",
                ]
            )
        ] = {"enabled": False}
    elif fault == "batch":
        changed["train_micro_batch_size_per_gpu"] = draw.choice([0, -2, 2.5, 7, 1000, "many", None, True, [4]])
    elif fault == "contradiction":
        key, value = draw.choice(
            [
                ("train_batch_size", 999),
                ("gradient_clipping", 7.5),
                ("bf16", {"enabled": True}),
                ("optimizer", {"type": "Lamb"}),
                ("scheduler", {"type": "OneCycle"}),
            ]
        )
        changed[key] = value
    elif fault == "auto":
        key, value = draw.choice(
            [("stage", "auto"), ("offload_optimizer", {"device": "auto"}), ("offload_param", "cpu")]
        )
        zero[key] = value
    elif fault == "truncated":
        text = json.dumps(changed)
        return text[: draw.randrange(1, len(text) - 1)]
    elif fault == "no object":
        return draw.choice(["", "[]", "3", "null", '"zero2"', "{{}}"])
    else:
        key = draw.choice(
            ["tensor_parallel", "autotp", "pipeline", "data_efficiency", "torch_autocast", "hybrid_engine"]
        )
        changed[key] = {"autotp_sise": 2} if key == "tensor_parallel" else {"enabled": True}
    return json.dumps(changed)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_faulty_jsons(tmp_path: Path, seed: int) -> None:
    draw = random.Random(1000 + seed)
    name = draw.choice(RECIPES)
    recipe: Any = importlib.import_module(f"recipes.{name}")
    cfg: Any = config.load(recipe.Config, ROOT / "recipes" / f"{name}.yaml", {"precision": "fp32"})
    files = sorted((ROOT / "ds_configs" / name).glob("*.json"))
    path = tmp_path / "faulty.json"
    path.write_text(json_fault(draw, json.loads(draw.choice(files).read_text())))
    refused(lambda: load_ds_config(path, cfg, world_size=2))


# --- data -----------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"text": f"row number {i}, some words", "label": "even" if i % 2 == 0 else "odd"} for i in range(60)
]


def write_faulty_data(draw: Draw, folder: Path) -> Path:
    """A data file with one fault in it."""
    rows, at, kind = copy.deepcopy(ROWS), draw.randrange(60), draw.choice([".jsonl", ".csv", ".parquet"])
    path = folder / f"rows{kind}"
    fault = draw.choice(["value", "type", "column", "bytes", "cut", "empty", "no rows", "one label", "suffix"])
    if fault == "value":
        rows[at]["text"] = None
    elif fault == "type":
        rows[at]["text"] = draw.choice([7, 1.5, True, ["a"], {"a": 1}]) if kind == ".jsonl" else None
    elif fault == "column":
        wrong = misspelt(draw, "text", ["text"])
        rows = [{wrong: row["text"], "label": row["label"]} for row in rows]
    elif fault == "one label":
        rows = [row | {"label": "even"} for row in rows]
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".csv":  # in a CSV, a value is missing where a line has too few cells
        header = list(rows[0])
        lines = [[str(row[name]).replace(",", ";") for name in header] for row in rows]
        if fault in ("value", "type"):
            lines[at] = draw.choice([["too", "many", "cells"], ["too few"]])
        path.write_text("\n".join(",".join(cells) for cells in [header, *lines]) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = path.read_bytes()
    if fault == "bytes":
        # In Parquet, in the footer.
        middle = len(data) - draw.randrange(2, 9) if kind == ".parquet" else data.index(b"words", len(data) // 3)
        data = data[:middle] + b"\xff\xfe" + data[middle + 2 :]
    elif fault == "cut":
        if kind == ".csv":  # a CSV that is cut off may be valid, so it gets an open quote instead
            data += b'"an open quote,even'
            data = data.replace(b"row number 3;", b'"row number 3;')
        elif kind == ".parquet":
            data = data[: draw.randrange(30, len(data) // 2)]
        else:
            line_end = data.index(b"\n", draw.randrange(10, 1000))
            data = data[: line_end - draw.randrange(1, 20)]
    elif fault == "empty":
        data = b""
    elif fault == "no rows":
        data = data[: data.index(b"\n") + 1] if kind == ".csv" else b"\n"
    elif fault == "suffix":
        path = folder / f"rows{draw.choice(['.txt', '.tsv', '.jsonl.bak', ''])}"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("seed", range(SEEDS))
def test_faulty_data(tmp_path: Path, seed: int) -> None:
    path = write_faulty_data(random.Random(2000 + seed), tmp_path)
    refused(lambda: load_rows(str(path), None, text={"text": "text"}, label={"label": "label"}))


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 4 and 8 of a run of 2 ranks."""
    folder = tmp_path_factory.mktemp("written")
    run_ranks(2, "resume_worker", "write", folder, "fp32", "zero2")
    return folder / "zero2-2" / "checkpoints"


def damage(draw: Draw, last: Path, other: Path) -> None:
    """Damage the checkpoint in the folder `last`. other: a folder with the checkpoint of another step."""
    file = draw.choice(sorted(last.iterdir()))
    data = bytearray(file.read_bytes())
    fault = draw.choice(
        ["flip", "flip", "flip", "cut", "longer", "zeros", "missing", "exchanged", "of another step", "empty"]
    )
    if fault == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(7)
    elif fault == "cut":
        del data[draw.randrange(len(data)) :]
    elif fault == "longer":
        data += bytes(draw.randrange(1, 5000))
    elif fault == "zeros":  # as a file system leaves a page that was never written
        at = draw.randrange(len(data))
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
        data[at] ^= 1
    elif fault == "of another step":
        data = bytearray((other / file.name).read_bytes())
    if fault == "missing":
        file.unlink()
    elif fault == "exchanged":
        first, second = last / "rank-00000-of-00002.safetensors", last / "rank-00001-of-00002.safetensors"
        first.rename(last / "x"), second.rename(first), (last / "x").rename(second)
    elif fault == "empty":
        for inner in last.iterdir():
            inner.unlink()
    else:
        file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_faulty_checkpoints(tmp_path: Path, checkpoints: Path, seed: int) -> None:
    """A damaged checkpoint is named and the older one is taken. If that is damaged too, the run is refused."""
    draw = random.Random(3000 + seed)
    shutil.copytree(checkpoints, tmp_path / "run")
    half, last = (tmp_path / "run" / checkpoint_files.folder_of(step) for step in (4, 8))
    damage(draw, last, half)
    folder, manifest, notes = checkpoint_files.find_newest(tmp_path / "run")
    assert folder == half and manifest["step"] == 4
    (note,) = notes
    assert last.name in note and "damaged" in note and "\n" not in note and len(note) < 300
    damage(draw, half, checkpoints / last.name)
    text = refused(lambda: checkpoint_files.find_newest(tmp_path / "run"))
    assert "is whole" in text
    assert half.is_dir()  # and nothing was deleted
