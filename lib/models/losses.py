"""The loss of each token."""

import torch
import torch.nn.functional as F

from lib.data.batches import IGNORED
from lib.distributed import vocabulary


def token_losses(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """The cross entropy of each label in nats, [rows, length]; 0 where the label is IGNORED.

    logits: [rows, length, vocab_size]; where a tensor-parallel group shares the vocabulary, this rank's part of it.
    labels: [rows, length].
    """
    if vocabulary.is_part(logits):
        assert not label_smoothing, "the models that a group shares so are trained without"
        return vocabulary.cross_entropy(logits, labels, IGNORED)
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    return losses.view_as(labels)
