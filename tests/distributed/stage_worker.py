"""A step in bf16 on long texts at several stages in one launch, for tests/distributed/test_stages.py. Arguments:
folder, config ...

Models whose constructors compute constants: rotary frequencies, by torch.arange, and the scale of the embeddings, by
torch.tensor. Large weights make their attention sharp, so that a rounded angle shows. What each model is and says is
left in <model>-<config>.pt, and its export in <model>-<config>.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from lib.distributed import ranks
from lib.distributed.export import export
from lib.distributed.loading import constants, load_model
from lib.distributed.optimizer import make_adamw
from lib.distributed.repairs import repair_stage0
from lib.distributed.zero_state import frozen_size
from lib.errors import ROOT
from lib.models.losses import token_losses

LENGTH, TOKENS = 2048, 97
SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
}


def build(name: str) -> Any:
    set_seed(0)
    model: Any = (
        LlamaForCausalLM(LlamaConfig(**SIZES))
        if name == "llama"
        else Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=32, num_key_value_heads=2))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    return model


def main(where: str, *configs: str) -> None:
    folder = Path(where)
    ranks.init(timeout_minutes=3)
    # Each rank has a row of its own.
    ids = torch.randint(0, TOKENS, (1, LENGTH + 1), generator=torch.Generator().manual_seed(ranks.rank()))
    cfg = SimpleNamespace(learning_rate=1e-5, weight_decay=0.0, adam_betas=[0.9, 0.999], adam_eps=1e-8)
    for name in ("llama", "gemma"):
        for config in configs:
            ds_config = json.loads((ROOT / "ds_configs" / "causal_lm" / f"{config}.json").read_text())
            ds_config |= {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "bf16": {"enabled": True},
            }
            model = load_model(functools.partial(build, name), ds_config, seed=0)
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=make_adamw(cfg, model, ds_config), config=ds_config
            )
            repair_stage0(engine)
            frozen = frozen_size(engine)
            before = {key: tensor.clone() for key, tensor in constants(engine.module).items()}
            loss = token_losses(engine(input_ids=ids[:, :-1]).logits.float(), ids[:, 1:]).mean()
            engine.backward(loss)
            engine.step()
            export(engine, None, folder / f"{name}-{config}")
            engine.eval()
            with torch.no_grad():
                logits = engine(input_ids=ids[:, :-1]).logits
            if ranks.rank() == 0:
                found = {
                    "constants": before,
                    "loss": loss.item(),
                    "norm": float(engine.get_global_grad_norm()),
                    "logits": logits,
                    "frozen": frozen,
                }
                exported = AutoModelForCausalLM.from_pretrained(
                    folder / f"{name}-{config}", dtype=torch.bfloat16
                ).eval()
                with torch.no_grad():
                    found["exported"] = exported(input_ids=ids[:, :-1]).logits
                torch.save(found, folder / f"{name}-{config}.pt")
            engine.destroy()
