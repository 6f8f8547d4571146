"""A model computes the same function at every stage in bf16: every number that its constructor computed is the same,
and so is what it says of long texts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """(model, config) -> what tests/distributed/stage_worker.py found of it."""
    folder: Path = tmp_path_factory.mktemp("stages")
    run_ranks(2, "stage_worker", folder, "zero0", "zero2", "zero3")
    return {
        (name, config): torch.load(folder / f"{name}-{config}.pt")
        for name in ("llama", "gemma")
        for config in ("zero0", "zero2", "zero3")
    }


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("config", ["zero0", "zero3"])
def test_a_bf16_model_is_the_same_at_every_stage(found: dict[tuple[str, str], Any], name: str, config: str) -> None:
    here, reference = found[name, config], found[name, "zero2"]
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in here["constants"].items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in reference["constants"].items()
    }
    assert any(tensor.dtype == torch.float32 and tensor.numel() > 1 for tensor in reference["constants"].values())
    assert all(torch.equal(here["constants"][key], tensor) for key, tensor in reference["constants"].items())
    assert here["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert here["norm"] == pytest.approx(reference["norm"], rel=1e-3)
    assert here["frozen"] == pytest.approx(reference["frozen"], rel=1e-9) and here["frozen"] > 0
    torch.testing.assert_close(
        here["logits"], reference["logits"], rtol=0, atol=0.05 * float(reference["logits"].std())
    )


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("config", ["zero0", "zero2", "zero3"])
def test_the_export_says_in_bf16_what_the_trained_model_says(
    found: dict[tuple[str, str], Any], name: str, config: str
) -> None:
    assert torch.equal(found[name, config]["exported"], found[name, config]["logits"])
