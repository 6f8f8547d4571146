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


def test_what_was_tried_and_what_each_change_saves() -> None:
    text = answer(ds_config(1), _total=lambda: 80 * 10**9)
    assert (
        "ZeRO stage 1, 8 rows a micro-batch, no activation checkpointing" in text
        and "a rank's device has 80.0 GB" in text
    )
    # Parameters 2 x 1.0, gradients 2 x 0.9, optimizer states 12 x 0.9 / 4.
    assert "states take 6.5 GB" in text
    changes = text.split("what it saves: ")[1]
    assert re.findall(r'"(\w+)": (?:\{"\w+": )?"?(\w*)', changes) == [
        ("train_micro_batch_size_per_gpu", "4"), ("activation_checkpointing", ""),
        ("zero_optimization", "2"), ("zero_optimization", "3"), ("offload_optimizer", "cpu"),
    ]  # fmt: skip
    # Stage 2 keeps a quarter of the gradients, stage 3 of the parameters too; offloading leaves no optimizer states.
    assert re.findall(r"\(([\d.]+) GB\)", changes) == ["1.4", "2.9", "2.7"]


def test_states_that_do_not_fit_come_first() -> None:
    text = answer(ds_config(0), _total=lambda: 16 * 10**9)
    changes = text.split("what it saves: ")[1]
    assert changes.index('{"stage": 1}') < changes.index("micro_batch")


def test_what_is_done_already_is_not_advised() -> None:
    config = ds_config(3, 1, offload_optimizer={"device": "cpu"}) | {"activation_checkpointing": {}}
    assert answer(config, _total=lambda: 80 * 10**9).endswith("nothing is left: take more devices")


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
