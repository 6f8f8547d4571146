"""The optimizer and the learning-rate schedule that the settings ask for: the rate of every step, and AdamW's betas and
epsilon.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import yaml
from conftest import RECIPES, ROOT

from lib.distributed.optimizer import make_adamw, make_schedule
from lib.errors import UserError
from lib.run.resume import find_checkpoint
from lib.settings import config
from lib.settings.ds_config import load_ds_config

causal_lm: Any = importlib.import_module("recipes.causal_lm")

RATE, STEPS = 0.5, 10
FACTORS: dict[str, Callable[[float], float]] = {  # of the share of the steps after the warm-up that are done
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def settings(**given: str) -> Any:
    return config.load(causal_lm.Config, ROOT / "recipes" / "causal_lm.yaml", given)


# --- the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("kind", FACTORS)
def test_the_rate_of_each_step(kind: str, warmup_steps: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=RATE)
    schedule = make_schedule(settings(lr_schedule=kind, warmup_steps=str(warmup_steps)), optimizer, STEPS)
    for step in range(STEPS):
        after = (step - warmup_steps) / (STEPS - warmup_steps)
        expected = RATE * (step / warmup_steps if step < warmup_steps else FACTORS[kind](after))
        assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] == pytest.approx(expected), step
        optimizer.step()
        schedule.step()
        # How a resumed run finds it.
        assert schedule.base_lrs[0] * schedule.lr_lambdas[0](step) == pytest.approx(expected), step


# --- betas and epsilon ----------------------------------------------------------------------------


@pytest.mark.parametrize("offloaded", [False, True])
def test_betas_and_epsilon_reach_every_group_of_parameters(
    monkeypatch: pytest.MonkeyPatch, one_rank: None, offloaded: bool
) -> None:
    class Recorded(torch.optim.AdamW):
        """In place of DeepSpeed's, which takes a minute to compile and these arguments by the same names."""

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", Recorded)
    cfg = SimpleNamespace(
        learning_rate=1e-3, weight_decay=0.1, adam_betas=[0.8, 0.9], adam_eps=1e-6, pretrained_learning_rate=1e-4
    )
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    section = {"stage": 2, "offload_optimizer": {"device": "cpu"}} if offloaded else {"stage": 2}
    optimizer = make_adamw(cfg, model, {"zero_optimization": section}, model[0].parameters())
    assert isinstance(optimizer, Recorded) is offloaded
    found = [
        (group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"]) for group in optimizer.param_groups
    ]
    assert found == [(rate, decay, (0.8, 0.9), 1e-6) for rate in (1e-3, 1e-4) for decay in (0.1, 0.0)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_them_and_they_survive_json_and_yaml(recipe: str) -> None:
    module = importlib.import_module(f"recipes.{recipe}")
    path = ROOT / "recipes" / f"{recipe}.yaml"
    assert {"adam_betas", "adam_eps"} <= set(config.comments(module.Config))
    cfg: Any = config.load(module.Config, path, {})
    assert (cfg.adam_betas, cfg.adam_eps) == ([0.9, 0.999], 1e-8)
    cfg = config.load(module.Config, path, {"adam_betas": "0.9,0.95", "adam_eps": "1e-6"})
    assert (cfg.adam_betas, cfg.adam_eps) == ([0.9, 0.95], 1e-6)
    kept = dataclasses.asdict(cfg)
    assert json.loads(json.dumps(kept)) == yaml.safe_load(yaml.safe_dump(kept)) == kept


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adam_betas", "0.9", "at least 2 items"),
        ("adam_betas", "0.9,0.99,0.999", "at most 2 items"),
        ("adam_betas", "0.9,1", "less than 1"),
        ("adam_betas", "-0.1,0.9", "greater than or equal to 0"),
        ("adam_betas", "0.9,nan", "less than 1"),
        ("adam_betas", "0.9;0.99", "valid number"),
        ("adam_betas", "", "valid number"),
        ("adam_eps", "0", "greater than 0"),
        ("adam_eps", "-1e-8", "greater than 0"),
    ],
)
def test_other_values_are_refused(key: str, value: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        settings(**{key: value})
    assert str(error.value).startswith(f"--{key}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["[0.9]", "[0.9, 1.0]", "0.9", "[true, 0.9]", "null"])
def test_other_values_in_the_yaml_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        (ROOT / "recipes" / "causal_lm.yaml").read_text().replace("adam_betas: [0.9, 0.999]", f"adam_betas: {value}")
    )
    with pytest.raises(UserError, match=r"mine.yaml: adam_betas: ") as error:
        config.load(causal_lm.Config, path, {})
    assert "\n" not in str(error.value)


def test_the_deepspeed_json_must_have_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    optimizer = {"type": "AdamW", "params": {"betas": [0.9, 0.95], "eps": 1e-6}}
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer}))
    load_ds_config(path, settings(adam_betas="0.9,0.95", adam_eps="1e-6"), 1)
    for given in ({"adam_eps": "1e-6"}, {"adam_betas": "0.9,0.95"}):
        with pytest.raises(UserError, match="make them equal"):
            load_ds_config(path, settings(**given), 1)


@pytest.mark.parametrize(("now", "goes_on"), [("0.9,0.95", True), ("0.9,0.999", False)])
def test_a_run_goes_on_with_the_same_betas_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, now: str, goes_on: bool
) -> None:
    before = dataclasses.asdict(settings(adam_betas="0.9,0.95"))
    manifest = json.loads(json.dumps({"recipe": "causal_lm", "settings": before, "versions": {}, "data": "1234"}))
    monkeypatch.setattr("lib.run.checkpoint_files.find_newest", lambda folder: (folder / "step-2", manifest, []))
    cfg = settings(adam_betas=now, resume="true", run_dir=str(tmp_path))
    if goes_on:
        assert find_checkpoint(tmp_path, "causal_lm", cfg)[0] == (tmp_path / "checkpoints" / "step-2", manifest)
    else:
        with pytest.raises(
            UserError, match=r"adam_betas was \[0.9, 0.95\] and is \[0.9, 0.999\], which would change the result"
        ):
            find_checkpoint(tmp_path, "causal_lm", cfg)
