"""Pre-trained weights in the type that their files have, so that they need no memory of their own.

transformers maps a safetensors file into memory, and makes a copy of each tensor only to change its type. Left in the
stored type, most often bf16, a model is a view of its files: the system reads what is used, keeps it once for all ranks
of a machine, and can take it back at any time.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as of_all_modules
from transformers import core_model_loading

HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def weights_as_stored() -> Iterator[None]:
    """Let from_pretrained leave weights in 16 bits as they are in their files; what it initializes is as it would be.

    Meanwhile a module computes in fp32 all the same, with copies of its own weights for the time of its forward pass:
    checks of a model see what they would see of one in fp32.
    """
    materialize = core_model_loading._materialize_copy
    stored: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}  # of the modules that are computing

    def leave(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        found: torch.Tensor = tensor[...]
        return found if found.dtype in HALF else materialize(found, device, dtype)

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        stored[module] = [(parameter, parameter.data) for parameter in own if parameter.dtype in HALF]
        for parameter, data in stored[module]:
            parameter.data = data.float()
        return tuple(value.float() if _is_half(value) else value for value in inputs) if stored[module] else None

    def put_back(module: nn.Module, *_: Any) -> None:
        for parameter, data in stored.pop(module, []):
            parameter.data = data

    hooks = [
        of_all_modules.register_module_forward_pre_hook(widen),  # type: ignore[arg-type]  # it may return inputs
        of_all_modules.register_module_forward_hook(put_back),
    ]
    core_model_loading._materialize_copy = leave
    try:
        yield
    finally:
        core_model_loading._materialize_copy = materialize
        for hook in hooks:
            hook.remove()
        for module in reversed(list(stored)):  # whose forward pass has failed
            put_back(module)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def widen_buffers(model: nn.Module) -> None:
    """Bring the buffers that were read from files to fp32, as from_pretrained would have."""
    for buffer in model.buffers():
        if buffer.dtype in HALF:
            buffer.data = buffer.float()


@contextlib.contextmanager
def seen_as_fp32(model: nn.Module) -> Iterator[None]:
    """Let the weights of a model have type fp32 and no values, for what goes by their shapes and types alone."""
    stored = {parameter: parameter.data for parameter in model.parameters()}
    for parameter, data in stored.items():
        parameter.data = torch.zeros(()).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in stored.items():
            parameter.data = data
