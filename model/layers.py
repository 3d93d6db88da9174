"""The model as a list of layers, each a function of the depth buffer.

Index 0 is the embedding, 1 to `num_hidden_layers` the transformer layers, the last the output head. No layer knows
which others are on its machine; `forward_layers` runs any consecutive ones.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from model.config import ModelConfig
from model.depth_buffer import DepthBuffer
from model.diagnostics import DepthObserver
from model.documents import Documents
from model.sublayers import DepthAttention, RMSNorm
from model.transformer_layer import TransformerLayer, finished_sources, forward_block


class Embedding(nn.Module):
    """Token ids `[batch, sequence]` (int64) to a depth buffer whose partial is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, ids: Tensor) -> DepthBuffer:
        return DepthBuffer((), F.embedding(ids, self.weight))


class OutputHead(nn.Module):
    """Depth buffer to logits `[batch, sequence, vocab]`: one more read of the depth buffer, final norm, projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config)
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.depth = DepthAttention(config, "head") if config.residual != "standard" else None

    def forward(self, buffer: DepthBuffer, observer: DepthObserver | None = None) -> Tensor:
        if observer is not None and self.depth is not None:
            observer.see_read("head", buffer.tensors(), self.depth.key(), self.depth.eps)
        hidden = buffer.partial if self.depth is None else self.depth(buffer)
        return F.linear(self.norm(hidden), self.weight)


def build_layer(config: ModelConfig, index: int, seed: int) -> nn.Module:
    """Layer `index` of the model, initialised from `(config, index, seed)` alone.

    So every split of the layers over processes builds the same model. With `tie_word_embeddings` the head's weight
    equals the embedding's at the start; whoever holds both ties them.
    """
    if not 0 <= index <= config.num_hidden_layers + 1:
        raise ValueError(f"index: {index} is not between 0 and {config.num_hidden_layers + 1}")
    if index == 0:
        layer: nn.Module = Embedding(config)
    elif index <= config.num_hidden_layers:
        layer = TransformerLayer(config, index - 1)
    else:
        layer = OutputHead(config)
        index = 0 if config.tie_word_embeddings else index
    generator = torch.Generator().manual_seed(_generator_seed(seed, index))
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
    return layer


def forward_layers(
    layers: Sequence[nn.Module],
    x: Any,
    checkpoint: bool = False,
    observer: DepthObserver | None = None,
    documents: Tensor | None = None,
) -> Any:
    """Run consecutive layers on `x`: token ids, or the depth buffer at the first one's entrance.

    Returns what the last one returns. Result and gradients are the same to the last bit however a model's layers are
    cut into calls, if each call is differentiated by one joint `torch.autograd.backward` over its output tensors.

    checkpoint: keep, of every transformer layer, only the partial at its entrance, and run the layer again in the
    backward pass. The finished sources are kept once, as without. Same bits; layers of a block then no longer share a
    read of the finished sources. observer: collects attention weights and magnitudes of this call. documents: the
    number of each token's document, int `[batch, sequence]`; attention then stays inside documents and positions
    restart in each.
    """
    inside = Documents(documents) if documents is not None else None
    for group in _groups(layers, checkpoint):
        if isinstance(group[0], Embedding):
            x = group[0](x)
        elif isinstance(group[0], OutputHead):
            x = group[0](x, observer)
        elif checkpoint:
            x = _forward_checkpointed(group[0], x, observer, inside)
        else:
            x = forward_block(group, x, observer, inside)
    return x


def no_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether the optimizer must not decay this parameter: norms' gains, depth queries and key gains."""
    return parameter.ndim < 2


def _groups(layers: Sequence[nn.Module], checkpoint: bool) -> Iterator[list[Any]]:
    """The layers in runs that share one read of the finished sources: those of one block, else single ones."""
    group: list[nn.Module] = []
    for layer in layers:
        shares = isinstance(layer, TransformerLayer) and not layer.is_block_start and not checkpoint
        if group and not (shares and isinstance(group[-1], TransformerLayer)):
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def _forward_checkpointed(
    layer: TransformerLayer, buffer: DepthBuffer, observer: DepthObserver | None, documents: Documents | None
) -> DepthBuffer:
    # Statistics are computed out here, once: inside, every layer's second run would compute them again.
    statistics = buffer.statistics if layer.residual == "standard" else finished_sources(layer, buffer)[1]
    observers = [observer]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        first_run_only = observers.pop() if observers else None
        entering = DepthBuffer(tensors[:-1], tensors[-1], statistics)
        return forward_block([layer], entering, first_run_only, documents).tensors()

    tensors = recompute_in_backward(run, *buffer.tensors(), use_reentrant=False, preserve_rng_state=False)
    return DepthBuffer(tensors[:-1], tensors[-1], statistics)


def _generator_seed(seed: int, index: int) -> int:
    # torch's CPU generator takes 32 bits of its seed and no more: a sum of seed and index would collide.
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4])
