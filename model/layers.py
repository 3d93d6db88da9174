"""The model as a list of layers, each a function of the depth buffer.

Index 0 is the embedding, 1 to `num_hidden_layers` the transformer layers, the last the output head. No layer knows
which others are on its machine; `forward_layers` runs any consecutive ones.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.depth_attention import depth_attention
from model.depth_buffer import DepthBuffer
from model.sublayers import MLP, RMSNorm, SelfAttention


class Embedding(nn.Module):
    """Token ids `[batch, sequence]` (int64) to a depth buffer whose partial is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, ids: Tensor) -> DepthBuffer:
        return DepthBuffer((), F.embedding(ids, self.weight))


class DepthAttention(nn.Module):
    """One read of the depth buffer: a learned query and a learned gain on the normalised keys, both `[hidden]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Zero queries weigh all sources alike; anything else upsets early training (paper section 5).
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.key_gain = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        return depth_attention(sources, self.query, self.key_gain, self.eps)


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
        sources, partial = buffer.sources, buffer.partial
        if self.residual == "standard":
            partial = partial + self.attend(partial)
            return DepthBuffer((), partial + self.transform(partial))

        attended = self.attend(self.attention_depth(buffer.tensors()))
        if self.is_block_start:
            sources, partial = (*sources, partial), attended
        else:
            partial = partial + attended
        transformed = self.transform(self.mlp_depth((*sources, partial)))
        if self.residual == "full":
            return DepthBuffer((*sources, partial), transformed)
        return DepthBuffer(sources, partial + transformed)

    def attend(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.self_attn(self.input_layernorm(hidden))
        return output

    def transform(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return output


class OutputHead(nn.Module):
    """Depth buffer to logits `[batch, sequence, vocab]`: one more read of the depth buffer, final norm, projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config)
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.depth = DepthAttention(config) if config.residual != "standard" else None

    def forward(self, buffer: DepthBuffer) -> Tensor:
        hidden = buffer.partial if self.depth is None else self.depth(buffer.tensors())
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


def forward_layers(layers: Sequence[nn.Module], x: Any) -> Any:
    """Run consecutive layers on `x`: token ids, or the depth buffer at the first one's entrance.

    Returns what the last one returns. Result and gradients are the same to the last bit however a model's layers are
    cut into calls, if each call is differentiated by one joint `torch.autograd.backward` over its output tensors.
    """
    for layer in layers:
        x = layer(x)
    return x


def no_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether the optimizer must not decay this parameter: norms' gains, depth queries and key gains."""
    return parameter.ndim < 2


def _generator_seed(seed: int, index: int) -> int:
    # torch's CPU generator takes 32 bits of its seed and no more: a sum of seed and index would collide.
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4])
