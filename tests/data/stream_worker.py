"""causal_lm on a stream, for tests/data/test_streams.py. Arguments: dataset, steps, run folder ...

A folder in which there is a checkpoint is gone on with. The losses are in each folder's metrics.jsonl.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from lib.distributed import ranks
from lib.errors import ROOT
from lib.settings import config as settings
from lib.settings.ds_config import load_ds_config

causal_lm: Any = importlib.import_module("recipes.causal_lm")


def main(dataset: str, steps: str, *folders: str) -> None:
    ranks.init(timeout_minutes=2)
    for folder in folders:
        given = {"dataset": dataset, "streaming": "true", "held_out": "2", "batch_size": "4", "samples": "0"}
        given |= {"vocab_size": "300", "hidden_size": "16", "intermediate_size": "16", "num_layers": "1"}
        given |= {"num_heads": "2", "max_length": "32", "max_steps": steps, "run_dir": folder, "resume": "true"}
        given |= {"save_every": "3", "keep_checkpoints": "9", "rank_timeout": "2", "learning_rate": "1e-2"}
        cfg = settings.load(causal_lm.Config, ROOT / "recipes" / "causal_lm.yaml", given, quick=True)
        section = json.loads((ROOT / "ds_configs" / "causal_lm" / "zero2.json").read_text())
        path = Path(folder).with_suffix(".json")
        text = json.dumps(section | {"train_micro_batch_size_per_gpu": 2 // ranks.world_size()})
        ranks.on_rank0(lambda path=path, text=text: path.write_text(text))  # type: ignore[misc]
        causal_lm.main(cfg, load_ds_config(path, cfg, ranks.world_size()))
