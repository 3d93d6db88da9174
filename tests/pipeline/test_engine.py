"""The pipeline computes the model: bit for bit, at every cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.pipeline.engine_cases import (
    MODEL,
    gradients_before_step,
    gradients_of_plain_model,
    losses_of_steps,
    make_config,
)
from tests.worker_pool import WorkerPool

MODELS = {
    "block": MODEL,
    "full": dataclasses.replace(MODEL, residual="full"),
    "standard": dataclasses.replace(MODEL, residual="standard"),
}


def gather(results: list[tuple[float, dict[str, torch.Tensor], int]]) -> tuple[float, dict[str, torch.Tensor]]:
    losses = {loss for loss, _, _ in results}
    assert len(losses) == 1
    return losses.pop(), {name: grad for _, found, _ in results for name, grad in found.items()}


@pytest.mark.parametrize("residual", MODELS)
def test_gradients_are_bit_identical_at_every_cut(workers: WorkerPool, residual: str) -> None:
    model = MODELS[residual]
    loss, expected = workers.run(1, gradients_of_plain_model, make_config(model))[0]
    for split in ([4], [2, 2], [1, 3], [1, 2, 1], [1, 1, 1, 1]):
        config = make_config(model, pipeline=len(split), split=split)
        cut_loss, found = gather(workers.run(len(split), gradients_before_step, config))
        assert cut_loss == loss
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), f"{name} at split {split}"


def test_losses_and_norms_of_50_steps_are_bit_identical(workers: WorkerPool) -> None:
    expected = workers.run(1, losses_of_steps, make_config(), 50)[0]
    assert expected[-1][0] < expected[0][0]
    for pipeline in (2, 4):
        for rank_results in workers.run(pipeline, losses_of_steps, make_config(pipeline=pipeline), 50):
            assert rank_results == expected
