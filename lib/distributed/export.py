"""The trained model, gathered from all ranks, as files."""

import json
import math
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.distributed import expert_parallel, mesh, ranks
from lib.distributed.loading import has_adapter
from lib.distributed.pipeline import model_of
from lib.distributed.zero_state import layout
from lib.progress import progress
from lib.settings.ds_config import stage_of

SHARD_SIZE = "5GB"  # of a large model's files, which model.safetensors.index.json lists


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The model's state_dict, whole, in rank 0's host memory; empty on the other ranks. Every rank must call it.

    Of a model with an adapter it has the adapter alone. At stage 3 the parameters are gathered one at a time.
    """
    partitioned = stage_of(engine.config) == 3
    model = model_of(engine)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, torch.Tensor] = {}
    moved = expert_parallel.parts(model)
    routers = {id(parameters[name]) for name in moved}  # which DeepSpeed's layers have under two names
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (id(tensor) in routers and name not in moved) or (has_adapter(model) and not tensor.requires_grad):
            continue
        to_gather = [parameters[name]] if partitioned and name in parameters else []
        with deepspeed.zero.GatheredParameters(to_gather, enabled=partitioned):
            whole = expert_parallel.gather_experts(model, gather_shards(tensor))
            if ranks.rank() == 0 and name in moved:
                place = torch.empty(moved[name].shape, dtype=tensor.dtype)
                moved[name].write(state.setdefault(moved[name].name, place), whole.detach().cpu())
            elif ranks.rank() == 0:
                state[name] = whole.detach().to("cpu", copy=True)
    if mesh.pipeline_size() > 1:
        _take_other_stages(state, model)
    return state


def _take_other_stages(state: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Add to rank 0's state_dict, of the first stage, those of the others. Every rank must call it."""
    mine = model.state_dict() if mesh.gradient_rank() == 0 and mesh.pipeline_stage() > 0 else {}
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in mine.items()}
    for sender, names in enumerate(ranks.gather_on_rank0(kinds)):
        for name, (shape, dtype) in names.items():
            state[name] = torch.empty(shape, dtype=dtype)
            torch.distributed.recv(state[name], sender, group=ranks.cpu_group())
    for tensor in mine.values():
        torch.distributed.send(tensor.cpu().contiguous(), 0, group=ranks.cpu_group())


def gather_shards(tensor: torch.Tensor) -> torch.Tensor:
    """On rank 0, the whole of a parameter of which a tensor-parallel group has shards; anything else as it is.

    Every rank must call it.
    """
    shared = layout(tensor) if isinstance(tensor, torch.nn.Parameter) else None
    if shared is None:
        return tensor
    counts = [math.prod(shared.shard_shape(rank)) for rank in range(len(shared.sizes))]
    padded = tensor.detach().new_zeros(max(counts))
    padded[: tensor.numel()] = tensor.detach().reshape(-1)
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded, group=mesh.tensor_group())
    if ranks.rank() > 0:  # which write nothing
        return tensor
    return shared.join([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])


@progress("exporting the model")
def export(
    engine: deepspeed.DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase | None, folder: Path,
    target_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:  # fmt: skip
    """Write the trained model and its tokenizer, if it has one, to a folder that from_pretrained loads. Every rank must
    call it.

    target_tokenizer: that of an encoder-decoder's output, for the folder target_tokenizer in it. safetensors only; tied
    weights stay tied. Of a model with an adapter, the folder has the adapter alone, as peft saves it. Of a model that
    is not one of transformers', model.safetensors has the state_dict and config.json its `config`.
    """
    model, state_dict = model_of(engine), full_state_dict(engine)

    def write() -> None:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, state_dict=state_dict, max_shard_size=SHARD_SIZE)
        else:
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
            save_file(state_dict, folder / "model.safetensors")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if target_tokenizer is not None:
            target_tokenizer.save_pretrained(folder / "target_tokenizer")

    ranks.on_rank0(write)
