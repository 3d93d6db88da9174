"""Where the model is cut into stages, and what crosses each cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.config import ModelConfig

# Depth attention and the norms are limited by memory, the matrix products by arithmetic. To add them up, a byte moved
# counts as this many floating-point operations: a machine's arithmetic rate over its memory rate, to one digit.
FLOPS_PER_BYTE_CPU = 8.0
FLOPS_PER_BYTE_ACCELERATOR = 200.0


@dataclass(frozen=True)
class StagePlan:
    """A model cut into stages.

    The pipeline's layers are numbered as ``model.build_layer`` numbers them: 0 the embedding, 1 to
    ``num_hidden_layers`` the transformer layers, then the output head.

    Attributes:
        bounds: stage ``s`` holds the pipeline layers ``bounds[s]`` to ``bounds[s + 1] - 1``.
        hop_tensors: tensors (sources and partial) that cross into stage ``s + 1``, for each hop ``s``.
    """

    bounds: tuple[int, ...]
    hop_tensors: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.bounds) - 1


def plan_stages(
    model: ModelConfig,
    num_stages: int,
    sequence_length: int,
    split: Sequence[int] | None = None,
    flops_per_byte: float = FLOPS_PER_BYTE_CPU,
    element_bytes: int = 4,
) -> StagePlan:
    """Cut the model into stages of nearly equal modelled time, or by `split` (transformer layers of each stage).

    Every stage has at least one transformer layer; the embedding is on the first stage, the head on the last.
    """
    costs = layer_costs(model, sequence_length, flops_per_byte, element_bytes)
    counts = list(split) if split is not None else _balance(costs, num_stages)
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    # The transformer layers start at pipeline layer 1; the outer bounds take in the embedding and the head.
    cuts = (0, *(bound + 1 for bound in bounds[1:-1]), model.num_hidden_layers + 2)
    return StagePlan(
        bounds=cuts,
        hop_tensors=tuple(model.num_sources(cut - 1) for cut in cuts[1:-1]),
    )


def layer_costs(
    model: ModelConfig, sequence_length: int, flops_per_byte: float = FLOPS_PER_BYTE_CPU, element_bytes: int = 4
) -> list[float]:
    """Modelled time of one token, forward and backward, in each pipeline layer, in floating-point operations.

    Matrix products: 2 operations per weight forward and 4 backward; attention scores and values over half the
    sequence (causal). Depth attention: each of a layer's two reads moves every source about four times
    (forward once, backward read, read and written), `element_bytes` an element, at `flops_per_byte`.
    """
    hidden, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    head_size = hidden // heads
    weights = 2 * hidden * hidden + 2 * hidden * kv_heads * head_size + 3 * hidden * model.intermediate_size
    layer = 6 * weights + 6 * 2 * hidden * sequence_length / 2
    source = 4 * hidden * element_bytes * flops_per_byte

    def depth_attention(sources: int) -> float:
        return 0.0 if model.residual == "standard" else sources * source

    costs = [source]
    for index in range(model.num_hidden_layers):
        sources = model.num_sources(index)
        costs.append(layer + depth_attention(sources) + depth_attention(sources + 1))
    costs.append(6 * hidden * model.vocab_size + depth_attention(model.num_sources(model.num_hidden_layers)))
    return costs


def _balance(costs: Sequence[float], num_stages: int) -> list[int]:
    """Transformer layers of each stage such that the slowest stage is as fast as can be."""
    num_layers = len(costs) - 2
    layers = list(costs[1:-1])
    layers[0] += costs[0]
    layers[-1] += costs[-1]
    reach = [0.0]
    for cost in layers:
        reach.append(reach[-1] + cost)
    # slowest[s][n]: slowest stage when the first n layers are cut into s stages; cut[s][n]: where its last one starts.
    infinity = float("inf")
    slowest = [[infinity] * (num_layers + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (num_layers + 1) for _ in range(num_stages + 1)]
    slowest[0][0] = 0.0
    for stages in range(1, num_stages + 1):
        for stop in range(stages, num_layers + 1):
            for start in range(stages - 1, stop):
                time = max(slowest[stages - 1][start], reach[stop] - reach[start])
                if time < slowest[stages][stop]:
                    slowest[stages][stop], cut[stages][stop] = time, start
    counts: list[int] = []
    stop = num_layers
    for stages in range(num_stages, 0, -1):
        counts.append(stop - cut[stages][stop])
        stop = cut[stages][stop]
    return counts[::-1]
