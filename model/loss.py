"""The training loss."""

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all tokens of the negative log-likelihood, in nats: an fp32 scalar whatever the logits' dtype.

    logits: `[batch, sequence, vocab]`. labels: `[batch, sequence]`, int64.
    """
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
