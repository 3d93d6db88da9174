"""What a network does over depth: the paper's figures 8 (where each sublayer reads) and 5 (how large outputs are).

Costs nothing where no observer is given, and an extra pass over the sources for each read where one is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.depth_attention import attention_weights, inverse_rms


class DepthObserver:
    """Give one to `forward_layers` for as many micro-batches as should be averaged; then read the two tables.

    weights: for `{layer}.attention`, `{layer}.mlp` (layers from 0) and `head`, the weight of every source in depth
    order, `[num_sources]`, mean over tokens; they sum to one. magnitudes: per layer, the RMS over channels of the
    partial at its exit (with `standard` that is the residual stream), mean over tokens.
    """

    def __init__(self) -> None:
        self._weights: dict[str, list[Tensor]] = {}
        self._magnitudes: dict[int, list[Tensor]] = {}

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: torch.stack(seen).mean(0) for name, seen in self._weights.items()}

    @property
    def magnitudes(self) -> dict[int, float]:
        return {index: float(torch.stack(seen).mean()) for index, seen in self._magnitudes.items()}

    @torch.no_grad()
    def see_read(self, name: str, sources: Sequence[Tensor], key: Tensor, eps: float) -> None:
        """A read of `sources` under `name`."""
        weights = attention_weights(sources, key, eps).flatten(1).mean(1)
        self._weights.setdefault(name, []).append(weights)

    @torch.no_grad()
    def see_output(self, layer_index: int, partial: Tensor) -> None:
        """The partial at the exit of a layer."""
        self._magnitudes.setdefault(layer_index, []).append(inverse_rms(partial, 0.0).reciprocal().mean())
