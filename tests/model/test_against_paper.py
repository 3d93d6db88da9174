"""Whole networks against the paper's equations, written down sublayer by sublayer with the readable operator."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.depth_attention import reference
from model.language_model import LanguageModel


def make_model(residual: str, layers_per_block: int) -> LanguageModel:
    model = LanguageModel(ModelConfig(31, residual, layers_per_block, 5, 24, 4, 2, 32), seed=4)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("query"):
            parameter.data.normal_(std=0.5, generator=generator)
        if name.endswith("key_gain"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.double()


def forward_by_equations(model: LanguageModel, ids: Tensor, sublayers_per_block: int) -> Tensor:
    """Equations 5 and 6: `b_0` is the embedding; sublayer i of block n reads `[b_0 .. b_{n-1}, b_n^{i-1}]`."""
    embedding, *layers, head = model.layers
    sublayers: list[tuple[torch.nn.Module, Callable[[Tensor], Tensor]]] = []
    for layer in layers:
        sublayers += [(layer.attention_depth, layer.attend), (layer.mlp_depth, layer.transform)]
    blocks, partial = [embedding(ids).partial], None
    for i, (depth, transform) in enumerate(sublayers):
        if i and i % sublayers_per_block == 0:
            blocks, partial = [*blocks, partial], None
        sources = blocks if partial is None else [*blocks, partial]
        output = transform(reference(sources, depth.query, depth.key_gain, depth.eps))
        partial = output if partial is None else partial + output
    hidden = reference([*blocks, partial], head.depth.query, head.depth.key_gain, head.depth.eps)
    return head.norm(hidden) @ head.weight.T


@pytest.mark.parametrize(
    ("residual", "layers_per_block", "sublayers_per_block"),
    [("block", 1, 2), ("block", 2, 4), ("block", 3, 6), ("block", 5, 10), ("block", 9, 18), ("full", 1, 1)],
)
def test_the_network_is_the_papers(residual: str, layers_per_block: int, sublayers_per_block: int) -> None:
    # The last block is short at 2 and 3 layers per block; a block larger than the network is one block.
    model = make_model(residual, layers_per_block)
    ids = torch.randint(31, (2, 11), generator=torch.Generator().manual_seed(2))
    logits = model(ids)
    expected = forward_by_equations(model, ids, sublayers_per_block)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)

    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(logits, parameters.values(), upstream)
    # The equations do not touch what the first read makes of its single source.
    exact = torch.autograd.grad(expected, parameters.values(), upstream, allow_unused=True, materialize_grads=True)
    for name, gradient, truth in zip(parameters, gradients, exact, strict=True):
        torch.testing.assert_close(
            gradient, truth, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
