"""Settings and DeepSpeed JSONs: what is accepted, what is filled in, and that every mistake is an error of one line."""

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RECIPES, ROOT

from lib.errors import UserError
from lib.settings import config
from lib.settings.ds_config import (
    expert_parallel_size,
    load_ds_config,
    pipeline_stages,
    sequence_parallel_size,
    tensor_parallel_size,
)

# The JSON for ZeRO-3 in the HF Trainer's documentation.
HF_TRAINER = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def settings(**given: str) -> Any:
    recipe = importlib.import_module("recipes.text_classification")
    return config.load(recipe.Config, ROOT / "recipes" / "text_classification.yaml", given)


def load(tmp_path: Path, ds_config: Any, world_size: int = 2, **given: str) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(ds_config if isinstance(ds_config, str) else json.dumps(ds_config))
    return load_ds_config(path, settings(**given), world_size)


def changed(**changes: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}} | changes


def sharing_experts(size: Any = 2, **more: Any) -> dict[str, Any]:
    return changed() | {"expert_parallel": {"enabled": True, "autoep_size": size, **more}}


def one_line(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_config_in_the_tree_is_accepted(recipe: str, world_size: int) -> None:
    cfg = config.load(importlib.import_module(f"recipes.{recipe}").Config, ROOT / "recipes" / f"{recipe}.yaml", {})
    for path in sorted((ROOT / "ds_configs" / recipe).glob("*.json")):
        ds_config = json.loads(path.read_text())
        size = tensor_parallel_size(ds_config) * sequence_parallel_size(ds_config) * pipeline_stages(ds_config)
        parts = size * expert_parallel_size(ds_config)
        if world_size % parts:
            with pytest.raises(UserError, match=f"does not divide {world_size} ranks?; nearest: --ranks {parts}"):
                load_ds_config(path, cfg, world_size)
            continue
        filled = load_ds_config(path, cfg, world_size)
        rows = filled["train_micro_batch_size_per_gpu"] * filled["gradient_accumulation_steps"]
        assert rows * world_size // size == cfg.batch_size


def test_how_long_to_train_is_said_in_one_way() -> None:
    steps_in_yaml, epochs_given, neither = settings(), settings(epochs="3"), settings(max_steps="null")
    assert steps_in_yaml.max_steps and steps_in_yaml.epochs is None
    assert (epochs_given.max_steps, epochs_given.epochs) == (None, 3.0)  # --epochs replaces the YAML's max_steps
    assert (neither.max_steps, neither.epochs) == (None, None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_is_explained(recipe: str) -> None:
    config_class = importlib.import_module(f"recipes.{recipe}").Config
    assert set(config.comments(config_class)) == set(config_class.__dataclass_fields__)


def test_every_key_of_the_configs_is_explained() -> None:
    explained = (ROOT / "ds_configs" / "README.md").read_text()

    def keys(value: Any) -> set[str]:
        return (
            set(value) | {key for inner in value.values() for key in keys(inner)} if isinstance(value, dict) else set()
        )

    for path in (ROOT / "ds_configs").glob("*/*.json"):
        for key in keys(json.loads(path.read_text())):
            assert f"`{key}`" in explained, f"{key} of {path}"


def test_an_hf_trainer_json_runs_unchanged_and_is_filled_in(tmp_path: Path) -> None:
    filled = load(tmp_path, HF_TRAINER, precision="bf16")
    assert '"auto"' not in json.dumps(filled)
    assert filled["bf16"] == {"enabled": True} and "fp16" not in filled
    assert (
        filled["train_batch_size"],
        filled["train_micro_batch_size_per_gpu"],
        filled["gradient_accumulation_steps"],
    ) == (64, 32, 1)
    assert filled["gradient_clipping"] == 1.0
    assert "optimizer" not in filled and "scheduler" not in filled  # the recipe makes them, as the settings say


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["optimizer", "params", "lr"], 1e-5, ["learning_rate"]),
        (["optimizer", "type"], "Lamb", ["AdamW"]),
        (["optimizer", "params", "learning_rate"], 1e-5, ["unknown key"]),
        (["scheduler", "type"], "WarmupLR", ["constant", "linear"]),
        (["scheduler", "params", "warmup_num_steps"], 7, ["warmup_steps", "7"]),
        (["bf16", "enabled"], True, ["bf16.enabled", "precision"]),
        (["fp16", "enabled"], True, ["fp16.enabled", "precision"]),
        (["gradient_clipping"], 5.5, ["gradient_clipping", "5.5", "1.0"]),
        (["train_batch_size"], 32, ["train_batch_size", "32", "64"]),
        (["gradient_accumulation_steps"], 3, ["64", "3"]),
        (["zero_optimization", "stage"], "auto", ["stage"]),
        (["optimizer", "params"], "auto", ["optimizer"]),
        (["scheduler", "type"], ["WarmupLR"], ["scheduler"]),
        (["zero_optimization", "offload_optimizer"], {"device": "auto"}, ["offload_optimizer.device", "auto"]),
    ],
)
def test_an_hf_trainer_json_that_contradicts_the_settings_is_refused(
    tmp_path: Path, place: list[str], value: Any, words: list[str]
) -> None:
    ds_config = copy.deepcopy(HF_TRAINER)
    inner: Any = ds_config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(UserError) as error:
        load(tmp_path, ds_config)
    one_line(error, "ds.json", *words)


@pytest.mark.parametrize(
    ("ds_config", "words"),
    [
        (changed(zero_optimisation={"stage": 3}), ["zero_optimisation", "did you mean 'zero_optimization'"]),
        (changed(gradient_clippping=5.0), ["gradient_clippping", "did you mean 'gradient_clipping'"]),
        (
            changed(zero_optimization={"stage": 2, "overlap_com": True}),
            ["zero_optimization.overlap_com", "did you mean 'overlap_comm'"],
        ),
        (
            changed(zero_optimization={"stage": 2, "offload_optimizer": {"devise": "cpu"}}),
            ["offload_optimizer.devise", "did you mean 'device'"],
        ),
        (changed(zero_optimization={"stage": 4}), ["zero_optimization.stage"]),
        (changed(zero_optimization={"stage": True}), ["zero_optimization.stage"]),
        (changed(zero_optimization={"stage": 2, "reduce_bucket_size": "large"}), ["reduce_bucket_size"]),
        (changed(zero_optimization={}), ["stage is missing"]),
        (changed(zero_optimization=3), ["zero_optimization"]),
        (changed(zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}), ["offload_param", "stage 2"]),
        (
            changed(zero_optimization={"stage": 0, "offload_optimizer": {"device": "cpu"}}),
            ["offload_optimizer", "stage 0"],
        ),
        (changed(zero_optimization={"stage": 3, "mics_shard_size": 2}), ["mics_shard_size", "removed"]),
        (changed(nebula={"enabled": False}), ["nebula"]),
        (changed(curriculum_learning={"enabled": False}), ["curriculum_learning"]),
        (changed(elasticity={"enabled": False}), ["lasticity"]),
        (changed(amp={"enabled": False}), ["amp"]),
        (changed(torch_autocast={"enabled": True, "dtype": "bfloat16"}), ["torch_autocast", "precision"]),
        (changed(data_types={"grad_acum_dtype": "fp32"}), ["grad_acum_dtype", "did you mean"]),
        (changed(activation_checkpointing={"partition_activations": True}), ["partition_activations"]),
        (changed(tensorboard={"enabled": True, "outputpath": "x"}), ["tensorboard"]),
        (changed(tensorboard=True), ["tensorboard", "object"]),
        (changed(communication_data_type="fp16"), ["communication_data_type", "gradients"]),
        (changed(train_micro_batch_size_per_gpu=0), ["train_micro_batch_size_per_gpu"]),
        (changed(train_micro_batch_size_per_gpu=2.5), ["train_micro_batch_size_per_gpu"]),
        (sharing_experts(size=3), ["autoep_size is 3", "does not divide 2 ranks", "nearest: --ranks 3"]),
        (sharing_experts(size="2"), ["autoep_size is '2'; write how many ranks"]),
        (sharing_experts(size=None), ["autoep_size is None; write how many ranks"]),
        (sharing_experts(top_k=2), ["expert_parallel.top_k is not used here"]),
        (sharing_experts(enabled="yes"), ["expert_parallel.enabled is 'yes'; write true or false"]),
        (
            changed(**sharing_experts(), tensor_parallel={"autotp_size": 2}),
            ["expert_parallel and tensor_parallel are not tested together"],
        ),
        (
            changed(**sharing_experts(), sequence_parallel_size=2),
            ["expert_parallel and sequence_parallel_size are not tested together"],
        ),
        (changed(**sharing_experts() | {"zero_optimization": {"stage": 0}}), ["take stage 1, 2 or 3"]),
        (
            sharing_experts() | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            ["expert_parallel and offload_optimizer are not tested together"],
        ),
        (
            sharing_experts() | {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            ["zero_hpz_partition_size with expert_parallel"],
        ),
        ({"zero_optimization": {"stage": 2}}, ["train_micro_batch_size_per_gpu is missing"]),
        (changed(train_micro_batch_size_per_gpu=24), ["64", "24 rows a micro-batch x 2 ranks", "48 and 96"]),
        ('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}', ["zero_optimization", "twice"]),
        ("{", ["not valid JSON"]),
        ("[]", ["expected a JSON object"]),
    ],
)
def test_a_mistake_in_the_json_is_refused(tmp_path: Path, ds_config: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, ds_config)
    one_line(error, *words)


def test_a_json_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError) as error:
        load_ds_config(ROOT / "ds_configs" / "text_classification" / "zero4.json", settings(), 2)
    one_line(error, "zero4.json", "zero3.json")


def test_a_precision_that_the_device_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, changed(), precision="fp16")
    one_line(error, "fp16", "cpu", "fp32")


def test_a_batch_that_the_ranks_do_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, changed(train_micro_batch_size_per_gpu="auto"), world_size=3)
    one_line(error, "64", "3 ranks", "63 and 66")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rat: 1.0", ["learning_rat", "did you mean 'learning_rate'"]),
        ("batch_size: 0", ["batch_size", "greater than 0"]),
        ("batch_size: many", ["batch_size", "integer"]),
        ("batch_size: true", ["batch_size"]),
        ("batch_size: 2.5", ["batch_size"]),
        ("learning_rate: fast", ["learning_rate", "number"]),
        ("dropout: .nan", ["dropout"]),
        ("dropout: 1.5", ["dropout", "less than 1"]),
        ("seed: -1", ["seed"]),
        ("quick: 5", ["quick"]),
        ("precision: fp64", ["precision", "'fp32'"]),
        ("model: on", ["model", "quotes"]),
        ("model: 7", ["model", "quotes"]),
        ("seed: 1\nseed: 2", ["seed", "twice"]),
        ("seed: [1", ["not valid YAML"]),
        ("quick:\n  sed: 1", ["sed", "did you mean 'seed'"]),
    ],
)
def test_a_mistake_in_the_yaml_is_refused(tmp_path: Path, line: str, words: list[str]) -> None:
    recipe = importlib.import_module("recipes.text_classification")
    lines = (ROOT / "recipes" / "text_classification.yaml").read_text().split("quick:")[0].splitlines()
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*(kept for kept in lines if kept.split(":")[0] != line.split(":")[0]), line]) + "\n")
    with pytest.raises(UserError) as error:
        config.load(recipe.Config, path, {})
    one_line(error, "mine.yaml", *words)


def test_a_missing_setting_is_refused(tmp_path: Path) -> None:
    recipe = importlib.import_module("recipes.text_classification")
    lines = (ROOT / "recipes" / "text_classification.yaml").read_text().splitlines()
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(line for line in lines if not line.startswith("weight_decay")))
    with pytest.raises(UserError) as error:
        config.load(recipe.Config, path, {})
    one_line(error, "mine.yaml", "'weight_decay' is missing")
    assert config.load(recipe.Config, path, {"weight_decay": "0.5"}).weight_decay == 0.5  # the command line may give it


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    assert settings(learning_rate="3e-4").learning_rate == 3e-4
    assert config.check_value("3e-4", float, "learning_rate", text=False) == 3e-4
    assert settings(num_layers="null").num_layers is None
    assert settings(overwrite="true").overwrite is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "did you mean '--learning_rate'"]),
        (["--learning_rate"], ["learning_rate", "expected"]),
        (["--deepspeed_confg", "x.json"], ["did you mean '--deepspeed_config'"]),
        (["--max_steps", "0"], ["--max_steps", "greater than 0"]),
        ([], ["--deepspeed_config is missing"]),
    ],
)
def test_a_mistake_on_the_command_line_is_refused(arguments: list[str], words: list[str]) -> None:
    recipe: Any = importlib.import_module("recipes.text_classification")
    with pytest.raises(UserError) as error:
        config.parse(recipe.Config, recipe.__file__, arguments)
    one_line(error, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_optimization": {"stage": 2}}, ["stage is 2", "a pipeline works with stages 0 and 1"]),
        ({"pipeline": {"stages": 1}}, ["this recipe trains a pipeline of 2 stages or more"]),
        ({"pipeline": {"stages": "auto"}}, ["a pipeline of 2 stages or more"]),
        ({"pipeline": {"stages": 2, "partition": "best"}}, ["pipeline.partition is not used here"]),
        (
            {"pipeline": {"stages": 3}},
            ["pipeline.stages is 3, which does not divide 4 ranks; nearest: --ranks 3 and 6"],
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, ["not tested with another form of parallelism"]),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer"]),
    ],
)
def test_what_a_pipeline_cannot_have_is_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    recipe = importlib.import_module("recipes.pipeline_lm")
    cfg = config.load(recipe.Config, ROOT / "recipes" / "pipeline_lm.yaml", {})
    ds_config = json.loads((ROOT / "ds_configs" / "pipeline_lm" / "zero1.json").read_text()) | changes
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ds_config))
    with pytest.raises(UserError) as error:
        load_ds_config(path, cfg, 4)
    one_line(error, *words)


def test_auto_fills_a_pipeline_with_micro_batches(tmp_path: Path) -> None:
    recipe = importlib.import_module("recipes.pipeline_lm")
    cfg = config.load(recipe.Config, ROOT / "recipes" / "pipeline_lm.yaml", {"batch_size": "32"})
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "pipeline": {"stages": 2}}))
    filled = load_ds_config(path, cfg, 4)  # 16 rows for each of 2 pipelines
    assert (filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]) == (2, 8)
