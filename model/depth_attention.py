"""Depth attention: every token attends over the sources that the network has produced so far (arXiv:2603.15031)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def reference(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor, eps: float) -> Tensor:
    """`depth_attention` in its most readable form: what the fast operators are held to.

    Paper equations 1 to 4 (and 5, 6, where the sources are blocks): the logit of a source is
    `query . (key_gain * RMSNorm(source))` with no scale; the values are the raw sources. Computes in fp32 or wider.
    """
    wide = torch.promote_types(sources[0].dtype, torch.float32)
    values = torch.stack([source.to(wide) for source in sources])
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    weights = (keys @ (query.to(wide) * key_gain.to(wide))).softmax(0)
    return (weights.unsqueeze(-1) * values).sum(0).to(sources[0].dtype)


def depth_attention(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor, eps: float) -> Tensor:
    """Softmax over sources of `query . (key_gain * RMSNorm(source))`, then the weighted sum of the raw sources.

    sources: one or more tensors `[..., hidden]` of one shape and dtype. query, key_gain: `[hidden]`.
    Returns `[..., hidden]` in the dtype of the sources; statistics, softmax and sums are fp32 whatever that is.
    """
    return reference(sources, query, key_gain, eps)
