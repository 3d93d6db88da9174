"""What a transformer layer is made of: Llama's norm and sublayers, with fused projections; and the read over depth."""

import torch
from torch import Tensor, nn

from model.attention import causal_attention
from model.config import ModelConfig
from model.depth_attention import depth_attention, depth_key, inverse_rms
from model.depth_buffer import DepthBuffer
from model.documents import Documents
from model.elementwise import rms_norm, rotate, swiglu


class RMSNorm(nn.Module):
    """`rms_norm` with a learned gain `[hidden]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DepthAttention(nn.Module):
    """One read of the depth buffer: a learned query and a learned gain on the normalised keys, both `[hidden]`.

    name: what diagnostics call this read.
    """

    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__()
        self.name = name
        # Zero queries weigh all sources alike; anything else upsets early training (paper section 5).
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.key_gain = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, buffer: DepthBuffer) -> Tensor:
        """A read of the whole buffer by itself: `[batch, sequence, hidden]`."""
        return depth_attention(buffer.tensors(), self.query, self.key_gain, self.eps, buffer.statistics)

    def key(self) -> Tensor:
        return depth_key(self.query, self.key_gain)

    def statistic(self, source: Tensor) -> Tensor:
        return inverse_rms(source, self.eps)


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions: `[batch, sequence, hidden]` to the same.

    `qkv_proj` holds the rows of Llama's `q_proj`, `k_proj` and `v_proj`, in this order. With `documents`, attention
    stays inside each document and positions restart there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_size = config.head_size
        self.rope_theta = config.rope_theta
        heads = self.num_heads + 2 * self.num_key_value_heads
        self.qkv_proj = nn.Linear(config.hidden_size, heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        batch, sequence, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, sequence, -1, self.head_size).transpose(1, 2)
        rotated, value = qkv.split([self.num_heads + self.num_key_value_heads, self.num_key_value_heads], dim=1)
        rotated = rotate(rotated, self.rope_theta, documents.positions if documents else None)
        query, key = rotated.split([self.num_heads, self.num_key_value_heads], dim=1)
        output = causal_attention(query, key, value, documents)
        attended: Tensor = self.o_proj(output.transpose(1, 2).reshape(batch, sequence, -1))
        return attended


class MLP(nn.Module):
    """SwiGLU: `down_proj(silu(gate) * up)`. `gate_up_proj` holds the rows of Llama's `gate_proj`, then `up_proj`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(swiglu(self.gate_up_proj(x)))
        return output
