"""Stages are cut where their slowest takes the least time, and know what crosses each cut."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from model.config import ModelConfig
from pipeline.plan import layer_costs, plan_stages

MODEL = ModelConfig(vocab_size=4096, residual="full", num_hidden_layers=9, hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("residual", ["standard", "block", "full"])
@pytest.mark.parametrize("stages", [1, 2, 3, 5, 9])
def test_no_other_cut_has_a_faster_slowest_stage(residual: str, stages: int) -> None:
    model = dataclasses.replace(MODEL, residual=residual)
    costs = layer_costs(model, 128)

    def slowest(cuts: tuple[int, ...]) -> float:
        return max(sum(costs[start:stop]) for start, stop in itertools.pairwise((0, *cuts, len(costs))))

    # A cut leaves at least one transformer layer on every stage: the embedding is layer 0, the head the last.
    possible = itertools.combinations(range(2, model.num_hidden_layers + 1), stages - 1)
    bounds = plan_stages(model, stages, 128).bounds
    assert (bounds[0], bounds[-1]) == (0, 11)
    assert slowest(bounds[1:-1]) == pytest.approx(min(map(slowest, possible)))


def test_depth_attention_makes_later_stages_shorter() -> None:
    bounds = plan_stages(dataclasses.replace(MODEL, num_hidden_layers=24, vocab_size=64), 2, 128).bounds
    assert bounds[1] - 1 > 12


def test_a_split_is_taken_as_given_and_the_hops_are_counted() -> None:
    block = dataclasses.replace(MODEL, residual="block", layers_per_block=3)
    plan = plan_stages(block, 3, 128, split=[4, 2, 3])
    assert plan.bounds == (0, 5, 7, 11)
    assert plan.hop_tensors == (3, 3)  # before layer 4: embedding, one block, partial; before layer 6 the same
    assert plan_stages(MODEL, 3, 128, split=[4, 2, 3]).hop_tensors == (9, 13)
    assert plan_stages(dataclasses.replace(MODEL, residual="standard"), 2, 128).hop_tensors == (1,)
