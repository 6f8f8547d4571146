"""A decoder's output layer that the ranks of a tensor-parallel group share, each with a part of the vocabulary.

In training each rank has the logits of its part only, and the ranks compute the loss together (Shoeybi et al. 2019,
*Megatron-LM*, section 3). Evaluation and generation get whole logits.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import VocabParallelLinear
from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy

from lib.distributed import mesh

_part: VocabParallelLinear | None = None  # the output layer, where the model's is shared


def share_logits(model: torch.nn.Module) -> None:
    """Take note of a shared output layer, and let it give whole logits in evaluation mode."""
    global _part
    _part = next((module for module in model.modules() if isinstance(module, VocabParallelLinear)), None)
    if _part is not None:
        _part.register_forward_hook(lambda layer, _, logits: logits if layer.training else _whole(layer, logits))


def _whole(layer: Any, logits: torch.Tensor) -> torch.Tensor:
    if logits.shape[-1] != layer.vocab_end_index - layer.vocab_start_index:
        return logits  # they are losses (lib/models/output_layer.py)
    widest = max(layer._partition_sizes)  # all ranks must give tensors of one size
    padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in layer._partition_sizes]
    dist.all_gather(parts, padded, group=mesh.tensor_group())
    return torch.cat([part[..., :size] for part, size in zip(parts, layer._partition_sizes, strict=True)], -1)


def width(layer: Any) -> int:
    """How many tokens of the vocabulary an output layer has; of one that is shared, the most that a rank has, which is
    the same number on every rank."""
    return max(getattr(layer, "_partition_sizes", None) or [getattr(layer, "out_features", 0) or len(layer.weight)])


def is_part(logits: torch.Tensor) -> bool:
    """Whether these are the logits of this rank's part of the vocabulary."""
    return _part is not None and logits.shape[-1] < _part.vocab_size


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """The cross entropy of each label in nats, [rows, length], the same on each rank; 0 where the label is `ignored`.

    logits: [rows, length, this rank's part of the vocabulary]. labels: [rows, length], of the whole vocabulary.
    """
    assert _part is not None
    return vocab_parallel_cross_entropy(
        logits, labels, tp_group=mesh.tensor_group(), ignore_index=ignored, reduction="none",
        vocab_start_index=_part.vocab_start_index, vocab_end_index=_part.vocab_end_index,
        global_vocab_size=_part.vocab_size,
    )  # fmt: skip
