"""The layer's elementwise operators: plain torch, computed chunk by chunk in cache, recomputed in backward.

Each saves its input and no intermediate. On CPU that is also what makes them fast: most of the time of the usual chains
of small operators goes into memory for their results.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.depth_attention import chunks, inverse_rms, row_scratch


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * gain` over the last dimension (arXiv:1910.07467), in fp32, in the dtype of `x`.

    x: `[..., hidden]`, gain: `[hidden]`.
    """
    output: Tensor = _RMSNorm.apply(x, gain, eps)
    return output


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` (arXiv:2002.05202) where `gate_up` `[..., 2 * size]` holds the gate, then up: `[..., size]`."""
    output: Tensor = _SwiGLU.apply(gate_up)
    return output


def rotate(x: Tensor, theta: float, positions: Tensor | None = None) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv:2104.09864, equation 34) of `[batch, heads, sequence, head_size]`.

    Channel `i` turns with channel `i + head_size / 2` by the angle `position * theta^(-2 i / head_size)`, as in Llama's
    and Hugging Face's layout. Computes in fp32 or wider, returns the dtype of `x`. Positions count from 0, or are given
    as int64 `[batch, sequence]`, each below `sequence`.
    """
    cos, sin = _rotary_tables(x.shape[-2], x.shape[-1], theta, x.device)
    if positions is not None:
        cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    output: Tensor = _Rotate.apply(x, cos, sin)
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps)
        rows = x.reshape(-1, x.shape[-1])
        output = torch.empty_like(rows)
        scratch = row_scratch(rows, inverse.dtype)
        for part in chunks(rows):
            normal = torch.mul(rows[part], inverse[part].unsqueeze(-1), out=scratch[: len(rows[part])])
            torch.mul(normal, gain, out=output[part])
        ctx.save_for_backward(x, gain, inverse)
        return output.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, inverse = ctx.saved_tensors
        rows, gradient_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
        wide_gain = gain.to(inverse.dtype)
        gain_gradient = torch.zeros_like(wide_gain)
        row_gradient = torch.empty_like(rows)
        scratch = row_scratch(rows, inverse.dtype)
        for part in chunks(rows):
            value, upstream, norm = rows[part], gradient_rows[part], inverse[part]
            product = torch.mul(value.to(norm.dtype), upstream, out=scratch[: len(value)])
            gain_gradient.addmv_(product.T, norm)
            pull = (product @ wide_gain).mul_(norm.square()).div_(-len(gain))
            total = torch.mul(upstream, wide_gain, out=product).addcmul_(value, pull.unsqueeze(-1))
            torch.mul(total, norm.unsqueeze(-1), out=row_gradient[part])
        return row_gradient.view(x.shape), gain_gradient.to(gain.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        size = rows.shape[1] // 2
        output = rows.new_empty(len(rows), size)
        for part in chunks(rows):
            torch.ops.aten.silu.out(rows[part, :size], out=output[part]).mul_(rows[part, size:])
        ctx.save_for_backward(gate_up)
        return output.view(*gate_up.shape[:-1], size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows, gradient_rows = gate_up.reshape(-1, gate_up.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        size = rows.shape[1] // 2
        row_gradient = torch.empty_like(rows)
        scratch = row_scratch(gradient_rows, rows.dtype)
        for part in chunks(rows):
            gate, up, upstream = rows[part, :size], rows[part, size:], gradient_rows[part]
            torch.ops.aten.silu.out(gate, out=row_gradient[part, size:]).mul_(upstream)
            behind_silu = torch.mul(upstream, up, out=scratch[: len(up)])
            torch.ops.aten.silu_backward.grad_input(behind_silu, gate, grad_input=row_gradient[part, :size])
        return row_gradient.view(gate_up.shape)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # As attributes, because tables that inference mode made and cached cannot be saved for backward.
        ctx.cos, ctx.sin = cos, sin
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _turn(gradient, ctx.cos, -ctx.sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    output = first.new_empty(x.shape)
    turned_first, turned_second = output.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin.to(first.dtype), value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin.to(first.dtype))
    return output.to(x.dtype)


@lru_cache(maxsize=8)
def _rotary_tables(sequence: int, head_size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles: `[sequence, head_size / 2]`, fp32."""
    exponents = torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    angles = torch.outer(torch.arange(sequence, device=device, dtype=torch.float32), theta**-exponents)
    return angles.cos(), angles.sin()
