"""Attention inside documents: a sequence of several computes what each of them computes alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from model.attention import causal_attention, packed_attention
from model.config import ModelConfig
from model.documents import Documents
from model.language_model import LanguageModel
from model.layers import forward_layers

CONFIG = ModelConfig(
    vocab_size=64,
    layers_per_block=2,
    num_hidden_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)


def test_positions_restart_and_nothing_crosses() -> None:
    documents = Documents(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]], dtype=torch.int32))
    assert documents.positions.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 0]]
    assert documents.bounds.tolist() == [0, 2, 5, 6, 7, 9, 10] and documents.bounds.dtype == torch.int32
    assert documents.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("residual", ["standard", "block", "full"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_each_document_is_computed_as_if_alone(residual: str, checkpoint: bool) -> None:
    model = LanguageModel(dataclasses.replace(CONFIG, residual=residual), seed=3)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("query"):
            parameter.data.normal_(generator=generator)
    lengths = [5, 1, 9, 3]
    ids = torch.randint(64, (2, sum(lengths)), generator=generator)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int().expand(2, -1)
    together = forward_layers(list(model.layers), ids, checkpoint=checkpoint, documents=numbers)
    alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, model(ids), rtol=1e-3)


def test_one_document_is_ordinary_causal_attention() -> None:
    model = LanguageModel(CONFIG, seed=3)
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    whole = forward_layers(list(model.layers), ids, documents=torch.zeros(2, 20, dtype=torch.int32))
    torch.testing.assert_close(whole, model(ids), rtol=1e-5, atol=1e-5)


def some_documents(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Documents]:
    """Query with four heads, key and value with two, `[3, heads, 40, 8]`, over documents of many lengths."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(3, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    ends = torch.rand(3, 40, generator=generator) < 0.15
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (query, key, value)]
    return leaves[0], leaves[1], leaves[2], Documents(ends.int().cumsum(1).to(device))


def test_documents_end_to_end_give_what_the_mask_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for packed documents needs a GPU; here its definition, one document after another, stands for it."""

    def one_after_another(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert window_size == (-1, 0) and enable_gqa and cu_seq_q is cu_seq_k
        lengths = cu_seq_q.diff().tolist()
        assert max(lengths) <= min(max_q, max_k)
        documents = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        parts = [F.scaled_dot_product_attention(*each, is_causal=True, enable_gqa=True) for each in documents]
        return torch.cat(parts, dim=1).transpose(0, 1)

    monkeypatch.setattr("model.attention.varlen_attn", one_after_another)
    query, key, value, documents = some_documents("cpu", torch.float32)
    torch.testing.assert_close(
        packed_attention(query, key, value, documents), causal_attention(query, key, value, documents)
    )


def test_the_kernel_for_packed_documents_takes_what_it_is_given() -> None:
    """Shapes and arguments of the real kernel and its backward, which torch knows without a GPU."""
    with FakeTensorMode():
        query, key = (torch.empty(3, heads, 40, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2))
        documents = Documents(torch.zeros(3, 40, dtype=torch.int32))
        documents.bounds = torch.empty(7, dtype=torch.int32)  # how many there are depends on the numbers
        output = packed_attention(query, key, key, documents)
        assert output.shape == query.shape and output.dtype == torch.bfloat16
        output.sum().backward()
        assert query.grad is not None and query.grad.shape == query.shape
        assert key.grad is not None and key.grad.shape == key.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for packed documents needs a GPU")
def test_on_a_gpu_documents_are_packed_and_give_what_the_mask_gives() -> None:
    found = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        query, key, value, documents = some_documents(device, dtype)
        output = causal_attention(query, key, value, documents)
        assert ("bounds" in vars(documents)) == (device == "cuda")
        output.square().sum().backward()
        found.append([tensor.float().cpu() for tensor in (output.detach(), query.grad, key.grad, value.grad)])
    torch.testing.assert_close(*found, rtol=3e-2, atol=3e-2)
