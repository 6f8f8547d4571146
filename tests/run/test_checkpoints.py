"""Checkpoints: resumed under every config from every other, found whole or passed over, kept and deleted; steps that
are not finite.
"""

import fcntl
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ALL, CONFIGS, MEASURED, ROOT, run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lib.distributed.compilation import check_compilation
from lib.errors import Stopped, UserError
from lib.models.hub import load_config, load_weights
from lib.run import checkpoint_files
from lib.run.run import Run
from lib.settings import config as settings

# Number of ranks -> configs that go on from each of the twelve checkpoints.
READERS = {1: CONFIGS, 2: CONFIGS} if ALL else {1: ["zero1", "zero3"], 2: ["zero0", "zero2", "zero3_offload"]}
HALF, LAST = checkpoint_files.folder_of(4), checkpoint_files.folder_of(8)


def worker(what: str, world_size: int, folder: Path, precision: str, configs: list[str]) -> Any:
    run_ranks(world_size, "resume_worker", what, folder, precision, *configs)
    return json.loads((folder / f"{what}-{world_size}.json").read_text())


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], list[str], Path]:
    """(largest relative difference of a loss by ordered pair of config and ranks, pairs that are equal bit for bit,
    folder)
    """
    folder = tmp_path_factory.mktemp("resumed")
    whole = {world_size: worker("write", world_size, folder, "fp32", CONFIGS) for world_size in (1, 2)}
    return *compare(
        whole,
        {world_size: worker("read", world_size, folder, "fp32", configs) for world_size, configs in READERS.items()},
    ), folder


def compare(whole: dict[int, Any], cut: dict[int, Any]) -> tuple[dict[str, float], list[str]]:
    differences, exact = {}, []
    for world_size, found in cut.items():
        for pair, losses in found.items():
            source, config = pair.split()
            source_config, source_ranks = source.split("-")
            expected = whole[int(source_ranks)][source_config][4:]
            assert len(losses) == len(expected) == 4
            differences[f"{source} to {config}-{world_size}"] = max(
                abs(x - y) / abs(y) for x, y in zip(losses, expected, strict=True)
            )
            if losses == expected:
                exact.append(f"{source} to {config}-{world_size}")
    return differences, exact


@pytest.mark.slow
def test_every_config_resumes_every_other(resumed: tuple[dict[str, float], list[str], Path]) -> None:
    differences, _, _ = resumed
    assert len(differences) == 12 * sum(map(len, READERS.values()))
    MEASURED.append(
        f"{f'resumed, {len(differences)} ordered pairs':<24} {'fp32':<24} {'uninterrupted':<16} "
        f"{max(differences.values()):.1e}"
    )
    assert max(differences.values()) < 1e-5, max(differences, key=lambda pair: differences[pair])


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size, config", [(world_size, config) for world_size, configs in READERS.items() for config in configs]
)
def test_the_same_config_resumes_bit_for_bit(
    resumed: tuple[dict[str, float], list[str], Path], config: str, world_size: int
) -> None:
    assert f"{config}-{world_size} to {config}-{world_size}" in resumed[1]


@pytest.mark.slow
def test_another_layout_in_memory_is_the_same_checkpoint(tmp_path: Path) -> None:
    """With round_robin_gradients, stage 2 lays the parameters out in another order."""
    configs = ["zero2+round_robin_gradients", "zero2", "zero3"]
    differences, _ = compare(
        {2: worker("write", 2, tmp_path, "fp32", configs)}, {2: worker("read", 2, tmp_path, "fp32", configs)}
    )
    assert len(differences) == 9 and max(differences.values()) < 1e-5


@pytest.mark.slow
def test_bf16_keeps_its_fp32_weights(tmp_path: Path) -> None:
    configs = (
        ["zero0", "zero1+fp32_grads", "zero2", "zero3_offload"]
        if ALL
        else ["zero0", "zero1+fp32_grads", "zero3_offload"]
    )
    differences, exact = compare(
        {2: worker("write", 2, tmp_path, "bf16", configs)}, {2: worker("read", 2, tmp_path, "bf16", configs)}
    )
    assert max(differences.values()) < 2e-3
    assert {f"{config}-2 to {config}-2" for config in configs} <= set(exact)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_infinite_loss_on_one_rank_changes_no_weight_on_any(tmp_path: Path, precision: str) -> None:
    found = worker(
        "poison",
        2,
        tmp_path,
        precision,
        CONFIGS if precision == "fp32" else ["zero0", "zero1+fp32_grads", "zero2", "zero3"],
    )
    for config, outcome in found.items():
        assert "the loss is" in outcome["error"] and "at step 3" in outcome["error"], config
        assert outcome["evidence"] == ["batch-rank-00000.safetensors", "batch-rank-00001.safetensors", "report.json"]
        before = tmp_path / f"{config}-2" / "checkpoints" / checkpoint_files.folder_of(2)
        # Of Adam: the third step was not taken.
        assert checkpoint_files.read_manifest(before)["scalars"] == {"step": 2.0}
        assert [math.isfinite(loss) for loss in outcome["skipping"]] == [step != 3 for step in range(1, 9)]
        assert outcome["skipping"] == pytest.approx(
            found["zero2"]["skipping"], rel=1e-5 if precision == "fp32" else 2e-3
        )


# --- what is on the disk, in this process ---------------------------------------------------------


@pytest.fixture
def run_folder(resumed: tuple[dict[str, float], list[str], Path], tmp_path: Path) -> Path:
    """A run of 2 ranks at stage 2 with checkpoints of step 4 and step 8."""
    shutil.copytree(resumed[2] / "zero2-2", tmp_path / "run")
    return tmp_path / "run"


DS_CONFIG = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}


def recipe_settings(run_folder: Path, **changes: Any) -> Any:
    values = yaml.safe_load((run_folder / "config.yaml").read_text()).items()
    given = {name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in values}
    recipe = importlib.import_module("recipes.causal_lm")
    return settings.load(
        recipe.Config,
        ROOT / "recipes" / "causal_lm.yaml",
        given | {"run_dir": str(run_folder), "resume": "true"} | changes,
    )


def open_run(run_folder: Path, **changes: Any) -> tuple[int, list[str]]:
    """(step of the checkpoint that is resumed, notes)"""
    run = Run(recipe_settings(run_folder, **changes), DS_CONFIG, "recipes/causal_lm.py")
    run.close()
    return run.checkpoint[1]["step"] if run.checkpoint else 0, run.notes


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a flipped byte in a shard": lambda last: flip(last / "rank-00001-of-00002.safetensors"),
    "a flipped byte in the manifest": lambda last: flip(last / "checkpoint.json"),
    "a truncated shard": lambda last: os.truncate(last / "rank-00000-of-00002.safetensors", 1000),
    "a truncated manifest": lambda last: os.truncate(last / "checkpoint.json", 100),
    "a missing shard": lambda last: (last / "rank-00001-of-00002.safetensors").rename(last.parent.parent / "elsewhere"),
    "a missing manifest": lambda last: (last / "checkpoint.json").rename(last.parent.parent / "elsewhere"),
    "an empty folder": lambda last: [file.rename(last.parent.parent / file.name) for file in list(last.iterdir())],
}


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(run_folder: Path, damage: str) -> None:
    DAMAGES[damage](run_folder / "checkpoints" / LAST)
    step, notes = open_run(run_folder)
    assert step == 4
    (note,) = notes
    assert LAST in note and "damaged" in note and "\n" not in note
    # Nothing was changed before training goes on.
    assert {path.name for path in (run_folder / "checkpoints").iterdir()} == {
        HALF,
        LAST,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_where_no_checkpoint_is_whole_it_does_not_start_from_scratch(run_folder: Path) -> None:
    for folder in (HALF, LAST):
        flip(run_folder / "checkpoints" / folder / "rank-00000-of-00002.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        open_run(run_folder)
    assert {path.name for path in (run_folder / "checkpoints").iterdir()} == {HALF, LAST}


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_of_a_newer_format_is_refused(run_folder: Path) -> None:
    manifest = run_folder / "checkpoints" / LAST / "checkpoint.json"
    newer = json.loads(manifest.read_text()) | {"format": checkpoint_files.FORMAT + 1}
    manifest.write_text(json.dumps(newer | {"checksum": checkpoint_files.checksum_of(newer)}))
    with pytest.raises(UserError, match="newer code"):
        open_run(run_folder)


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_what_would_change_the_result_is_refused_and_the_rest_is_not(run_folder: Path) -> None:
    assert open_run(run_folder, save_every="2", rank_timeout="3", time_limit="9")[0] == 8
    for changes in (
        {"learning_rate": "1e-4"},
        {"batch_size": "8"},
        {"seed": "9"},
        {"dataset": "other.csv"},
        {"precision": "bf16"},
        {"hidden_size": "512"},
    ):
        with pytest.raises(UserError, match=f"{next(iter(changes))} was .* and is .*"):
            open_run(run_folder, **changes)
    step, notes = open_run(run_folder, max_steps="16")
    assert step == 8 and "max_steps was 8 and is 16" in notes[0]
    # Nothing is written before all is checked.
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["max_steps"] == 8
    with pytest.raises(UserError, match="set one of max_steps and epochs"):  # before rows are read
        open_run(run_folder, max_steps="20", epochs="2")
    with pytest.raises(UserError, match="keep_best is true, but eval_every is null"):
        open_run(run_folder, keep_best="true", eval_every="null")
    with pytest.raises(UserError, match="resume and overwrite"):
        open_run(run_folder, overwrite="true")
    with pytest.raises(UserError, match="--resume needs --run_dir"):
        open_run(run_folder, run_dir="null")


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_a_setting_that_one_of_them_lacks_is_refused(run_folder: Path) -> None:
    manifest = run_folder / "checkpoints" / LAST / "checkpoint.json"
    original = json.loads(manifest.read_text())
    without_seed = {name: value for name, value in original["settings"].items() if name != "seed"}
    for changed, words in (
        (original["settings"] | {"betas": 0.9}, "has a setting 'betas'"),
        (without_seed, "lacks the setting 'seed'"),
    ):
        newer = original | {"settings": changed}
        manifest.write_text(json.dumps(newer | {"checksum": checkpoint_files.checksum_of(newer)}))
        with pytest.raises(UserError, match=words):
            open_run(run_folder)


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_a_run_that_has_finished_is_left_alone(run_folder: Path) -> None:
    (run_folder / "result.json").write_text('{"finished": true, "steps": 8}')
    with pytest.raises(Stopped, match="finished already") as stopped:
        open_run(run_folder)
    assert stopped.value.code == 0
    assert open_run(run_folder, max_steps="12")[0] == 8  # it is asked for more
    (run_folder / "result.json").write_text('{"finished": true, "steps": 8}')
    shutil.rmtree(run_folder / "checkpoints")
    with pytest.raises(UserError, match="finished without a checkpoint"):
        open_run(run_folder, max_steps="16")


@pytest.mark.usefixtures("one_rank")
def test_a_start_that_failed_before_training_is_no_run_to_be_kept(tmp_path: Path) -> None:
    recipe = importlib.import_module("recipes.causal_lm")

    def start() -> None:
        cfg = settings.load(recipe.Config, ROOT / "recipes" / "causal_lm.yaml", {"run_dir": str(tmp_path / "run")})
        Run(cfg, DS_CONFIG, "recipes/causal_lm.py").close()

    start()
    start()
    for kept in ("metrics.jsonl", "mine.txt"):
        (tmp_path / "run" / kept).touch()
        with pytest.raises(UserError, match="exists already"):
            start()
        (tmp_path / "run" / kept).unlink()
    (tmp_path / "run" / "versions.json").unlink()  # not left by a start
    with pytest.raises(UserError, match="exists already"):
        start()


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_a_run_in_use_is_not_touched(run_folder: Path) -> None:
    with (run_folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run"):
            open_run(run_folder)
    assert open_run(run_folder)[0] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, "is another model's: parameter model.embed_tokens.weight is"),
        ({"rows": 99}, "was trained on 100 rows, but dataset sotu now gives 99"),
        ({"max_steps": 7}, "is beyond the 7 steps"),
    ],
)
def test_another_model_or_other_data_is_refused_and_nothing_is_changed(
    run_folder: Path, changes: dict[str, int], words: str
) -> None:
    before = {
        path: path.read_bytes()
        for path in run_folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "log.txt")
    }
    changed = ",".join(f"{name}={value}" for name, value in changes.items())
    with pytest.raises(AssertionError, match=re.escape(words)):
        run_ranks(2, "resume_worker", "resume", run_folder, "fp32", "zero2", changed)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_longer_run_goes_on_with_the_rates_of_its_own_schedule(run_folder: Path) -> None:
    run_ranks(2, "resume_worker", "resume", run_folder, "fp32", "zero2", "max_steps=16")
    entries = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    # By the number of steps before; cosine, 2 steps of warm-up.
    expected = [0.5e-2 * (1 + math.cos(math.pi * (step - 2) / 14)) for step in range(8, 16)]
    assert [entry["learning_rate"] for entry in entries[8:]] == pytest.approx(expected)


# --- a whole run ----------------------------------------------------------------------------------


def train(*settings: Any) -> str:
    """What rank 0 of a quick run of causal_lm printed."""
    return run_ranks(
        2, "recipe_worker", "causal_lm", "--deepspeed_config", "ds_configs/causal_lm/zero2.json", "--quick", *settings
    )


@pytest.mark.slow
def test_the_newest_and_the_best_are_kept_and_the_best_is_exported(tmp_path: Path) -> None:
    settings = "--max_steps 40 --learning_rate 3 --warmup_steps 40 --gradient_clipping 0 --eval_every 3 "
    settings += "--save_every 5 --keep_checkpoints 1 --keep_best"
    train("--run_dir", tmp_path / "run", *settings.split())
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    perplexity = {
        entry["step"]: entry["validation_perplexity"] for entry in entries if "validation_perplexity" in entry
    }
    best = min(perplexity, key=lambda step: perplexity[step])
    folders = checkpoint_files.list_complete(tmp_path / "run" / "checkpoints")
    assert {manifest["step"] for _, manifest in folders} == {40, best} and best != 40
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in (tmp_path / "run" / "checkpoints" / checkpoint_files.folder_of(best)).glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            if key.startswith("fp32/"):
                name, start = key.removeprefix("fp32/").split("@")
                pieces.setdefault(name, []).append((int(start), tensor))
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").named_parameters():
        whole = torch.cat([tensor for _, tensor in sorted(pieces[name], key=lambda piece: piece[0])])
        assert torch.equal(parameter.flatten(), whole), name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Makes a disk of so many KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted: list[Path] = []

    def mount(kibibytes: int) -> Path:
        folder = tmp_path / f"disk-{kibibytes}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder], check=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_and_no_more(small_disk: Any) -> None:
    disk = small_disk(2400)  # room for one checkpoint of 1.4 MB and the export, not for two
    printed = train("--run_dir", disk / "run", "--save_every", 8)
    # While the disk is full, metrics.jsonl may have to wait for room too.
    warnings = [line for line in printed.splitlines() if line.startswith("warning: no checkpoint")]
    assert len(warnings) == 2
    assert re.search(
        r"no checkpoint of step 16: rank [01]: No space left on device; the newest is step-00000008", warnings[0]
    )
    assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step-00000008"]
    whole = disk / "run" / "checkpoints" / "step-00000008"
    assert (
        checkpoint_files.file_problem(
            whole / "rank-00000-of-00002.safetensors",
            checkpoint_files.read_manifest(whole)["files"]["rank-00000-of-00002.safetensors"],
        )
        is None
    )
    with pytest.raises(AssertionError, match="UserError: a checkpoint takes about"):
        train("--run_dir", small_disk(800) / "run", "--save_every", 8)


# --- before the start -----------------------------------------------------------------------------


def test_a_compilation_that_was_killed_is_found_and_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    check_compilation("cpu_adam")
    lock.touch()
    check_compilation("cpu_adam")  # just made: its compiler may not have started yet
    os.utime(lock, (time.time() - 600, time.time() - 600))
    with pytest.raises(UserError, match=r"was killed.*delete the file"):
        check_compilation("cpu_adam")
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=lock.parent)
    check_compilation("cpu_adam")
    compiler.kill()
    compiler.wait()


@pytest.mark.usefixtures("one_rank")
def test_pickled_weights_are_read_only_when_trusted(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    config = load_config(str(tmp_path), 0.0, trust_remote_code=False)
    with pytest.raises(UserError, match="pickles"):
        load_weights(AutoModelForCausalLM, str(tmp_path), config, trust_remote_code=False)
    loaded = load_weights(AutoModelForCausalLM, str(tmp_path), config, trust_remote_code=True)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
