"""Pipeline parallelism: the layers of a decoder are divided into stages, one a rank, and micro-batches flow through.

Every rank builds the whole model and keeps the layers of its stage. In place of the others stand modules that pass on
what they get. So parameters have the names that they have in the whole model, and checkpoints and exports are those of
the whole model. transformers' own plan for pipelines (base_model_pp_plan) says which modules come before and after the
layers.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn
from transformers import PreTrainedModel

from lib.distributed import mesh
from lib.errors import UserError

# Makes the module that computes one stage of a model: (model, is the first stage, is the last stage).
MakeStage = Callable[[Any, bool, bool], nn.Module]


class PassOn(nn.Module):
    """Stands for a module of another stage."""

    def __init__(self, module: nn.Module):
        super().__init__()
        if hasattr(module, "attention_type"):  # models look it up to choose a layer's mask
            self.attention_type = module.attention_type

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class _TiedStage(TiedLayerSpec):  # type: ignore[misc]  # DeepSpeed has no types
    """A stage that shares a weight with another one, for PipelineModule; the stage is there already."""

    def __init__(self, stage: nn.Module, weight: str):
        super().__init__("stage", nn.Module, tied_weight_attr=weight)
        self.stage = stage

    def build(self, *_: Any, **__: Any) -> nn.Module:
        return self.stage


def join_stages(model: PreTrainedModel, make_stage: MakeStage, loss_of: Callable[..., torch.Tensor]) -> PipelineModule:
    """What deepspeed.initialize takes: this rank's stage of a whole model, connected to the others. All ranks call it.

    loss_of(output of the last stage, labels): the loss of a micro-batch. The model loses its other layers.
    """
    stage, stages = mesh.pipeline_stage(), mesh.pipeline_size()
    whole_shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    tied = _tied_weight(model)
    _keep_stage(model, stage, stages)
    module = make_stage(model, stage == 0, stage == stages - 1)
    layers: list[Any] = [module] * stages  # of which PipelineModule takes this rank's
    if tied is not None:
        [prefix] = [name for name, part in module.named_modules() if part is model]
        layers[0] = layers[-1] = _TiedStage(module, f"{prefix}.{tied}")
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its plan
        joined = PipelineModule(layers, num_stages=stages, loss_fn=loss_of, partition_method="uniform")
    joined.whole_shapes = whole_shapes
    # DeepSpeed 0.19.8 takes all parameters of the last stage for copies of the first one's, and leaves them out of the
    # gradient norm.
    for name, parameter in model.named_parameters():
        parameter.ds_pipe_replicated = stage > 0 and name == tied
    return joined


def is_copy(parameter: nn.Parameter) -> bool:
    """Whether the first stage of the pipeline has this parameter too, tied to this one."""
    return getattr(parameter, "ds_pipe_replicated", False)


def model_of(engine: Any) -> Any:
    """The model that an engine trains; of a pipeline, this rank's stage of it."""
    if not isinstance(engine.module, PipelineModule):
        return engine.module
    return next(module for module in engine.module.modules() if isinstance(module, PreTrainedModel))


def shapes_of_all_stages(engine: Any) -> dict[str, list[int]]:
    """Name -> shape of each parameter of the whole model that a pipeline trains."""
    return dict(engine.module.whole_shapes)


def check_stages(model: Any, stages: int, make_stage: MakeStage) -> Any:
    """The whole model. Raises UserError where it cannot be divided into so many stages.

    It tries whether the stages, one after the other, compute what the whole model does.
    """
    if not isinstance(model, PreTrainedModel) or not _plan(model):
        raise UserError(
            f"pipeline.stages is {stages}, but transformers has no plan by which to divide {type(model).__name__}; "
            "take an architecture such as llama, qwen3 or mistral, or another recipe and ZeRO"
        )
    layers = len(model.base_model.layers)
    if layers < stages:
        raise UserError(f"pipeline.stages is {stages}, but the model has {layers} layers; take fewer stages")
    kept = sorted(dict(model.named_buffers()).keys() & model.state_dict().keys())
    if kept:  # rank 0 writes them into checkpoints, and has those of the first stage only
        raise UserError(
            f"pipeline.stages is {stages}, but {type(model).__name__} has buffers in its state ({kept[0]}), which "
            "checkpoints of pipelines do not hold; take another architecture"
        )
    ids = torch.arange(1, 9)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole, output = model(input_ids=ids, use_cache=False).logits, ids
            for stage in range(stages):
                taken = _keep_stage(model, stage, stages)
                try:
                    output = make_stage(model, stage == 0, stage == stages - 1).eval()(output)
                finally:
                    for parent, name, module in taken:
                        setattr(parent, name, module)
        problem = "" if torch.allclose(output.float(), whole.float(), rtol=1e-3, atol=1e-4) else "other logits"
    except Exception as error:  # each architecture fails in its own way
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    model.train(training)
    if problem:
        raise UserError(
            f"pipeline.stages is {stages}, but the stages of {type(model).__name__} do not compute what the whole model"
            f" does ({problem}); take an architecture such as llama, qwen3 or mistral"
        )
    return model


def _plan(model: PreTrainedModel) -> list[str]:
    """The names of the base model's modules, in the order in which they compute; empty where transformers has none."""
    plan = list(getattr(model.base_model.config, "base_model_pp_plan", None) or {})
    is_there = "layers" in plan and all(isinstance(getattr(model.base_model, name, None), nn.Module) for name in plan)
    return plan if is_there else []


def _tied_weight(model: PreTrainedModel) -> str | None:
    """The name of the weight that the embedding and the output layer share."""
    output, tied = model.get_output_embeddings(), model.get_input_embeddings().weight
    if output is None or output.weight is not tied:
        return None
    return next(name for name, parameter in model.named_parameters() if parameter is tied)


def _keep_stage(model: PreTrainedModel, stage: int, stages: int) -> list[tuple[nn.Module, str, nn.Module]]:
    """Take the modules of other stages out of a whole model. Returns (parent, name, module) of each one.

    The first stage has the embedding, and the last one the final norm and the output layer, and the embedding where the
    output layer is tied to it.
    """
    base, plan, output = model.base_model, _plan(model), model.get_output_embeddings()
    at = plan.index("layers")
    begin, end = len(base.layers) * stage // stages, len(base.layers) * (stage + 1) // stages
    taken = [(base.layers, str(n), layer) for n, layer in enumerate(base.layers) if not begin <= n < end]
    if stage > 0:
        kept = model.get_input_embeddings() if stage == stages - 1 and _tied_weight(model) else None
        taken += [(base, name, getattr(base, name)) for name in plan[:at] if getattr(base, name) is not kept]
    if stage < stages - 1:
        taken += [(base, name, getattr(base, name)) for name in plan[at + 1 :]]
        taken += [(model, name, module) for name, module in model.named_children() if module is output]
    for parent, name, module in taken:
        setattr(parent, name, PassOn(module))
    return taken
