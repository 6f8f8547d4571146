"""The trained model, gathered from all ranks, as files."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.distributed import expert_parallel, mesh, ranks
from lib.distributed.loading import has_adapter
from lib.distributed.model_files import Kinds, Plan, plan_files, without_copies, write_files
from lib.distributed.pipeline import model_of
from lib.distributed.zero_state import layout
from lib.progress import progress
from lib.settings.ds_config import stage_of

FORM = "model_form"  # the folder in a run's that keep_form writes
PLAN = "plan.json"  # in it


class WholeState:
    """The tensors of a trained model's state, under the names of the whole model, gathered one at a time.

    Of a model with an adapter it has the adapter's alone. Every rank must make it, and read the same names in the same
    order. kinds: name -> shape and type of each tensor. ties: name -> name of the first tensor that is the same.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self.model, self._partitioned = model_of(engine), stage_of(engine.config) == 3
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._moved = expert_parallel.parts(self.model)
        routers = {id(self._parameters[name]) for name in self._moved}  # DeepSpeed's layers have them under two names
        self._here = {
            name: tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if (id(tensor) not in routers or name in self._moved)
            and (tensor.requires_grad or not has_adapter(self.model))
        }
        found = [self._facts()]
        if mesh.pipeline_size() > 1:  # each stage has others
            found = ranks.gather_on_rank0(found[0] if mesh.gradient_rank() == 0 else ({}, {}))
        self.kinds, self.ties, self._owners = ranks.on_rank0(lambda: _joined(found))

    def _facts(self) -> tuple[Kinds, dict[str, str]]:
        """(kinds, ties) of what this rank has: of a pipeline, its stage."""
        kinds: Kinds = {}
        ties: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, tensor in self._here.items():
            shared = layout(tensor) if isinstance(tensor, torch.nn.Parameter) else None
            shape = shared.shape if shared is not None else getattr(tensor, "ds_shape", tensor.shape)
            if name in self._moved:
                name, shape = self._moved[name].name, self._moved[name].shape
            kinds[name] = list(shape), tensor.dtype
            ties[name] = first.setdefault(id(tensor), name)
        return kinds, ties

    def read(self, name: str) -> torch.Tensor | None:
        """A tensor, whole, in rank 0's host memory; None on the other ranks."""
        shape, dtype = self.kinds[name]
        if self._owners[name] > 0:  # another stage of a pipeline has it
            if ranks.rank() == 0:
                received = torch.empty(shape, dtype=dtype)
                torch.distributed.recv(received, self._owners[name], group=ranks.cpu_group())
                return received
            if ranks.rank() == self._owners[name]:
                sent = self._here[name].detach().cpu().contiguous()
                torch.distributed.send(sent, 0, group=ranks.cpu_group())
            return None
        parts = {here: part for here, part in self._moved.items() if part.name == name}
        if not parts:
            return self._gather(name) if name in self._here else None
        joined = torch.empty(shape, dtype=dtype)
        for here, part in parts.items():
            experts = self._gather(here)
            if experts is not None:
                part.write(joined, experts)
        return joined if ranks.rank() == 0 else None

    def _gather(self, name: str) -> torch.Tensor | None:
        to_gather = [self._parameters[name]] if self._partitioned and name in self._parameters else []
        with deepspeed.zero.GatheredParameters(to_gather, enabled=self._partitioned):
            whole = expert_parallel.gather_experts(self.model, gather_shards(self._here[name]))
            return whole.detach().to("cpu", copy=True) if ranks.rank() == 0 else None

    def plan(self) -> Plan:
        """That of the model's files, the same on every rank."""

        def make() -> Plan:
            is_whole = isinstance(self.model, PreTrainedModel) and not has_adapter(self.model)
            names = without_copies(self.model, self.ties) if is_whole else self.kinds
            return plan_files(self.model, {name: self.kinds[name] for name in names})

        return ranks.on_rank0(make)


def _joined(found: list[tuple[Kinds, dict[str, str]]]) -> tuple[Kinds, dict[str, str], dict[str, int]]:
    """(kinds, ties, name -> the first rank that has the tensor) from those of each rank."""
    kinds: Kinds = {}
    ties: dict[str, str] = {}
    owners: dict[str, int] = {}
    for owner, (some, some_ties) in enumerate(found):
        owners = dict.fromkeys(some, owner) | owners
        kinds, ties = some | kinds, some_ties | ties
    return {name: kinds[name] for name in owners}, ties, owners


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The model's state_dict, whole, in rank 0's host memory; empty on the other ranks. Every rank must call it."""
    state = WholeState(engine)
    return {name: tensor for name in state.kinds if (tensor := state.read(name)) is not None}


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
    is not one of transformers', model.safetensors has the state_dict and config.json its `config`. One file at a time
    is in memory, on rank 0.
    """
    state = WholeState(engine)
    plan = state.plan()
    ranks.on_rank0(lambda: _write_form(state, folder, tokenizer, target_tokenizer))
    write_files(folder, plan, state.model, state.read, ranks.on_rank0)


def keep_form(
    engine: deepspeed.DeepSpeedEngine, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None,
    target_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:  # fmt: skip
    """Write what export would, but for the weights, and the plan of their files: with a checkpoint it makes the model
    (lib/launch/export.py). Every rank must call it."""
    state = WholeState(engine)
    kept: dict[str, Any] = {**state.plan(), "ties": state.ties}

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        _write_form(state, folder, tokenizer, target_tokenizer)
        (folder / PLAN).write_text(json.dumps(kept), encoding="utf-8")

    ranks.on_rank0(write)


def _write_form(
    state: WholeState, folder: Path, tokenizer: PreTrainedTokenizerBase | None,
    target_tokenizer: PreTrainedTokenizerBase | None,
) -> None:  # fmt: skip
    """The config and the tokenizers."""
    model = state.model
    if isinstance(model, PreTrainedModel):
        # An adapter's config comes with its weights only; of others there are none yet.
        kinds = state.kinds if has_adapter(model) else {}
        unset = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
        model.save_pretrained(folder, state_dict=unset, save_original_format=False)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
    else:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if target_tokenizer is not None:
        target_tokenizer.save_pretrained(folder / "target_tokenizer")
