"""The first invariant: however the layers are cut into stages, loss and every gradient keep their bits."""

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.depth_attention import CHUNK_ELEMENTS
from model.depth_buffer import DepthBuffer
from model.layers import build_layer, forward_layers
from model.loss import cross_entropy

SEED = 7


def small_config(residual: str, **changes: object) -> ModelConfig:
    shape: dict = dict(
        vocab_size=61,
        residual=residual,
        layers_per_block=3,
        num_hidden_layers=7,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
    )
    return ModelConfig(**(shape | changes))


def build_layers(config: ModelConfig, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    layers = [build_layer(config, index, SEED) for index in range(config.num_hidden_layers + 2)]
    generator = torch.Generator().manual_seed(SEED)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if name.endswith("query"):  # zero queries would hide the query's and the gain's path
                parameter.data.normal_(std=0.5, generator=generator)
        layer.to(dtype)
    return layers


def train_in_stages(
    layers: list[nn.Module], cuts: list[int], batches: list[tuple[Tensor, Tensor]], checkpoint: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and parameter gradients with the layers cut before each index of `cuts`, micro-batches accumulating."""
    stages = [layers[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(layers)], strict=True)]
    losses = []
    for ids, labels in batches:
        x, hops = ids, []
        for stage in stages[:-1]:
            output = forward_layers(stage, x, checkpoint)
            received = DepthBuffer.from_tensors([t.detach().clone().requires_grad_() for t in output.tensors()])
            hops.append((output.tensors(), received.tensors()))
            x = received
        loss = cross_entropy(forward_layers(stages[-1], x, checkpoint), labels)
        loss.backward()
        for sent, received in reversed(hops):
            torch.autograd.backward(sent, [tensor.grad.clone() for tensor in received])
        losses.append(loss.detach())
    gradients = {}
    for index, layer in enumerate(layers):
        gradients |= {f"{index}.{name}": parameter.grad for name, parameter in layer.named_parameters()}
        layer.zero_grad()
    return losses, gradients


def make_batches(config: ModelConfig, number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(config.vocab_size, (number, 2, 34), generator=generator)
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


CUTS = [[1], [8], [4], [3], [2, 5], [1, 3, 6, 8], [*range(1, 9)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["standard", "block", "full"])
def test_every_cut_gives_the_same_bits(residual: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 10 * 48)  # 66 tokens: several chunks, the last one short
    config = small_config(residual)
    layers = build_layers(config, dtype)
    batches = make_batches(config, 3)
    losses, gradients = train_in_stages(layers, [], batches)
    dead = [name for name, gradient in gradients.items() if not gradient.any()]
    assert dead == ([] if residual == "standard" else ["1.attention_depth.query", "1.attention_depth.key_gain"])
    for cuts, checkpoint in [*((cuts, False) for cuts in CUTS), ([], True), ([2, 5], True)]:
        cut_losses, cut_gradients = train_in_stages(layers, cuts, batches, checkpoint)
        assert all(torch.equal(a, b) for a, b in zip(losses, cut_losses, strict=True)), (cuts, checkpoint)
        moved = [name for name in gradients if not torch.equal(gradients[name], cut_gradients[name])]
        assert moved == [], (cuts, checkpoint)


@pytest.mark.parametrize("residual", ["standard", "block", "full"])
def test_hops_carry_the_number_of_tensors_that_the_config_states(residual: str) -> None:
    config = small_config(residual)
    x = torch.zeros(1, 5, dtype=torch.int64)
    for index, layer in enumerate(build_layers(config)[:-1]):
        x = forward_layers([layer], x)
        assert len(x.tensors()) == config.num_sources(index)
