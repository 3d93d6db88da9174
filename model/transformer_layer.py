"""The transformer layer, and how the layers of one block share their reads of the depth buffer."""

from collections.abc import Sequence

from torch import Tensor, nn

from model.config import ModelConfig
from model.depth_attention import merge_partial, read_finished
from model.depth_buffer import DepthBuffer
from model.sublayers import MLP, DepthAttention, RMSNorm, SelfAttention


class TransformerLayer(nn.Module):
    """Self-attention and MLP, each behind a norm, and behind a read of the depth buffer unless `standard`."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.residual = config.residual
        self.is_block_start = config.is_block_start(layer_index)
        self.input_layernorm = RMSNorm(config)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        if config.residual != "standard":
            self.attention_depth = DepthAttention(config)
            self.mlp_depth = DepthAttention(config)

    def forward(self, buffer: DepthBuffer) -> DepthBuffer:
        return forward_block([self], buffer)

    def attend(self, hidden: Tensor) -> Tensor:
        """The attention sublayer without its residual: `[batch, sequence, hidden]` to the same."""
        output: Tensor = self.self_attn(self.input_layernorm(hidden))
        return output

    def transform(self, hidden: Tensor) -> Tensor:
        """The MLP sublayer without its residual: `[batch, sequence, hidden]` to the same."""
        output: Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return output


def forward_block(layers: Sequence[TransformerLayer], buffer: DepthBuffer) -> DepthBuffer:
    """Run consecutive layers, of which only the first may start a block; with `full`, one layer.

    The finished sources do not change inside a block, so one pass over them serves the queries of all its sublayers
    (phase one of the paper's section 4.2), and each sublayer merges the partial with its share (phase two). With `full`
    the two reads of a layer share a pass, and the second one merges what the attention gave.
    """
    first = layers[0]
    if first.residual == "standard":
        return _forward_standard(layers, buffer)

    sources, statistics = finished_sources(first, buffer)
    partial = None if first.is_block_start else buffer.partial
    keys = [depth.key() for layer in layers for depth in (layer.attention_depth, layer.mlp_depth)]
    reads, sources = read_finished(sources, statistics, keys)
    pending = zip(reads, keys, strict=True)
    for layer in layers:
        (mean, scalars), key = next(pending)
        if partial is None:
            partial = layer.attend(mean.to(sources[0].dtype))
        else:
            hidden, partial = merge_partial(mean, scalars, partial, layer.attention_depth.statistic(partial), key)
            partial = partial + layer.attend(hidden)
        (mean, scalars), key = next(pending)
        statistic = layer.mlp_depth.statistic(partial)
        hidden, partial = merge_partial(mean, scalars, partial, statistic, key)
        transformed = layer.transform(hidden)
        if layer.residual == "full":
            return DepthBuffer((*sources, partial), transformed, (*statistics, statistic))
        partial = partial + transformed
    assert partial is not None, "a block has at least one layer"
    return DepthBuffer(sources, partial, statistics)


def finished_sources(layer: TransformerLayer, buffer: DepthBuffer) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The sources that `layer` and the others of its block find finished, and the inverse RMS of each."""
    sources = buffer.tensors() if layer.is_block_start else buffer.sources
    unknown = sources[len(buffer.statistics) :]
    return sources, (*buffer.statistics, *(layer.attention_depth.statistic(source) for source in unknown))


def _forward_standard(layers: Sequence[TransformerLayer], buffer: DepthBuffer) -> DepthBuffer:
    hidden = buffer.partial
    for layer in layers:
        hidden = hidden + layer.attend(hidden)
        hidden = hidden + layer.transform(hidden)
    return DepthBuffer((), hidden)
