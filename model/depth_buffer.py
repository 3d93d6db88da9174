"""The contract between layers, and between the model and whatever moves its activations."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DepthBuffer:
    """All sources alive at a point of the network, each `[batch, sequence, hidden]`.

    sources: the finished ones in depth order (embedding, then blocks; with `full`, sublayer outputs).
    partial: the running sum of the block under way; the residual stream where the residual is `standard`.
    statistics: the inverse RMS of the first sources, as far as known. A shortcut for the next reader on the same
    machine: it can be had from the sources, so it is no part of `tensors()`.
    """

    sources: tuple[Tensor, ...]
    partial: Tensor
    statistics: tuple[Tensor, ...] = ()

    def tensors(self) -> tuple[Tensor, ...]:
        """The buffer as a flat tuple, in depth order, the partial last."""
        return (*self.sources, self.partial)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "DepthBuffer":
        """The inverse of `tensors()`; at least the partial must be there."""
        *sources, partial = tensors
        return cls(tuple(sources), partial)
