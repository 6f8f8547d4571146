"""A model on all ranks at every ZeRO stage, with the same weights and constants."""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan
from torch import nn
from transformers import EncoderDecoderModel, PreTrainedModel, initialization, set_seed

from lib.distributed import expert_parallel, memory, ranks, sequence_parallel
from lib.distributed.stored_weights import weights_as_stored, widen_buffers
from lib.errors import UserError
from lib.progress import progress
from lib.settings.ds_config import (
    expert_parallel_size,
    sequence_parallel_size,
    shares_vocabulary,
    stage_of,
    tensor_parallel_size,
)

# Architectures that DeepSpeed's own rules share rightly, though transformers has no plan for them (test_parallel.py).
SHARED_WITHOUT_PLAN = {"bert", "electra", "roberta"}
OUTPUT_LAYERS = ("lm_head", "embed")  # a plan for these alone shares no layer


@progress("loading the model")
def load_model(build: Callable[[], torch.nn.Module], ds_config: dict[str, Any], seed: int) -> torch.nn.Module:
    """The model that `build` returns, with the same weights on every rank and at every stage, for deepspeed.initialize.

    build: makes a whole model in host memory, from a config (at random, from the seed) or from_pretrained. A model that
    is not one of transformers' must have what makes it anew as its only argument and attribute `config`, a dict that
    JSON can hold. Pre-trained weights in 16 bits are views of their files (lib/distributed/stored_weights.py) until
    they get the type that they are trained in, which DeepSpeed would give them before it makes its fp32 copies. At
    stages 0 to 2 each rank needs all parameters and calls it. At stage 3 only rank 0 does; the model is born
    partitioned on all ranks and gets the weights one parameter at a time, so no other rank and no device ever holds it
    whole, and rank 0 only what is no view.
    """
    set_seed(seed)
    rows_shared_by, experts_shared_by = sequence_parallel_size(ds_config), expert_parallel_size(ds_config)

    def build_and_check() -> Any:
        with weights_as_stored():
            model = _check_forms(build(), tensor_parallel_size(ds_config), rows_shared_by)
        widen_buffers(model)
        if experts_shared_by > 1:
            expert_parallel.check_model(model, experts_shared_by, ds_config["expert_parallel"].get("preset_model"))
        return _check_output_layer(model) if shares_vocabulary(ds_config) else model

    if stage_of(ds_config) < 3:
        model = ranks.rank0_first(build_and_check)()
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(_training_dtype(ds_config))
    else:
        whole: list[Any] = []

        def build_whole() -> tuple[Any, ...]:
            whole.append(build_and_check())
            extras = (getattr(whole[0], name, None) for name in ("generation_config", "peft_config"))
            return type(whole[0]), whole[0].config, *extras

        model_class, config, generation_config, adapters = ranks.on_rank0(build_whole)
        # Without no_init_weights, transformers would initialize empty shards: the model would start from other weights.
        with deepspeed.zero.Init(config_dict_or_path=ds_config), initialization.no_init_weights():
            model = model_class(config)
            if isinstance(model, PreTrainedModel):
                model.tie_weights()  # which is part of the initialization that was left out
            for adapter in (adapters or {}).values():
                model.add_adapter(adapter)
        if generation_config is not None:
            model.generation_config = generation_config
        names = _names(model)
        ranks.on_rank0(lambda: _check_names(_names(whole[0]), names))
        # The class made them anew, so that what build() has frozen would be trained.
        frozen = ranks.on_rank0(lambda: {n for n, found in whole[0].named_parameters() if not found.requires_grad})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        source = dict(whole[0].named_parameters()) if whole else {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                    if whole:
                        parameter.copy_(source[name])
                        source[name].data = torch.empty(0)  # its memory is free, or its file when that is copied
                if parameter.ds_numel > 1e6:
                    memory.trim()
        # zero.Init has rounded what the constructor computed: rotary frequencies, scales.
        right = ranks.on_rank0(lambda: {name: tensor.detach() for name, tensor in constants(whole[0]).items()})
        for name, tensor in constants(model).items():
            tensor.data = right[name].to(tensor.device)
    if tensor_parallel_size(ds_config) > 1 and has_adapter(model):
        _plan_adapters(model)
    if rows_shared_by > 1:
        sequence_parallel.share_attention(model)
    if experts_shared_by > 1:
        expert_parallel.mend_transformers()
    if "activation_checkpointing" in ds_config:
        if not (isinstance(model, PreTrainedModel) and model.supports_gradient_checkpointing):
            raise UserError(
                f"activation_checkpointing is in the DeepSpeed JSON, but {type(model).__name__} has none; "
                "leave the section out"
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    memory.note(model)
    memory.fit_buckets(ds_config)
    model.train()  # from_pretrained leaves a model in evaluation mode, without dropout and activation checkpointing
    return model


def _training_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Of the parameters that the model computes with."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((types[name] for name in types if ds_config.get(name, {}).get("enabled")), torch.float32)


def _check_forms(model: Any, tensor_size: int, sequence_size: int) -> Any:
    """The model. Raises UserError where groups of so many ranks cannot share its matrices, or its rows."""
    if tensor_size > 1:
        _check_tensor_parallel(model, tensor_size)
    if sequence_size > 1:
        sequence_parallel.check_model(model, sequence_size)
    return model


def _check_tensor_parallel(model: Any, size: int) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"tensor_parallel.autotp_size is {size}, but {type(model).__name__} has no attention heads to share; "
            "take a JSON without tensor_parallel"
        )
    composed = isinstance(model, EncoderDecoderModel)
    parts = [model.encoder, model.decoder] if composed else [model]
    shared = [part for part in parts if _is_shared_rightly(part)]
    whole = [part for part in parts if composed and part.config.model_type == "gpt2"]  # DeepSpeed leaves it whole
    if not shared or len(shared) + len(whole) < len(parts):
        raise UserError(
            f"tensor_parallel.autotp_size is {size}, but transformers has no plan by which to share the matrices of "
            f"{type(model).__name__} ({', '.join(part.config.model_type for part in parts)}), or one that DeepSpeed "
            "cannot use; take a JSON without tensor_parallel, or an architecture such as llama, qwen3 or bert"
        )
    for part in (part for outer in shared for part in outer.modules() if isinstance(part, PreTrainedModel)):
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(part.config, name, None)
            if isinstance(heads, int) and heads % size:
                fitting = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
                raise UserError(
                    f"tensor_parallel.autotp_size is {size}, which does not divide {name} {heads} of "
                    f"{type(part).__name__}; sizes that do: {fitting}"
                )


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether peft has added an adapter to the model, and frozen all else."""
    return bool(getattr(model, "peft_config", None))


def _plan_adapters(model: Any) -> None:
    """Let a tensor-parallel group share a layer with an adapter, W x + B A x, as it would share W alone.

    Where W is cut along its outputs, B is, and A is whole on each rank; where along its inputs, A is, and B is whole.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # here, as most recipes need no peft (0.25 s)

    plan = dict(model.config.base_model_tp_plan or {})
    for pattern, style in list(plan.items()):
        part = {"colwise": "lora_B", "rowwise": "lora_A"}.get(style)
        if part is not None:
            plan |= {f"{pattern}.base_layer": style} | {f"{pattern}.{part}.{name}": style for name in model.peft_config}
    model.config.base_model_tp_plan = plan
    kinds: dict[type, type] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.__class__ = kinds.setdefault(type(layer), _without_weight(type(layer)))


def _without_weight(kind: type) -> type:
    """A class of peft's layers without the property `weight`, the inner layer's.

    DeepSpeed would take a layer that has one for a single matrix, and leave out what is in it.
    """

    def weight(layer: torch.nn.Module) -> None:
        raise AttributeError("weight")

    return type(kind.__name__, (kind,), {"weight": property(weight)})


def _check_output_layer(model: Any) -> Any:
    """The model. Raises UserError where it has no output layer whose vocabulary ranks could share."""
    layer = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is layer), "none")
    if isinstance(model, EncoderDecoderModel) or name not in ("lm_head", "embed_out") or type(layer) is not nn.Linear:
        raise UserError(
            f"tensor_parallel.vocab_parallel_lm_head is true, but the output layer of {type(model).__name__} "
            f"({name}) is none that DeepSpeed can share over the vocabulary; set it to false"
        )
    return model


def _is_shared_rightly(model: PreTrainedModel) -> bool:
    if model.config.model_type in SHARED_WITHOUT_PLAN:
        return True
    plan = _get_hf_tp_plan(model) or {}
    try:
        TPPlanConverter.convert(plan)
    except ValueError:
        return False
    return any(not any(name in pattern for name in OUTPUT_LAYERS) for pattern in plan)


def constants(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model that are no parameters: buffers, and plain attributes of its modules."""
    attributes = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    }
    return dict(model.named_buffers()) | attributes


def _names(model: torch.nn.Module) -> set[str]:
    return {*dict(model.named_parameters()), *constants(model)}


def _check_names(loaded: set[str], built: set[str]) -> None:
    if loaded != built:
        raise UserError(
            "stage 3 cannot train this model: made from its config it has other parameters or buffers than loaded "
            f"({', '.join(sorted(loaded ^ built)[:3])}); "
            "its config may say that embeddings are tied and its weights not: mend that, or take stage 0, 1 or 2"
        )
