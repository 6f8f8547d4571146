"""DeepSpeed JSONs as people bring them: which are accepted, which get a note, and which are refused.

A refusal names all problems at once, and the flags to paste.
"""

import importlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from deepspeed.accelerator import get_accelerator

from lib.distributed.loading import load_model
from lib.distributed.repairs import repair_stage0
from lib.errors import UserError
from lib.run.run import Run
from lib.settings import config
from lib.settings.ds_config import NOTES, load_ds_config, offload_device, stage_of

# Its settings have batch_size 64, lr_schedule linear, warmup_steps 20 and max_steps 180.
recipe: Any = importlib.import_module("recipes.text_classification")

ADAMW = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
LOSS_SCALE = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}


def settings(**given: str) -> Any:
    return config.load(recipe.Config, ROOT / "recipes" / "text_classification.yaml", given)


def load(tmp_path: Path, ds_config: Any, world_size: int = 2, **given: str) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(ds_config if isinstance(ds_config, str) else json.dumps(ds_config), encoding="utf-8")
    return load_ds_config(path, settings(**given), world_size)


def refusal(tmp_path: Path, ds_config: Any, world_size: int = 2, **given: str) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, ds_config, world_size, **given)
    assert "\n" not in str(error.value) and "ds.json" in str(error.value)
    return str(error.value)


def auto(stage: Any = 2, zero: Any = None, **changes: Any) -> dict[str, Any]:
    """A JSON as users of the HF Trainer have it. changes: keys to set; None leaves a key out."""
    batch = dict.fromkeys(
        ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping"],
        "auto",
    )
    whole = {**batch, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage, **(zero or {})}, **changes}
    return {key: value for key, value in whole.items() if value is not None}


def optimizer(kind: str = "AdamW", **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": {**ADAMW, **params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": params}


# --- accepted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "ds_config",
    [
        auto(optimizer=optimizer("Adam")),
        auto(optimizer=optimizer("adam", adam_w_mode=True, torch_adam=True, bias_correction=True)),
        auto(optimizer=optimizer("auto", amsgrad=False, bias_correction="auto")),
        auto(fp16={"enabled": "auto", "auto_cast": True, **LOSS_SCALE}),
        auto(
            fp16={"enabled": False, "fp16_master_weights_and_grads": True},
            bf16={"enabled": "auto", "check_grad_overflow": True},
        ),
        {"train_batch_size": 64, "zero_optimization": {"stage": 2}},
        auto(3, {"stage3_gather_16bit_weights_on_model_save": "auto", "stage3_prefetch_bucket_size": "auto"}),
        auto(3, {"gather_16bit_weights_on_model_save": "auto", "zero_hpz_partition_size": "auto"}),
        auto(
            3, {"offload_param": {"device": "cpu", "buffer_size": "auto", "buffer_count": "auto", "pin_memory": "auto"}}
        ),
        auto(
            wall_clock_breakdown="auto",
            steps_per_print="auto",
            aio={"block_size": "auto"},
            comms_logger={"enabled": "auto"},
            data_types="auto",
        ),
        auto(_comment="for eight devices", **{"//": ["a list"], "$schema": "https://"}),
        auto(bf16=None, bfloat16={"enabled": "auto"}),
        auto(
            torch_autocast={"enabled": False, "dtype": "bfloat16"},
            data_efficiency={"enabled": False},
            hybrid_engine={"max_out_tokens": 512},
        ),
        auto(
            autotuning={"enabled": False},
            tensor_parallel={"autotp_size": 1},
            sequence_parallel_size=1,
            expert_parallel={"enabled": "auto"},
        ),
        auto(
            prescale_gradients=False,
            gradient_predivide_factor=1.0,
            gradient_allreduce_op="MEAN",
            managed_gradient_accumulation=True,
        ),
        auto(
            scheduler=scheduler(
                "WarmupDecayLR", warmup_type="linear", warmup_min_lr=0, total_num_steps=180, warmup_num_steps=20
            )
        ),
        auto(scheduler=scheduler("auto", warmup_type="linear", warmup_max_lr="auto", warmup_min_ratio=0)),
        auto(data_types={"grad_accum_dtype": "fp32", "buffer_dtype": "float32"}, communication_data_type="FP32"),
        auto(compile={"deepcompile": "auto"}),
        '\ufeff{"steps_per_print": Infinity, "train_micro_batch_size_per_gpu": "auto",'
        ' "zero_optimization": {"stage": 1}}',
        '{ // a comment\n "steps_per_print": 10, "train_micro_batch_size_per_gpu": "auto",}',
    ],
)
def test_what_changes_only_memory_and_speed_is_accepted_without_a_word(
    tmp_path: Path, ds_config: Any, precision: str
) -> None:
    filled = load(tmp_path, ds_config, precision=precision)
    assert '"auto"' not in json.dumps(filled) and NOTES not in filled and '"_' not in json.dumps(filled)
    assert filled["train_micro_batch_size_per_gpu"] * filled["gradient_accumulation_steps"] * 2 == 64
    assert filled.get("bf16", {}).get("enabled", False) == (precision == "bf16") and "fp16" not in filled
    assert isinstance(filled["steps_per_print"], int)


def test_a_share_of_the_total_batch_is_the_micro_batch(tmp_path: Path) -> None:
    filled = load(tmp_path, {"train_batch_size": 16}, batch_size="16")
    assert (filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]) == (8, 1)


@pytest.mark.parametrize(
    ("ds_config", "given", "words"),
    [
        (
            auto(scheduler=scheduler("WarmupLR", warmup_num_steps="auto")),
            {"lr_schedule": "constant"},
            "logarithmically",
        ),
        (
            auto(
                scheduler=scheduler("WarmupCosineLR", warmup_min_ratio=0.0, cos_min_ratio=0.0, total_num_steps="auto")
            ),
            {"lr_schedule": "cosine"},
            "linearly",
        ),
        (auto(checkpoint={"use_node_local_storage": True}), {}, "'checkpoint' is without effect"),
        (auto(dataloader_drop_last=True), {}, "'dataloader_drop_last' is without effect"),
        (auto(compile={"deepcompile": False, "debug_log": True}), {}, "'compile' is without effect"),
        (
            auto(activation_checkpointing={"partition_activations": False, "number_checkpoints": None}),
            {},
            "activation checkpointing is off",
        ),
    ],
)
def test_what_a_user_may_not_expect_is_a_note(
    tmp_path: Path, ds_config: Any, given: dict[str, Any], words: str
) -> None:
    filled = load(tmp_path, ds_config, **given)
    assert len(filled[NOTES]) == 1 and words in filled[NOTES][0] and "ds.json" in filled[NOTES][0]
    assert not {"scheduler", "checkpoint", "dataloader_drop_last", "compile", "activation_checkpointing"} & set(filled)


def test_activation_checkpointing_is_on_by_the_empty_section(tmp_path: Path) -> None:
    assert "activation_checkpointing" in load(tmp_path, auto(activation_checkpointing={}))


def test_notes_are_in_the_header_of_the_run(tmp_path: Path, one_rank: None, capfd: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"run_dir": str(tmp_path / "run"), "max_steps": "1"}
    filled = load(tmp_path, auto(checkpoint={"load_universal": True}), world_size=1, **given)
    run = Run(settings(**given), filled, recipe.__file__)
    run.plan(Dataset.from_dict({"number": [1, 2, 3]}))
    module: Any = torch.nn.Linear(2, 2)
    module.config = {}
    parts: dict[str, Any] = {"module": module, "monitor": SimpleNamespace(enabled=False), "config": filled}
    run.attach(SimpleNamespace(**parts, zero_optimization=lambda: True, lr_scheduler=None), {})
    run._begin()
    run.close()
    assert "note     " in capfd.readouterr().out.split("'checkpoint' is without effect")[0]
    assert NOTES not in filled and NOTES not in json.loads((tmp_path / "run" / "ds_config.json").read_text())


@pytest.mark.parametrize(
    ("old", "new", "stage"),
    [("cpu_offload", "optimizer", 2), ("cpu_offload", "optimizer", 3), ("cpu_offload_param", "param", 3)],
)
def test_an_old_name_of_offloading_is_read_as_the_new_one(tmp_path: Path, old: str, new: str, stage: int) -> None:
    filled = load(tmp_path, auto(stage, {old: True}))
    assert offload_device(filled, new) == "cpu" and old not in filled["zero_optimization"]
    assert offload_device(load(tmp_path, auto(stage, {old: False})), new) == "none"
    assert f"offload_{new}" in refusal(tmp_path, auto(stage, {old: True, f"offload_{new}": {"device": "none"}}))


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ds_config", "words"),
    [
        (auto(optimizer=optimizer(bias_correction=False)), ["optimizer.params.bias_correction"]),
        (auto(optimizer=optimizer(fp32_optimizer_states=False)), ["fp32_optimizer_states"]),
        (auto(optimizer=optimizer("Adam", adam_w_mode=False)), ["adam_w_mode"]),
        (auto(optimizer=optimizer(max_grad_norm=1.0)), ["max_grad_norm", "gradient_clipping"]),
        (auto(bf16={"enabled": "auto", **LOSS_SCALE}), [f"bf16.{key}" for key in LOSS_SCALE]),
        (auto(fp16={"enabled": "auto", "loss_scal": 0}), ["fp16.loss_scal'", "did you mean 'loss_scale'"]),
        (auto(fp16={"enabled": "yes"}), ["fp16.enabled"]),
        (auto(bfloat16={"enabled": "auto"}), ["bf16", "bfloat16"]),
        (auto(compile={"deepcompile": True}), ["compile.deepcompile", "engine.compile()"]),
        (auto(compile={"disable": False}), ["compile.disable"]),
        (auto(prescale_gradients=True), ["prescale_gradients"]),
        (auto(gradient_predivide_factor=2.0), ["gradient_predivide_factor"]),
        (auto(gradient_allreduce_op="sum"), ["gradient_allreduce_op"]),
        (auto(torch_autocast={"enabled": True}), ["torch_autocast", "precision"]),
        (auto(3, {"zero_quantized_weights": True, "zero_hpz_partition_size": 2}), ["zero_quantized_weights", "GPU"]),
        (auto(3, {"zero_quantized_nontrainable_weights": True}), ["zero_quantized_nontrainable_weights", "GPU"]),
        (auto(3, {"zero_quantized_gradients": True}), ["zero_quantized_gradients", "GPU"]),
        (auto(2, {"zero_quantized_weights": True}), ["zero_quantized_weights", "stage 2"]),
        (auto(2, {"zero_hpz_partition_size": 2}), ["zero_hpz_partition_size", "stage 2"]),
        (auto(2, {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}), ["NVMe", '"cpu"']),
        (auto(3, {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}), ["NVMe", '"cpu"']),
        (auto("auto"), ["zero_optimization.stage", "auto"]),
        (auto(2, {"stage3_max_live_parameters": "many"}), ["zero_optimization", "many"]),
        (
            auto(activation_checkpointing={"partition_activations": False, "cpu_checkpointing": True}),
            ["activation_checkpointing.cpu_checkpointing", ": {}"],
        ),
        (auto(data_types={"grad_accum_dtype": "fp16"}), ["data_types.grad_accum_dtype", "fp16"]),
        (auto(data_types={"grad_accum_dtype": "half_a_float"}), ["data_types.grad_accum_dtype", "half_a_float"]),
        (auto(data_types={"buffer_dtype": "bf16"}), ["data_types.buffer_dtype", "bf16"]),
        (auto(data_types={"param_dtype": 16}), ["data_types.param_dtype", "16"]),
        (auto(communication_data_type="fp16"), ["communication_data_type", "fp16"]),
        (auto(scheduler=scheduler("WarmupDecayLR", warmup_type="log")), ["warmup_type", "log", "linear"]),
        (auto(scheduler=scheduler("WarmupDecayLR", warmup_min_lr=1e-6)), ["warmup_min_lr", "1e-06"]),
        (auto(scheduler=scheduler("OneCycle", cycle_min_lr=0)), ["OneCycle", "WarmupDecayLR"]),
        (auto(gradient_clipping="high"), ["gradient_clipping", "high"]),
        (auto(gradient_clipping=True), ["gradient_clipping"]),
        (auto(comms_logger={"enabled": True, "verbos": True}), ["comms_logger.verbos", "did you mean 'verbose'"]),
    ],
)
def test_what_would_fail_later_or_change_the_losses_is_refused_by_name(
    tmp_path: Path, ds_config: Any, words: list[str], precision: str
) -> None:
    text = refusal(tmp_path, ds_config, precision=precision)
    for word in words:
        assert word in text
    assert "--" not in text  # no flag would help


@pytest.mark.parametrize(("key", "kind"), [("warmup_min_ratio", 0.1), ("cos_min_ratio", 0.1), ("warmup_max_lr", 1e-3)])
def test_a_cosine_that_the_recipe_does_not_have_is_refused_by_its_own_keys(
    tmp_path: Path, key: str, kind: float
) -> None:
    assert f"scheduler.params.{key}" in refusal(
        tmp_path, auto(scheduler=scheduler("WarmupCosineLR", **{key: kind})), lr_schedule="cosine"
    )


@pytest.mark.parametrize(
    ("stage", "value", "precision"), [(2, "bf16", "fp32"), (0, "fp32", "bf16"), (0, "bf16", "fp32")]
)
@pytest.mark.parametrize("key", ["grad_accum_dtype", "communication_data_type"])
def test_gradients_are_not_rounded_below_the_precision(
    tmp_path: Path, key: str, stage: int, value: str, precision: str
) -> None:
    ds_config = (
        auto(stage, communication_data_type=value)
        if key == "communication_data_type"
        else auto(stage, data_types={key: value})
    )
    if key == "communication_data_type" and value == "fp32":  # stage 0 may send gradients in more digits
        assert load(tmp_path, ds_config, precision=precision)[key] == "fp32"
    else:
        assert key in refusal(tmp_path, ds_config, precision=precision)


def test_ranks_must_be_a_multiple_of_hpz(tmp_path: Path) -> None:
    ds_config = auto(3, {"zero_hpz_partition_size": 2})
    assert load(tmp_path, ds_config, world_size=1) and load(tmp_path, ds_config, world_size=4)
    assert "does not divide 3 ranks" in refusal(tmp_path, ds_config, world_size=3, batch_size="63")


def test_quantized_weights_on_a_gpu_have_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_accelerator()), "device_name", lambda self, index=None: "cuda")
    (note,) = load(tmp_path, auto(3, {"zero_quantized_weights": True}))[NOTES]
    assert "zero_quantized_weights" in note and "losses" in note


@pytest.mark.parametrize("is_new", [True, False])
def test_precisions_that_a_gpu_only_emulates_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    """To DeepSpeed, tf32 is fp32."""
    monkeypatch.setattr(type(get_accelerator()), "device_name", lambda self, index=None: "cuda")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: is_new or including_emulation)
    for precision in ("bf16", "tf32"):
        if not is_new:
            assert f"precision is {precision}, which this device (cuda) cannot train in" in refusal(
                tmp_path, auto(2), precision=precision
            )
            continue
        config = load(tmp_path, auto(2), precision=precision)
        assert config.get("bf16", {}).get("enabled", False) == (precision == "bf16") and "fp16" not in config
    if is_new:
        types = {"param_dtype": "fp32", "grad_accum_dtype": "fp32"}
        assert load(tmp_path, auto(2, data_types=types), precision="tf32")["data_types"] == types


def test_tf32_needs_a_gpu(tmp_path: Path) -> None:
    assert "precision is tf32, which this device (cpu) cannot train in" in refusal(tmp_path, auto(2), precision="tf32")


# --- contradictions -----------------------------------------------------------


@pytest.mark.parametrize(
    ("ds_config", "flags"),
    [
        (
            {"train_batch_size": 32, "gradient_clipping": 0.5, "bf16": {"enabled": True}},
            "--batch_size 32 --gradient_clipping 0.5 --precision bf16",
        ),
        (auto(optimizer=optimizer(betas=[0.9, 0.95], eps=1e-6)), "--adam_betas 0.9,0.95 --adam_eps 1e-06"),
        (auto(optimizer=optimizer(lr=1e-5, weight_decay=0)), "--learning_rate 1e-05 --weight_decay 0.0"),
        (
            auto(scheduler=scheduler("WarmupLR", warmup_max_lr=1e-3, warmup_num_steps=7)),
            "--lr_schedule constant --learning_rate 0.001 --warmup_steps 7",
        ),
        (auto(scheduler=scheduler("WarmupCosineLR", total_num_steps=99)), "--lr_schedule cosine --max_steps 99"),
        (
            auto(optimizer=optimizer("Adam", lr=1e-5), scheduler=scheduler("WarmupDecayLR", warmup_max_lr=1e-5)),
            "--learning_rate 1e-05",
        ),
        (auto(train_micro_batch_size_per_gpu=3, gradient_accumulation_steps=5), "--batch_size 30"),
        (auto(train_micro_batch_size_per_gpu=3, train_batch_size=18), "--batch_size 18"),
        (auto(data_types={"param_dtype": "bfloat16"}, gradient_clipping=0), "--gradient_clipping 0.0 --precision bf16"),
    ],
)
def test_contradictions_are_said_at_once_and_the_flags_to_paste_resolve_them(
    tmp_path: Path, ds_config: Any, flags: str
) -> None:
    text = refusal(tmp_path, ds_config)
    assert text.endswith(f"or add {flags}")
    words = shlex.split(flags)
    pasted: dict[str, Any] = {
        flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)
    }
    assert text.count("but the settings have") == len(pasted)
    filled = load(tmp_path, ds_config, **pasted)
    assert "optimizer" not in filled and filled["gradient_clipping"] == float(pasted.get("gradient_clipping", 1.0))
    for setting in pasted:  # each flag is needed
        assert f"--{setting} {pasted[setting]}" in refusal(
            tmp_path, ds_config, **{name: value for name, value in pasted.items() if name != setting}
        )


def test_precision_that_the_json_turns_off(tmp_path: Path) -> None:
    assert refusal(tmp_path, auto(bf16={"enabled": False}), precision="bf16").endswith("or add --precision fp32")
    assert "both true" in refusal(tmp_path, auto(bf16={"enabled": True}, fp16={"enabled": True}), precision="bf16")


def test_no_flag_is_named_that_would_be_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, auto(fp16={"enabled": True}, optimizer=optimizer(lr=-1, betas=[0.9, 1.0])))
    for words in (
        "fp16.enabled is true",
        "cpu",
        "optimizer.params.lr",
        "greater than 0",
        "optimizer.params.betas",
        "less than 1",
    ):
        assert words in text
    assert "--" not in text


def test_what_contradicts_within_the_json_is_no_flag(tmp_path: Path) -> None:
    contradiction = auto(optimizer=optimizer(lr=4e-4), scheduler=scheduler("WarmupDecayLR", warmup_max_lr=1e-5))
    text = refusal(tmp_path, contradiction)
    assert "scheduler.params.warmup_max_lr is 1e-05, but optimizer.params.lr is 0.0004" in text and "--" not in text
    # This JSON was written for eight ranks, and there are two.
    text = refusal(tmp_path, auto(train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=1, train_batch_size=64))
    assert "gradient_accumulation_steps is 1, but batch_size 64 / (micro-batch 8 x 2 ranks) is 4" in text


def test_mistakes_and_contradictions_are_in_one_message(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        auto(5, zero_optimisation={"stage": 3}, nebula={"enabled": False}, gradient_clipping=0.5, wandb={"tem": "x"}),
    )
    for words in (
        "zero_optimization.stage is 5",
        "did you mean 'zero_optimization'",
        "'nebula' has been removed",
        "wandb.tem",
        "add --gradient_clipping 0.5",
    ):
        assert words in text


# --- what DeepSpeed makes of it -----------------------------------------------


class Small(torch.nn.Module):
    def __init__(self, config: dict[str, int]):
        super().__init__()
        self.config = config
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.second(torch.tanh(self.first(rows)))
        return output


def steps(ds_config: dict[str, Any], scales: list[float]) -> list[tuple[float, float, float, bool]]:
    """(loss, norm of its gradient, loss scale after the step, whether the step was taken) of each step.

    scales: the factor by which each step's loss is multiplied.
    """
    model = load_model(lambda: Small({}), ds_config, seed=0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=ds_config
    )
    repair_stage0(engine)
    generator, dtype = torch.Generator().manual_seed(0), next(model.parameters()).dtype
    found = []
    for scale in scales:
        loss = (engine(torch.randn(4, 8, generator=generator).to(dtype)).float() ** 2).mean() * scale
        engine.backward(loss)
        engine.step()
        found.append(
            (loss.item(), float(engine.get_global_grad_norm()), engine.optimizer.loss_scale, engine.was_step_applied())
        )
    engine.destroy()
    return found


@pytest.mark.parametrize(
    "fp16", [{}, {"hysteresis": 1}, {"hysteresis": 3, "consecutive_hysteresis": True}, {"loss_scale": 128}]
)
def test_fp16_is_the_same_at_every_stage_when_gradients_overflow(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, fp16: dict[str, Any]
) -> None:
    # On a CPU torch can train in fp16, but DeepSpeed refuses.
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    scales = [1e3, 1e3, 1e3, 1e-1, 1e-3, 1e-3, 1e3, 1e-3]
    found = {}
    for stage in range(4):
        section = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.01,
            "steps_per_print": 10**9,
        }
        found[stage] = steps(
            section | {"zero_optimization": {"stage": stage}, "fp16": {"enabled": True, **fp16}}, scales
        )
    assert {step[-1] for step in found[1]} == {True, False}
    for stage in (0, 2, 3):
        for step, step_at_1 in zip(found[stage], found[1], strict=True):
            assert step == pytest.approx(step_at_1, rel=2e-3), stage


@pytest.mark.parametrize("stage", range(4))
def test_gradients_may_be_sent_in_more_digits(one_rank: None, tmp_path: Path, stage: int) -> None:
    sections = [
        load(tmp_path, auto(stage, communication_data_type=kind), 1, precision="bf16", batch_size="4")
        for kind in (None, "fp32")
    ]
    assert "communication_data_type" not in sections[0] and stage_of(sections[1]) == stage
    first, second = (steps(section, [1.0] * 4) for section in sections)
    assert first == second and all(step[-1] for step in first)
