"""Causal attention over the tokens of a sequence, or of each document in it."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from model.documents import Documents

PACKED_HEAD_SIZE = 256  # the largest that the kernel for packed documents takes, in steps of 8


def causal_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None = None) -> Tensor:
    """`[batch, heads, sequence, head_size]`, fewer key and value heads than query heads if they divide them.

    With `documents`, each token attends to its own document alone: on a GPU document by document, with no work for what
    is masked, and elsewhere through a mask.
    """
    grouped = query.shape[1] != key.shape[1]
    if documents is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    if _can_pack(query):
        return packed_attention(query, key, value, documents)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=documents.mask, enable_gqa=grouped)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """`causal_attention` inside documents that are laid end to end; fp16 and bf16 on CUDA."""
    batch, _, sequence, _ = query.shape
    # The longest document takes a wait to know; the sequence bounds it, and the kernel only sizes its launch by it.
    output = varlen_attn(
        *_end_to_end(query, key, value),
        cu_seq_q=documents.bounds,
        cu_seq_k=documents.bounds,
        max_q=sequence,
        max_k=sequence,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    unpacked: Tensor = output.unflatten(0, (batch, sequence))
    return unpacked.transpose(1, 2)


def _end_to_end(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each as `[batch x sequence, heads, head_size]`."""
    first, second, third = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    return first, second, third


def _can_pack(query: Tensor) -> bool:
    head_size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_size <= PACKED_HEAD_SIZE
        and head_size % 8 == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
