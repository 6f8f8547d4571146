"""The cases of contract_worker.py as words; without torch, so that a process which only starts them starts at once."""

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# 8 rows a step in micro-batches of 2: 4 accumulation steps on 1 rank, 2 on 2 ranks, 1 on 4 ranks.
BATCH, MICRO = 8, 2
STEPS = 20 if "TEST_ALL" in os.environ else 10  # of a case; it saves after half of them
FP32, BF16 = f"precision=fp32,batch_size={BATCH}", f"precision=bf16,batch_size={BATCH}"

# With these, stage 3 partitions, gathers and releases a small model as it does a large one.
AS_LARGE = dict.fromkeys(
    [
        "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
    ],
    0,
)  # fmt: skip


def case(
    folder: Path,
    recipe: str,
    name: str,
    config: str,
    settings: str,
    micro: int = MICRO,
    source: str | None = None,
    **sections: Any,
) -> str:
    """A case, whose DeepSpeed JSON is written into folder/recipe/. sections: of the JSON, in the place of its own."""
    (folder / recipe).mkdir(parents=True, exist_ok=True)
    ds_config = json.loads((ROOT / "ds_configs" / recipe / f"{config}.json").read_text()) | {
        "train_micro_batch_size_per_gpu": micro, **sections
    }  # fmt: skip
    if config == "zero3":
        ds_config["zero_optimization"] |= AS_LARGE
    path = folder / recipe / f"{'_'.join([config, str(micro), *sections])}.json"
    path.write_text(json.dumps(ds_config))
    return ":".join([recipe, name, str(path), settings, *([source] if source else [])])
