"""Which source each sequence of a mixture comes from: exact shares, a fixed order, random access."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from data_prep.errors import DepthpipeError
from data_prep.order import Int64Array, permutation

WEIGHT_SCALE = 1 << 32
MIN_SHARE = 1e-6


class Mixture:
    """Assigns global sequence numbers to sources in the proportion of their weights.

    The stream is cut into rounds. How many sequences of a round go to a source follows from cumulative weights, so
    after any number of rounds every source is within one sequence of its exact share; inside a round the order is
    shuffled.
    """

    def __init__(self, weights: Sequence[tuple[str, float]], seed: int) -> None:
        """`weights`: (name, weight) of each source. Raises DepthpipeError for weights that are not positive numbers."""
        for name, weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise DepthpipeError(f"{name}: weight {weight}: must be a positive number")
        total = math.fsum(weight for _, weight in weights)
        cumulative = [math.fsum(weight for _, weight in weights[: i + 1]) / total for i in range(len(weights))]
        self._cumulative = [round(share * WEIGHT_SCALE) for share in cumulative]
        smallest, rarest = min((weight / total, name) for name, weight in weights)
        if smallest < MIN_SHARE:
            raise DepthpipeError(f"{rarest}: less than a millionth of the mixture: raise its weight or leave it out")
        # Two sequences or more of every source in a round: rounding can then never make a count negative.
        self._round_size = max(256, 1 << math.ceil(math.log2(2 / smallest)))
        self._seed = seed
        self._round = functools.lru_cache(4)(self._make_round)

    def assign(self, indices: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Source number, and place in that source's own stream, of each sequence; int64, same shape as `indices`."""
        if len(self._cumulative) == 1:
            return np.zeros_like(indices), indices
        rounds, places = np.divmod(indices, self._round_size)
        sources, source_places = np.empty_like(indices), np.empty_like(indices)
        for number in np.unique(rounds):
            chosen = rounds == number
            round_sources, round_places = self._round(int(number))
            sources[chosen] = round_sources[places[chosen]]
            source_places[chosen] = round_places[places[chosen]]
        return sources, source_places

    def _make_round(self, number: int) -> tuple[Int64Array, Int64Array]:
        before, after = self._counts(number), self._counts(number + 1)
        sources = np.repeat(np.arange(len(before)), after - before)
        places = np.concatenate([np.arange(first, last) for first, last in zip(before, after, strict=True)])
        order = permutation(self._round_size, self._seed, number)
        # Within a source, places stay ascending: its own order is already shuffled.
        shuffled = sources[order]
        return shuffled, places[np.argsort(np.argsort(shuffled, kind="stable"), kind="stable")]

    def _counts(self, rounds: int) -> Int64Array:
        """Sequences of each source in the first `rounds` rounds; exact integer arithmetic."""
        ends = [0] + [(share * rounds * self._round_size) // WEIGHT_SCALE for share in self._cumulative]
        return np.array([end - start for start, end in pairwise(ends)], dtype=np.int64)
