"""Tensor parallelism: the losses, gradient norms and exports of one device, whatever the stage and the architecture."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import read_losses, run_ranks
from parallel_worker import ARCHITECTURES, CLIPPING, ROWS
from transformers import LlamaConfig, LlamaForCausalLM

from lib.distributed import loading
from lib.errors import UserError

REFUSED = {"gpt2", "modernbert"}
# (ranks, stages): tensor-parallel pairs alone, and two of them side by side
LAUNCHES = {2: (0, 1, 3), 4: (0, 2, 3)}


def config(world_size: int, stage: int) -> str:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # so that small parameters are partitioned too
        zero["stage3_param_persistence_threshold"] = 0
    section = {"autotp_size": 2, "vocab_parallel_lm_head": False}
    sizes = {"train_micro_batch_size_per_gpu": ROWS // (world_size // 2), "gradient_accumulation_steps": 1}
    return json.dumps({**sizes, "gradient_clipping": CLIPPING, "tensor_parallel": section, "zero_optimization": zero})


@pytest.fixture(scope="module", params=LAUNCHES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """{stage: {architecture: what parallel_worker.compare found}}"""
    file = tmp_path_factory.mktemp("parallel") / "found.json"
    stages = LAUNCHES[request.param]
    run_ranks(request.param, "parallel_worker", file, *(config(request.param, stage) for stage in stages))
    return dict(zip(stages, json.loads(file.read_text()).values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - REFUSED))
def test_it_trains_and_exports_what_one_device_does(found: dict[int, dict[str, Any]], architecture: str) -> None:
    for stage, by_architecture in found.items():
        differences = by_architecture[architecture]
        assert differences["loss"] < 1e-5 and differences["norm"] < 1e-4, stage
        assert differences["export"] < 1e-4, stage  # after training; the contract has the export itself


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_what_cannot_be_shared_is_refused(found: dict[int, dict[str, Any]], architecture: str) -> None:
    for by_architecture in found.values():
        assert "has no plan by which to share" in by_architecture[architecture]["refused"]


def test_heads_that_do_not_divide_are_refused() -> None:
    sizes = {"vocab_size": 9, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=3))
    assert loading._check_tensor_parallel(model, 3) is model
    with pytest.raises(UserError, match=r"num_key_value_heads 3 of Llama\w+; sizes that do: 1, 3"):
        loading._check_tensor_parallel(model, 2)


QUICK = ["--quick", "--max_steps", "8", "--log_every", "1", "--samples", "0"]
QUICK += ["--save_every", "4", "--keep_checkpoints", "9"]


def train(folder: Path, config: str, world_size: int, *more: str) -> list[float]:
    arguments = ["--deepspeed_config", f"ds_configs/causal_lm/{config}.json", "--run_dir", folder, *QUICK, *more]
    run_ranks(world_size, "recipe_worker", "causal_lm", *arguments)
    return read_losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writer", "reader"),
    [(("tp2_zero3", 4), ("zero0", 1)), (("zero2", 2), ("tp2_zero3", 4)), (("tp2_zero1", 2), ("tp2_zero2", 4))],
)
def test_checkpoints_go_from_any_form_to_any_form(
    tmp_path: Path, writer: tuple[str, int], reader: tuple[str, int]
) -> None:
    whole = train(tmp_path / "whole", *writer)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("step-00000008", "result.json"))
    resumed = train(tmp_path / "cut", *reader, "--resume")
    assert len(resumed) == 8 and resumed[:4] == whole[:4]
    assert resumed[4:] == pytest.approx(whole[4:], rel=1e-5)


@pytest.mark.slow
def test_the_same_form_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "tp2_zero3", 4)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("step-00000008", "result.json"))
    assert train(tmp_path / "cut", "tp2_zero3", 4, "--resume") == whole


@pytest.mark.slow
def test_in_bf16_it_trains_as_the_same_stage_does_alone(tmp_path: Path) -> None:
    shared, alone = (train(tmp_path / config, config, 2, "--precision", "bf16") for config in ("tp2_zero3", "zero3"))
    assert shared == pytest.approx(alone, rel=2e-3) and shared != train(tmp_path / "fp32", "tp2_zero3", 2)
