"""Trains small models of many architectures under many configs, and beside each the same model by plain PyTorch.

Used by tests/distributed/test_parallel.py. Arguments: the JSON file to write, config ... (JSON objects). The file gets
for each config and architecture the largest relative differences of losses and gradient norms and the largest
difference of the export's logits, or the error that refused the model.
"""

import functools
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import transformers
from transformers import set_seed

from lib.data.batches import Batch, part_of_rows
from lib.distributed import mesh, ranks
from lib.distributed.export import full_state_dict
from lib.distributed.loading import load_model
from lib.distributed.optimizer import make_adamw
from lib.distributed.pipeline import check_stages, join_stages, model_of
from lib.distributed.repairs import repair_stage0, repair_tensor_parallel
from lib.errors import UserError
from lib.models.experts import Routers
from lib.models.losses import token_losses

Stage = importlib.import_module("recipes.pipeline_lm").Stage
ROWS, LENGTH, TOKENS, STEPS = 8, 12, 97, 4
BALANCE = 0.5  # weight of the balance loss, but in pipelines, which have none
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ARCHITECTURES: dict[str, dict[str, Any]] = {  # transformers' name -> what its config says beside SIZES
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 4, "tie_word_embeddings": True},  # biases
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},  # norms of queries and keys
    "mistral": {"num_key_value_heads": 2, "sliding_window": 9},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8},
    "bert": {},
    "roberta": {},
    "electra": {"embedding_size": 32},
    "gpt_neox": {},  # one matrix for queries, keys and values
    "gpt2": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "modernbert": {},
    "mamba": {},
}


ENCODERS = ("bert", "roberta", "electra", "modernbert")


def build(architecture: str) -> Any:
    set_seed(0)
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=TOKENS, max_position_embeddings=64, **SPECIAL, **SIZES, **ARCHITECTURES[architecture]
    )
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    kind = transformers.AutoModelForMaskedLM if architecture in ENCODERS else transformers.AutoModelForCausalLM
    return kind.from_config(config, dtype=torch.float32)


def loss_of(model: Any, batch: Batch, routers: Routers, balance: float) -> torch.Tensor:
    """Its mean over a step, this rank's share of it; with a large balance loss, in a mixture of experts."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    losses = token_losses(model(**inputs).logits.float(), batch["labels"])
    return losses.sum() / (ROWS * LENGTH) + balance * routers.balance(batch["input_ids"]) / ROWS


def rows_of(architecture: str, step: int) -> Batch:
    ids = torch.randint(3, TOKENS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    places = {} if architecture in ENCODERS else {"position_ids": torch.arange(LENGTH).expand_as(ids)}
    return {"input_ids": ids, "labels": ids.roll(1, 1), **places}


SETTINGS = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, adam_betas=[0.9, 0.999], adam_eps=1e-8)
CLIPPING = 0.5


@functools.cache
def by_plain_torch(architecture: str, balance: float) -> tuple[list[float], list[float], torch.Tensor]:
    """(losses, norms, logits after training)"""
    model = build(architecture)
    model.train()
    optimizer, routers = make_adamw(SETTINGS, model, {}), Routers(model, balance)
    losses, norms = [], []
    for step in range(STEPS):
        loss = loss_of(model, rows_of(architecture, step), routers, balance)
        torch.autograd.backward(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)))
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return losses, norms, model(input_ids=rows_of(architecture, 0)["input_ids"]).logits


def check(model: Any) -> Any:
    return check_stages(model, mesh.pipeline_size(), Stage) if mesh.pipeline_size() > 1 else model


def compare(architecture: str, ds_config: dict[str, Any]) -> dict[str, float | str]:
    balance = 0.0 if mesh.pipeline_size() > 1 else BALANCE
    losses, norms, logits = by_plain_torch(architecture, balance)
    try:
        model = load_model(lambda: check(build(architecture)), ds_config, seed=0)
    except UserError as error:
        return {"refused": str(error)}
    accumulation_steps = ds_config["gradient_accumulation_steps"]
    if mesh.pipeline_size() > 1:

        def share_of_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return token_losses(logits, labels).sum() / (ROWS * LENGTH) * accumulation_steps * mesh.gradient_size()

        model = join_stages(model, Stage, share_of_loss)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_adamw(SETTINGS, model, ds_config), config=ds_config)
    repair_stage0(engine)
    repair_tensor_parallel(engine, ROWS)
    routers = Routers(model_of(engine), balance)
    differences: dict[str, float | str] = {"loss": 0.0, "norm": 0.0}
    for step in range(STEPS):
        mine = slice(mesh.data_parallel_rank(), None, mesh.data_parallel_size())
        rows = {name: tensor[mine] for name, tensor in rows_of(architecture, step).items()}
        if mesh.pipeline_size() > 1:
            parts = [tensor.chunk(accumulation_steps) for tensor in (rows["input_ids"], rows["labels"])]
            loss = engine.train_batch(zip(*parts, strict=True)) / mesh.gradient_size()
        else:
            loss = loss_of(engine, part_of_rows(rows), routers, balance)
            engine.backward(loss * mesh.gradient_size())
            engine.step()
        found = {"loss": (float(ranks.all_sum(loss.detach())), losses[step])}
        found["norm"] = float(engine.get_global_grad_norm()), norms[step]
        for name, (here, there) in found.items():
            differences[name] = max(float(differences[name]), abs(here - there) / there)
    state = full_state_dict(engine)
    if ranks.rank() == 0:
        exported = build(architecture)
        exported.load_state_dict(state)
        ids = rows_of(architecture, 0)["input_ids"]
        with torch.no_grad():
            differences["export"] = float((exported.eval()(input_ids=ids).logits - logits).abs().max())
    engine.destroy()
    return differences


def main(file: str, *configs: str) -> None:
    ranks.init(timeout_minutes=3)
    found: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        for balance in (0.0, BALANCE):
            by_plain_torch(architecture, balance)  # while no ranks share rows
    for text in configs:
        ds_config = json.loads(text)
        mesh.form(ds_config)
        found[text] = {architecture: compare(architecture, ds_config) for architecture in ARCHITECTURES}
    if ranks.rank() == 0:
        Path(file).write_text(json.dumps(found))
