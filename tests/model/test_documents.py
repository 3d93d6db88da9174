"""Attention inside documents: a sequence of several computes what each of them computes alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

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
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]], dtype=torch.int32))
    assert documents.positions.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 0]]
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
