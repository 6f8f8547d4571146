"""Tensor, sequence and expert parallelism, and pipelines: the losses, norms and exports of one device, at any stage,
of any architecture.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ALL, read_losses, run_ranks
from parallel_worker import ARCHITECTURES, CLIPPING, ROWS
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lib.distributed import expert_parallel, loading
from lib.errors import UserError
from lib.run.checkpoint_files import folder_of

MIXTURES = ("mixtral", "qwen3_moe")
# What each form refuses, and why.
REFUSED = {
    "tensor": dict.fromkeys(("gpt2", "mamba", "modernbert", *MIXTURES), "has no plan by which to share"),
    "sequence": dict.fromkeys(("bert", "electra", "modernbert", "roberta"), "is no decoder")
    | {"mamba": "computes attention by eager"},
    "expert": dict.fromkeys(set(ARCHITECTURES) - set(MIXTURES), "has no experts that ranks could share"),
    "vocabulary": dict.fromkeys(("gpt2", "mamba", "modernbert", *MIXTURES), "has no plan by which to share")
    | dict.fromkeys(("bert", "electra", "roberta"), "is none that DeepSpeed can share over the vocabulary"),
    "pipeline": dict.fromkeys(
        ("bert", "electra", "gpt2", "mamba", "modernbert", "roberta"), "has no plan by which to divide"
    ),
}
# (form, ranks, stages): one pair of ranks, and two side by side
LAUNCHES = [("tensor", 2, (0, 1, 3)), ("vocabulary", 4, (0, 2, 3)), ("sequence", 2, (0, 1, 3)), ("sequence", 4, (2,))]
LAUNCHES += [("pipeline", 2, (0, 1)), ("pipeline", 4, (0, 1))]
LAUNCHES += [("expert", 2, (1, 3)), ("expert", 4, (2, 3))]
if not ALL:
    LAUNCHES = [("tensor", 2, (0, 3)), ("vocabulary", 4, (2,)), ("sequence", 2, (1,)), ("sequence", 4, (3,))]
    LAUNCHES += [("pipeline", 4, (0, 1)), ("expert", 2, (1,)), ("expert", 4, (3,))]


def config(form: str, world_size: int, stage: int) -> str:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # so that small parameters are partitioned too
        zero["stage3_param_persistence_threshold"] = 0
    forms: dict[str, dict[str, Any]] = {
        "tensor": {"tensor_parallel": {"autotp_size": 2, "vocab_parallel_lm_head": False}},
        "vocabulary": {"tensor_parallel": {"autotp_size": 2, "vocab_parallel_lm_head": True}},
        "sequence": {"sequence_parallel_size": 2},
        "expert": {"expert_parallel": {"enabled": True, "autoep_size": 2}},
        "pipeline": {"pipeline": {"stages": 2}},
    }
    rows, accumulation_steps = ROWS // (world_size if form == "expert" else world_size // 2), 1
    if form == "pipeline":
        rows, accumulation_steps = rows // 2, 2
    sizes = {"train_micro_batch_size_per_gpu": rows, "gradient_accumulation_steps": accumulation_steps}
    return json.dumps({**sizes, "gradient_clipping": CLIPPING, **forms[form], "zero_optimization": zero})


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda launch: f"{launch[0]}, {launch[1]} ranks")
def launch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, Any]]:
    """(the form, {stage: {architecture: what parallel_worker.compare found}})"""
    form, world_size, stages = request.param
    file = tmp_path_factory.mktemp("parallel") / "found.json"
    run_ranks(world_size, "parallel_worker", file, *(config(form, world_size, stage) for stage in stages))
    return form, dict(zip(stages, json.loads(file.read_text()).values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_trains_and_exports_what_one_device_does_or_is_refused(launch: tuple[str, Any], architecture: str) -> None:
    form, found = launch
    for stage, by_architecture in found.items():
        differences = by_architecture[architecture]
        if architecture in REFUSED[form]:
            assert REFUSED[form][architecture] in differences["refused"]
        else:
            assert differences["loss"] < 1e-5 and differences["norm"] < 1e-4, stage
            assert differences["export"] < 1e-4, stage  # after training; the contract has the export itself


def test_heads_that_do_not_divide_are_refused() -> None:
    sizes = {"vocab_size": 9, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=3))
    loading._check_forms(model, tensor_size=3, sequence_size=3)
    with pytest.raises(UserError, match=r"num_key_value_heads 3 of Llama\w+; sizes that do: 1, 3"):
        loading._check_forms(model, tensor_size=2, sequence_size=1)
    with pytest.raises(UserError, match=r"6 attention heads and 3 key-value heads, which 2 .*; sizes that can: 3, 6;"):
        loading._check_forms(model, tensor_size=1, sequence_size=2)


def test_experts_that_do_not_divide_and_another_preset_are_refused() -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=6)
    )
    expert_parallel.check_model(model, 3, None)
    with pytest.raises(UserError, match=r"divide 6 experts; nearest: num_experts 4 and 8, or autoep_size 1, 2, 3, 6$"):
        expert_parallel.check_model(model, 4, None)
    with pytest.raises(
        UserError, match="preset_model is qwen3_moe, but the model is a mixtral; leave preset_model out"
    ):
        expert_parallel.check_model(model, 2, "qwen3_moe")


STEPS = 6
QUICK: list[Any] = ["--quick", "--max_steps", STEPS, "--max_rows", "1", "--log_every", "1", "--samples", "0"]
QUICK += ["--save_every", STEPS // 2, "--keep_checkpoints", "9"]


MIXTURE = ["--architecture", "mixtral", "--num_experts", "4"]


def train(folder: Path, config: str, world_size: int, *more: str) -> list[float]:
    arguments = ["--deepspeed_config", f"ds_configs/causal_lm/{config}.json", "--run_dir", folder, *QUICK, *more]
    run_ranks(world_size, "recipe_worker", "causal_lm", *arguments)
    return read_losses(folder)


# {(config, ranks) of the writer of a checkpoint: those that go on from it}
RESUMED = {("tp2_zero3", 4): [("tp2_zero3", 4), ("zero0", 1)], ("ep2_zero3", 4): [("zero0", 1)]}
RESUMED[("tp2_zero2", 2)] = [("sp2_zero3", 2)]
if ALL:
    RESUMED |= {("zero2", 2): [("tp2_zero3", 4)], ("tp2_zero1", 2): [("tp2_zero2", 4)]}
    RESUMED[("zero3", 2)] = [("ep2_zero2", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("writer", RESUMED)
def test_checkpoints_go_from_any_form_to_any_form(tmp_path: Path, writer: tuple[str, int]) -> None:
    """And with the same form, bit for bit."""
    readers = RESUMED[writer]
    more = MIXTURE if "ep2" in writer[0] + readers[0][0] else []
    whole, half = train(tmp_path / "whole", *writer, *more), STEPS // 2
    for reader in readers:
        cut = tmp_path / reader[0]
        shutil.copytree(tmp_path / "whole", cut, ignore=shutil.ignore_patterns(folder_of(STEPS), "result.json"))
        resumed = train(cut, *reader, "--resume", *more)
        assert len(resumed) == STEPS and resumed[:half] == whole[:half]
        assert resumed[half:] == (whole[half:] if reader == writer else pytest.approx(whole[half:], rel=1e-5))


@pytest.mark.slow
def test_in_bf16_it_trains_as_the_same_stage_does_alone(tmp_path: Path) -> None:
    configs = ("zero3", "tp2_zero3", "sp2_zero3")
    alone, *shared = (train(tmp_path / config, config, 2, "--precision", "bf16") for config in configs)
    for losses in shared:
        assert losses == pytest.approx(alone, rel=2e-3)
    assert shared[0] != train(tmp_path / "fp32", "tp2_zero3", 2)
