"""The contract of recipes that train a pipeline, a user's copy included: the numbers do not depend on the stages, the
ranks, or the form in which a run began. pipeline_lm has those of causal_lm on one device.
"""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PIPELINES, ROOT, run_ranks
from contract_cases import STEPS
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from lib.distributed.pipeline import check_stages
from lib.errors import UserError
from lib.run.checkpoint_files import folder_of

Stage = importlib.import_module("recipes.pipeline_lm").Stage

# The quick settings, on little text, with clipping at most steps.
SETTINGS: list[Any] = ["--quick", "--max_rows", "1", "--gradient_clipping", "0.4", "--log_every", "1"]
SETTINGS += ["--max_steps", STEPS]
SAVING: list[Any] = ["--save_every", STEPS // 2, "--keep_checkpoints", "9"]
RUNS = [("zero0", 2), ("zero1", 4), ("pp4_zero1", 4)]  # 2 stages, 2 pipelines of 2 stages, 4 stages
RESUMED = [("zero1-4", "zero1", 4), ("pp4_zero1-4", "zero0", 2)]  # from the checkpoint of the run, in the middle

Records = list[dict[str, Any]]


def train(folder: Path, recipe: str, config: str | Path, world_size: int, *more: Any) -> Records:
    """The records of the steps of a run in the folder. config: a file, or its name in ds_configs."""
    file = config if isinstance(config, Path) else ROOT / "ds_configs" / recipe / f"{config}.json"
    arguments = ["--deepspeed_config", file, "--run_dir", folder, *SETTINGS]
    run_ranks(world_size, "recipe_worker", recipe, *arguments, *more)
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss" in record]


def assert_alike(found: Records, expected: Records, loss: float = 1e-5, norm: float = 1e-4) -> None:
    assert len(found) == len(expected) == STEPS
    for name, allowed in (("loss", loss), ("grad_norm", norm)):
        assert [record[name] for record in found] == pytest.approx([record[name] for record in expected], rel=allowed)


@pytest.fixture(scope="module", params=PIPELINES)
def pipelines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Records]]:
    """(folder, {"<config>-<ranks>": records}): each run is in a folder of its name there."""
    where = tmp_path_factory.mktemp(request.param)
    return where, {
        f"{config}-{world_size}": train(where / f"{config}-{world_size}", request.param, config, world_size, *SAVING)
        for config, world_size in RUNS
    }


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records]:
    """(folder, records) of causal_lm."""
    folder = tmp_path_factory.mktemp("one") / "device"
    return folder, train(folder, "causal_lm", "zero0", 1, "--num_layers", "4", "--samples", "0")


def scores_of(run: Path) -> dict[str, float]:
    """Of the model, not of a baseline."""
    return next(iter(json.loads((run / "result.json").read_text())["scores"].values()))


def exported_logits(run: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(run / "model")(input_ids=torch.arange(1, 40)[None]).logits


@pytest.mark.slow
def test_stages_and_ranks_change_nothing(pipelines: tuple[Path, dict[str, Records]]) -> None:
    folder, records = pipelines
    first, *others = records
    assert max(record["grad_norm"] for record in records[first]) > 0.4  # clipping is active
    for other in others:
        assert_alike(records[other], records[first])
        assert scores_of(folder / other) == pytest.approx(scores_of(folder / first), rel=1e-4)
        torch.testing.assert_close(
            exported_logits(folder / other), exported_logits(folder / first), rtol=1e-3, atol=1e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize(("source", "config", "world_size"), RESUMED)
def test_a_run_goes_on_with_any_stages_and_ranks(
    pipelines: tuple[Path, dict[str, Records]], tmp_path: Path, source: str, config: str, world_size: int
) -> None:
    folder, records = pipelines
    half = STEPS // 2
    recipe = json.loads((folder / source / "checkpoints" / folder_of(half) / "checkpoint.json").read_text())["recipe"]
    later = shutil.ignore_patterns(folder_of(STEPS), "result.json", "model")
    shutil.copytree(folder / source, tmp_path / "cut", ignore=later)
    resumed = train(tmp_path / "cut", recipe, config, world_size, "--resume")
    assert resumed[:half] == records[source][:half] and resumed[half:] != records[source][half:]  # their seconds differ
    if source == f"{config}-{world_size}":  # bit for bit
        assert [record["loss"] for record in resumed] == [record["loss"] for record in records[source]]
    assert_alike(resumed, records[source])


@pytest.mark.slow
def test_pipeline_lm_is_causal_lm(tmp_path_factory: pytest.TempPathFactory, one_device: tuple[Path, Records]) -> None:
    folder, expected = one_device
    run = tmp_path_factory.mktemp("pipeline") / "run"
    ds_config = json.loads((ROOT / "ds_configs" / "pipeline_lm" / "zero1.json").read_text())
    ds_config["zero_optimization"]["overlap_comm"] = True  # which DeepSpeed must turn off
    config = run.parent / "config.json"
    config.write_text(
        json.dumps(ds_config | {"activation_checkpointing": {}, "train_micro_batch_size_per_gpu": "auto"})
    )
    assert_alike(train(run, "pipeline_lm", config, 4, "--monitor", "tensorboard", "--eval_every", STEPS // 2), expected)
    assert scores_of(run) == pytest.approx(scores_of(folder), rel=1e-4)
    torch.testing.assert_close(exported_logits(run), exported_logits(folder), rtol=1e-3, atol=1e-3)
    # Each goes on with what the other has exported.
    then = ["--max_length", "64"]
    onward, expected_onward = (
        train(run.parent / f"{recipe}-on", recipe, "zero1", 2, "--model", str(path / "model"), *then, *more)
        for recipe, path, more in (("pipeline_lm", folder, ()), ("causal_lm", run, ("--samples", "0")))
    )
    assert_alike(onward, expected_onward, loss=1e-3, norm=1e-2)  # the exports themselves differ by rounding


@pytest.mark.slow
def test_in_bf16_it_trains_as_zero_does(tmp_path: Path) -> None:
    found, expected = (
        train(tmp_path / recipe, recipe, "zero1", 2, "--num_layers", "4", "--precision", "bf16", *more)
        for recipe, more in (("pipeline_lm", ()), ("causal_lm", ("--samples", "0")))
    )
    assert_alike(found, expected, loss=2e-3, norm=0.1)  # at single steps, gradients rounded to bf16 differ as much


def test_what_cannot_be_divided_is_refused() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=3))
    check_stages(llama, 3, Stage)
    with pytest.raises(UserError, match="the model has 3 layers"):
        check_stages(llama, 4, Stage)
    config = GraniteConfig(**sizes, num_key_value_heads=2, num_hidden_layers=2, embedding_multiplier=12.0)
    with pytest.raises(UserError, match="do not compute what the whole model does"):
        check_stages(GraniteForCausalLM(config), 2, Stage)
