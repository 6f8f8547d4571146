"""Repairs of DeepSpeed 0.19.8: stage 0 acts as stages 1 to 3 do, and a loss that is not finite changes no weight."""

import functools
import math
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

from lib.distributed import mesh, vocabulary
from lib.distributed.pipeline import is_copy, model_of
from lib.distributed.zero_state import layout
from lib.errors import UserError


def repair_stage0(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make stage 0 a baseline to compare with (DeepSpeed 0.19.8); the other stages are left as they are.

    bf16 and fp16: the wrapper makes the optimizer's states by a step with zero gradients, which leaves Adam one step
    ahead and may decay the master weights. The states are dropped, for Adam to make them at the first real step, and
    the weights copied anew.
    fp16: the loss is not scaled, though gradients are divided by the scale, and the scale falls by another rule; see
    _scale_as_other_stages.
    fp32: DeepSpeed computes the gradient norm in order to clip, throws it away, and steps even where it is not finite.
    As at the other stages, the norm is kept and such a step is not taken.
    """
    if engine.zero_optimization():
        return
    optimizer = engine.optimizer
    if engine.fp16_enabled() or engine.bfloat16_enabled():
        optimizer.optimizer.state.clear()
        with torch.no_grad():
            for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
                for master, parameter in zip(masters, parameters, strict=True):
                    master.copy_(parameter)
        if engine.fp16_enabled():
            _scale_as_other_stages(engine)
        return
    step = optimizer.step

    @functools.wraps(step)  # by which the learning-rate schedule recognises it
    def clip_and_step() -> None:
        optimizer._global_grad_norm = clip_gradients(
            list(model_of(engine).parameters()), engine.gradient_clipping() or math.inf
        )
        optimizer.overflow = not math.isfinite(optimizer._global_grad_norm)
        if not optimizer.overflow:
            step()

    engine.clip_fp32_gradients = lambda: None
    optimizer.step = clip_and_step


def repair_tensor_parallel(engine: deepspeed.DeepSpeedEngine, batch_size: int) -> None:
    """Check what a tensor-parallel group shares, before anything is trained; nothing to do without one.

    DeepSpeed 0.19.8 counts the rows of a step once for each rank, and compares the inputs of the first forward pass
    between the ranks of a group, which fails on a dict of tensors; here the rows are the same by construction.
    """
    if mesh.tensor_size() == 1:
        return
    if all(layout(parameter) is None for parameter in engine.module.parameters()):
        raise UserError("tensor_parallel is in the DeepSpeed JSON, but it shares nothing of this model; leave it out")
    vocabulary.share_logits(engine.module)
    engine._config.train_batch_size = batch_size
    engine.first_dataloader_check.remove()


def clip_gradients(parameters: list[torch.nn.Parameter], highest: float) -> torch.Tensor:
    """Scale the gradients so that the norm of the whole model's is at most `highest`. Returns the norm before.

    Of a parameter that a tensor-parallel group shares, each rank has a part of the gradient; the ranks of a pipeline
    have other parameters each, but for copies. Large gradients are summed in pieces: in one piece and fp32, the norm of
    a large embedding's is off by 1e-5.
    """
    pieces: list[list[torch.Tensor]] = [[], []]  # of whole gradients, of parts
    for parameter in parameters:
        if parameter.grad is not None and not is_copy(parameter):
            is_part = mesh.pipeline_size() > 1 or getattr(parameter, "tensor_model_parallel", False)
            pieces[int(is_part)] += torch.split(parameter.grad.detach().flatten(), 2**20)
    squares = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
    for kind, gradients in enumerate(pieces):
        if gradients:
            squares[kind] = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    if mesh.tensor_size() > 1 or mesh.pipeline_size() > 1:
        group = mesh.tensor_group() if mesh.tensor_size() > 1 else mesh.pipeline_group()
        torch.distributed.all_reduce(squares[1:], group=group)
    norm = squares.sum().sqrt().float()
    torch.nn.utils.clip_grads_with_norm_(parameters, highest, norm)
    return norm


def _scale_as_other_stages(engine: deepspeed.DeepSpeedEngine) -> None:
    """Stage 0 in fp16 (DeepSpeed 0.19.8): scale the loss, report the norm without the scale, and change the scale by
    the other stages' rule.

    engine.backward scales the loss for ZeRO's optimizers alone, but the wrapper of stage 0 divides by the scale as
    well, so that gradients are too small by it: none is clipped, and Adam's epsilon outweighs them. Its norm has the
    scale in it. And it halves the scale at the first gradient that overflows, where the others do so at the second (the
    JSON's fp16.hysteresis says at which).
    """
    optimizer, backward, step = engine.optimizer, engine.backward, engine.optimizer.step
    if engine.dynamic_loss_scale():
        scaler = CreateLossScaler(torch.float16, None, True, engine.dynamic_loss_scale_args())
        scaler.use_grad_scaling = scaler.dynamic_loss_scale = True  # which the wrapper asks of its own
        optimizer.loss_scale_config, optimizer._update_scale = scaler, scaler.update_scale

    def scale_and_backward(loss: torch.Tensor, **options: Any) -> torch.Tensor:
        return backward(loss.float() * optimizer.loss_scale, **options) / optimizer.loss_scale

    def step_and_unscale_norm(*arguments: Any, **options: Any) -> Any:
        scale = optimizer.loss_scale  # the step may change it
        result = step(*arguments, **options)
        optimizer._global_grad_norm /= scale
        return result

    engine.backward, optimizer.step = scale_and_backward, step_and_unscale_norm


def veto_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, or NaN with NaN gradients where it is not finite, so that DeepSpeed does not take the step.

    A loss can be infinite while its gradients are not, and DeepSpeed looks at the gradients only. Nothing is read from
    the device.
    """
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)
