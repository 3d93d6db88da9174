"""The transformer layer, and how the layers of one block share their reads of the depth buffer."""

from collections.abc import Sequence

from torch import Tensor, nn

from model.config import ModelConfig
from model.depth_attention import merge_partial, read_finished
from model.depth_buffer import DepthBuffer
from model.diagnostics import DepthObserver
from model.documents import Documents
from model.sublayers import MLP, DepthAttention, RMSNorm, SelfAttention


class TransformerLayer(nn.Module):
    """Self-attention and MLP, each behind a norm, and behind a read of the depth buffer unless `standard`."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.index = layer_index
        self.residual = config.residual
        self.is_block_start = config.is_block_start(layer_index)
        self.input_layernorm = RMSNorm(config)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        if config.residual != "standard":
            self.attention_depth = DepthAttention(config, f"{layer_index}.attention")
            self.mlp_depth = DepthAttention(config, f"{layer_index}.mlp")

    def forward(self, buffer: DepthBuffer) -> DepthBuffer:
        return forward_block([self], buffer)

    def attend(self, hidden: Tensor, documents: Documents | None = None) -> Tensor:
        """The attention sublayer without its residual: `[batch, sequence, hidden]` to the same."""
        output: Tensor = self.self_attn(self.input_layernorm(hidden), documents)
        return output

    def transform(self, hidden: Tensor) -> Tensor:
        """The MLP sublayer without its residual: `[batch, sequence, hidden]` to the same."""
        output: Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return output


def forward_block(
    layers: Sequence[TransformerLayer],
    buffer: DepthBuffer,
    observer: DepthObserver | None = None,
    documents: Documents | None = None,
) -> DepthBuffer:
    """Run consecutive layers, of which only the first may start a block; with `full`, one layer.

    The finished sources do not change inside a block, so one pass over them serves the queries of all its sublayers
    (phase one of the paper's section 4.2), and each sublayer merges the partial with its share (phase two). With `full`
    the two reads of a layer share a pass, and the second one merges what the attention gave.
    """
    if layers[0].residual == "standard":
        return _forward_standard(layers, buffer, observer, documents)

    block = _Block(layers, buffer, observer)
    for layer in layers:
        block.add(layer.attend(block.read(), documents))
        hidden = block.read()
        if layer.residual == "full":
            block.commit_partial()
        block.add(layer.transform(hidden))
        if observer is not None:
            observer.see_output(layer.index, block.buffer().partial)
    return block.buffer()


def finished_sources(layer: TransformerLayer, buffer: DepthBuffer) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The sources that `layer` and the others of its block find finished, and the inverse RMS of each."""
    sources = buffer.tensors() if layer.is_block_start else buffer.sources
    unknown = sources[len(buffer.statistics) :]
    return sources, (*buffer.statistics, *(layer.attention_depth.statistic(source) for source in unknown))


class _Block:
    """A block, or the part of one that is at hand, under way. On creation the finished sources are read for all."""

    def __init__(self, layers: Sequence[TransformerLayer], buffer: DepthBuffer, observer: DepthObserver | None) -> None:
        sources, self.statistics = finished_sources(layers[0], buffer)
        self.partial = None if layers[0].is_block_start else buffer.partial
        depths = [depth for layer in layers for depth in (layer.attention_depth, layer.mlp_depth)]
        keys = [depth.key() for depth in depths]
        reads, self.sources = read_finished(sources, self.statistics, keys)
        # Taken from the end and forgotten: a finished read that was merged has no other use.
        self.pending = [*zip(depths, keys, reads, strict=True)][::-1]
        self.observer = observer

    def read(self) -> Tensor:
        """What the next sublayer works on: its share of the finished sources, merged with the partial."""
        depth, key, (mean, scalars) = self.pending.pop()
        if self.observer is not None:
            sources = self.sources if self.partial is None else (*self.sources, self.partial)
            self.observer.see_read(depth.name, sources, key, depth.eps)
        if self.partial is None:
            return mean.to(self.sources[0].dtype)
        self.partial_statistic = depth.statistic(self.partial)
        hidden, self.partial = merge_partial(mean, scalars, self.partial, self.partial_statistic, key)
        return hidden

    def add(self, output: Tensor) -> None:
        self.partial = output if self.partial is None else self.partial + output

    def commit_partial(self) -> None:
        """Make the partial, which was just read, a finished source."""
        assert self.partial is not None
        self.sources, self.partial = (*self.sources, self.partial), None
        self.statistics = (*self.statistics, self.partial_statistic)

    def buffer(self) -> DepthBuffer:
        assert self.partial is not None
        return DepthBuffer(self.sources, self.partial, self.statistics)


def _forward_standard(
    layers: Sequence[TransformerLayer],
    buffer: DepthBuffer,
    observer: DepthObserver | None,
    documents: Documents | None,
) -> DepthBuffer:
    hidden = buffer.partial
    for layer in layers:
        hidden = hidden + layer.attend(hidden, documents)
        hidden = hidden + layer.transform(hidden)
        if observer is not None:
            observer.see_output(layer.index, hidden)
    return DepthBuffer((), hidden)
