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


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)]
    assert not different


@pytest.mark.parametrize("residual", MODELS)
def test_gradients_are_bit_identical_at_every_cut(workers: WorkerPool, residual: str) -> None:
    model = MODELS[residual]
    loss, expected = workers.run(1, gradients_of_plain_model, make_config(model))[0]
    for split in ([4], [2, 2], [1, 3], [1, 2, 1], [1, 1, 1, 1]):
        config = make_config(model, pipeline=len(split), split=split)
        cut_loss, found = gather(workers.run(len(split), gradients_before_step, config))
        assert cut_loss == loss
        assert_equal_gradients(found, expected)


@pytest.mark.parametrize("residual", ["block", "full"])
@pytest.mark.parametrize("split", [[3, 1], [1, 1, 1, 1]])
def test_dualpipev_computes_the_same_bits(workers: WorkerPool, residual: str, split: list[int]) -> None:
    model = MODELS[residual]
    loss, expected = workers.run(1, gradients_of_plain_model, make_config(model))[0]
    ranks = len(split) // 2
    config = make_config(model, pipeline=ranks, split=split, schedule="dualpipev")
    cut_loss, found = gather(workers.run(ranks, gradients_before_step, config))
    assert cut_loss == loss
    assert_equal_gradients(found, expected)


def test_tied_embeddings_have_the_same_gradient_at_every_cut(workers: WorkerPool) -> None:
    model = dataclasses.replace(MODEL, tie_word_embeddings=True)
    loss, expected = gather(workers.run(1, gradients_before_step, make_config(model)))
    assert torch.equal(expected["0.weight"], expected["5.weight"])
    plain_loss, plain = workers.run(1, gradients_of_plain_model, make_config(model))[0]
    assert loss == plain_loss
    # One weight's gradient against the sum of two: the same numbers, added in another order.
    torch.testing.assert_close(expected["0.weight"], plain["0.weight"], rtol=1e-5, atol=1e-7)
    for ranks, changes in ((2, {}), (4, {}), (2, {"schedule": "dualpipev"})):
        cut_loss, found = gather(
            workers.run(ranks, gradients_before_step, make_config(model, pipeline=ranks, **changes))
        )
        assert cut_loss == loss
        assert_equal_gradients(found, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_norms_of_50_steps_are_bit_identical(workers: WorkerPool, tied: bool) -> None:
    model = dataclasses.replace(MODEL, tie_word_embeddings=tied)
    expected = workers.run(1, losses_of_steps, make_config(model), 50)[0]
    assert expected[-1][0] < expected[0][0] - 0.5
    for pipeline in (2, 4):
        for rank_results in workers.run(pipeline, losses_of_steps, make_config(model, pipeline=pipeline), 50):
            assert rank_results == expected
