"""The first two losses of models whose files have 16 bits, at several stages in one launch, for
tests/distributed/test_loading.py. Arguments: folder, config ...

Each model is loaded as recipes do, and beside it in fp32 before load_model is called, as views of no file.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from lib.distributed import ranks
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw
from lib.distributed.repairs import repair_stage0
from lib.errors import ROOT
from lib.models import chat, checks, hub, lora
from lib.models.losses import token_losses


def build(kind: str, name: str, tokenizer: Any, before: Any) -> Any:
    """before: the model in fp32, if it is there already."""
    set_seed(0)
    model = before or hub.load_weights(AutoModelForCausalLM, name, hub.load_config(name, 0.0, False), False)
    assert before or {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    checks.check_causal(model)
    checks.check_generates(model, "")
    if kind == "tokens":
        model = chat.fit(model, tokenizer)
    return lora.add_lora(model, 4, 8.0, "all-linear") if kind == "lora" else model


def losses(model: Any, cfg: Any, ds_config: dict[str, Any], ids: torch.Tensor) -> list[float]:
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_adamw(cfg, model, ds_config), config=ds_config)
    repair_stage0(engine)
    found = []
    for _ in range(3):
        loss = token_losses(engine(input_ids=ids[:, :-1]).logits.float(), ids[:, 1:]).mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    engine.destroy()
    return found


def main(where: str, *configs: str) -> None:
    folder = Path(where)
    ranks.init(timeout_minutes=3)
    ids = torch.randint(0, 90, (1, 33), generator=torch.Generator().manual_seed(ranks.rank()))
    cfg = SimpleNamespace(learning_rate=1e-2, weight_decay=0.0, adam_betas=[0.9, 0.999], adam_eps=1e-8)
    found = {}
    for kind in ("tied", "lora", "tokens"):
        name = str(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(name)
        for config in configs:
            for precision in ("fp32", "bf16"):
                ds_config = json.loads((ROOT / "ds_configs" / "causal_lm" / f"{config}.json").read_text())
                ds_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
                if precision == "bf16":
                    ds_config["bf16"] = {"enabled": True}
                for way in ("stored", "widened"):
                    before = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
                    make = functools.partial(build, kind, name, tokenizer, before if way == "widened" else None)
                    model = load_model(make, ds_config, seed=0)
                    found["/".join((kind, config, precision, way))] = losses(model, cfg, ds_config, ids)
    if ranks.rank() == 0:
        (folder / "losses.json").write_text(json.dumps(found))
