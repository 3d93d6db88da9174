"""What an observer reports, against the reads' own arithmetic."""

import pytest
import torch

from model.config import ModelConfig
from model.diagnostics import DepthObserver
from model.layers import build_layer, forward_layers

CONFIG = ModelConfig(31, "block", 2, 5, 24, 4, 2, 32)


def random_layers(config: ModelConfig) -> list[torch.nn.Module]:
    layers = [build_layer(config, index, seed=2) for index in range(7)]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if name.endswith("query"):
                parameter.data.normal_(generator=generator)
    return layers


@pytest.mark.parametrize("checkpoint", [False, True])
def test_weights_are_those_of_the_reads(checkpoint: bool) -> None:
    layers = random_layers(CONFIG)
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    observer = DepthObserver()
    logits = forward_layers(layers, ids, checkpoint, observer)
    assert torch.equal(logits, forward_layers(layers, ids))
    logits.sum().backward()  # a second run of the layers is not seen a second time
    weights = observer.weights
    sizes = [1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    assert [len(weight) for weight in weights.values()] == sizes
    assert list(weights) == [f"{i}.{name}" for i in range(5) for name in ("attention", "mlp")] + ["head"]
    assert all(weight.sum().item() == pytest.approx(1, abs=1e-6) for weight in weights.values())

    # The head's, from the buffer itself.
    buffer = forward_layers(layers[:-1], ids)
    head = layers[-1]
    keys = [source / (source.square().mean(-1, keepdim=True) + 1e-5).sqrt() for source in buffer.tensors()]
    expected = torch.stack([key @ (head.depth.query * head.depth.key_gain) for key in keys]).softmax(0).mean((1, 2))
    torch.testing.assert_close(weights["head"], expected)


@pytest.mark.parametrize("residual", ["standard", "block", "full"])
def test_magnitudes_are_the_rms_at_each_exit_averaged_over_micro_batches(residual: str) -> None:
    config = ModelConfig(31, residual, 2, 5, 24, 4, 2, 32)
    layers = random_layers(config)
    batches = torch.randint(31, (2, 2, 9), generator=torch.Generator().manual_seed(0))
    observer = DepthObserver()
    for ids in batches:
        forward_layers(layers, ids, observer=observer)
    assert list(observer.magnitudes) == list(range(5))
    for index in range(5):
        exits = torch.cat([forward_layers(layers[: index + 2], ids).partial for ids in batches])
        expected = exits.square().mean(-1).sqrt().mean().item()
        assert observer.magnitudes[index] == pytest.approx(expected, rel=1e-5)
