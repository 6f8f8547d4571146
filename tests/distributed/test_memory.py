"""The answer to a device without memory, and the size of ZeRO's buffers."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib.distributed import memory
from lib.errors import UserError
from lib.run.cli import train

pytestmark = pytest.mark.usefixtures("one_rank")


def ds_config(stage: int, micro_batch: int = 8, **zero: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": stage, **zero}}


def answer(config: dict[str, Any], precision: str = "bf16", ranks: int = 4, **patches: Any) -> str:
    """What a run says whose main() wants more memory than there is."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as found:
        patch.setattr("lib.distributed.mesh.gradient_size", lambda: ranks)
        for name, value in patches.items():
            patch.setattr(memory, name, value)
        train(lambda cfg, ds_config: torch.empty(10**15), SimpleNamespace(precision=precision), config)
    return str(found.value)


@pytest.fixture(autouse=True)
def _model() -> None:
    """1,000 million parameters, of which 900 million are trained."""
    parameters = [torch.nn.Parameter(torch.empty(10**8, device="meta"), requires_grad=n > 0) for n in range(10)]
    memory.note(torch.nn.ParameterList(parameters))


def changes_in(text: str) -> list[tuple[str, str]]:
    """[(key, what the change saves), ...]"""
    return re.findall(r'"(\w+)": [^(]*\(([^)]*)\)', text.split("what it saves): ")[1])


def test_what_was_asked_for_and_what_each_change_saves() -> None:
    text = answer(ds_config(1, micro_batch=9), _total=lambda: 80 * 10**9, _has_checkpointing=True)
    assert "a rank's device has 80.0 GB, and was asked for " in text and "the activations of 9 rows" in text
    # Parameters 2 x 1.0, gradients 2 x 0.9, optimizer states 12 x 0.9 / 4.
    assert "at ZeRO stage 1 parameters, gradients and optimizer states take 6.5 GB" in text
    # Stage 2 keeps a quarter of the gradients, stage 3 of the parameters too; what is offloaded takes nothing.
    assert changes_in(text) == [
        ("train_micro_batch_size_per_gpu", "67% of them"),
        ("activation_checkpointing", "most of them, for a third more computing"),
        ("stage", "1.4 GB"), ("stage", "2.9 GB"), ("offload_optimizer", "2.7 GB"), ("offload_param", "3.4 GB"),
    ]  # fmt: skip
    assert '"train_micro_batch_size_per_gpu": 3' in text  # which divides 9


def test_states_that_do_not_fit_come_first() -> None:
    text = answer(ds_config(0), _total=lambda: 16 * 10**9)
    assert [key for key, _ in changes_in(text)] == [
        "stage", "stage", "stage", "offload_optimizer", "offload_param", "train_micro_batch_size_per_gpu"
    ]  # fmt: skip


def test_what_is_done_already_is_not_advised() -> None:
    everything: dict[str, Any] = {f"offload_{what}": {"device": "cpu"} for what in ("optimizer", "param")}
    config = ds_config(3, 1, **everything) | {"activation_checkpointing": {}}
    assert answer(config, _has_checkpointing=True).endswith("nothing is left")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("ncclUnhandledCudaError: Cuda failure 2 'out of memory'"), True),
        (MemoryError("Unable to allocate 8.00 TiB for an array"), False),  # of the host, and no device's
        (RuntimeError("shapes differ"), False),
    ],
)
def test_errors_of_memory_are_known_by_their_words(error: Exception, expected: bool) -> None:
    assert memory.is_out_of_memory(error) == expected
    memory.note(torch.nn.Sequential())
    assert not memory.is_out_of_memory(error)  # before there is a model


def test_another_error_stays_what_it_is() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        train(fail, SimpleNamespace(precision="fp32"), ds_config(2))


@pytest.mark.parametrize(("stage", "given", "expected"), [(2, None, 500_000_000), (3, 7, 7), (0, None, None)])
def test_buffers_fit_the_model(stage: int, given: int | None, expected: int | None) -> None:
    config = ds_config(stage, **({"reduce_bucket_size": given} if given else {}))
    memory.fit_buckets(config)
    assert config["zero_optimization"].get("reduce_bucket_size") == expected
    memory.note(torch.nn.Linear(3, 4))
    config = ds_config(2)
    memory.fit_buckets(config)
    assert config["zero_optimization"]["reduce_bucket_size"] == 16
