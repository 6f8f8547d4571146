"""Runs a recipe's main() under many configs in one launch, for tests/test_recipes.py. Arguments: recipe, folder, case ...

A case is NAME:JSON:setting=value,... It leaves its run in folder/NAME-WORLD_SIZE, the scores that main() returned in scores.json, and
in probe.pt what the trained engine answers to a few made-up tokens.
"""

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import deepspeed
import plain_torch

from lib import config, ranks
from lib.ds_config import load_ds_config

PROBE = torch.arange(5, 37).view(2, 16)


def main(recipe_name: str, folder: Path, cases: list[str]) -> None:
    recipe: Any = importlib.import_module(f"recipes.{recipe_name}")
    real_export = recipe.export
    for case in cases:
        name, json_path, settings = case.split(":")
        run_dir = folder / f"{name}-{os.environ['WORLD_SIZE']}"
        given = {"run_dir": str(run_dir), "log_every": "7", "max_steps": "20"} | dict(setting.split("=") for setting in settings.split(","))
        cfg = config.load(recipe.Config, ROOT / "recipes" / f"{recipe_name}.yaml", given, quick=True)
        ds_config = load_ds_config(Path(json_path), cfg, int(os.environ["WORLD_SIZE"]))
        plain = SimpleNamespace(initialize=plain_torch.initialize)
        recipe.deepspeed = plain if name == "plain" else deepspeed

        def export_and_probe(engine: Any, tokenizer: Any, model_folder: Path, run_dir: Path = run_dir) -> None:
            real_export(engine, tokenizer, model_folder)
            engine.eval()
            with torch.no_grad():
                logits = engine(input_ids=PROBE).logits
            if ranks.rank() == 0:
                torch.save(logits, run_dir / "probe.pt")

        recipe.export = export_and_probe
        scores = recipe.main(cfg, ds_config)
        if ranks.rank() == 0:
            (run_dir / "scores.json").write_text(json.dumps({"scores": scores, "settings": dataclasses.asdict(cfg)}))


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    main(arguments[0], Path(arguments[1]), arguments[2:])
    config.leave(0)
