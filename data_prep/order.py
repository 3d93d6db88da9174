"""The order of a dataset's sequences: a pure function of (manifest, seed, sequence length), with random access.

Shards are grouped into blocks, blocks are shuffled, and consecutive shuffled blocks form windows that are shuffled
sequence by sequence. A window is large enough to shuffle like the whole (most datasets are one window), and small
enough that reading on from any position opens only the shards of that window.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.errors import DepthpipeError
from data_prep.manifest import Manifest

Int64Array = npt.NDArray[np.int64]

WINDOW_TOKENS = 1 << 28
# Sequences do not cross blocks, so each block loses less than one sequence at its end: 0.1 % at most.
BLOCK_SEQUENCES = 1024
GOLDEN = 0x9E3779B97F4A7C15


def permutation(count: int, *key: int) -> Int64Array:
    """A permutation of `range(count)` determined by `key`, as int64 [count].

    Sorts splitmix64 hashes (Steele, Lea, Flood 2014), so that it never changes with a library's generator.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(0)
        for part in key:
            state = _mix(np.array([state ^ np.uint64(part % 2**64)]) + np.uint64(GOLDEN))[0]
        hashes = _mix(state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN))
    return np.argsort(hashes, kind="stable")


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class _Epoch:
    """Blocks in the order of one epoch, and how they are grouped into windows."""

    blocks: Int64Array
    first_block_of_window: list[int]  # [windows + 1], places in `blocks`
    sequences_before_window: list[int]  # [windows], in the epoch


class DatasetOrder:
    """Where each sequence of the endless, reshuffled stream over one dataset starts."""

    def __init__(self, manifest: Manifest, sequence_length: int, seed: int, window_tokens: int = WINDOW_TOKENS) -> None:
        """Raises DepthpipeError when the dataset is shorter than one sequence."""
        if manifest.tokens <= sequence_length:
            raise DepthpipeError(
                f"{manifest.directory}: {manifest.tokens} tokens, too few for one sequence of {sequence_length} + 1: "
                "lower data.sequence_length or tokenize more text"
            )
        self.sequence_length = sequence_length
        self.seed = seed
        shard_tokens = np.array([shard.tokens for shard in manifest.shards], dtype=np.int64)
        self._block_first_shard = _group_shards(shard_tokens, BLOCK_SEQUENCES * sequence_length)
        self._block_start = np.concatenate([[0], np.cumsum(shard_tokens)])[self._block_first_shard]
        self._block_sequences: Int64Array = (np.diff(self._block_start) - 1) // sequence_length
        self._window_sequences = max(1, window_tokens // sequence_length)
        self.sequences_per_epoch = int(self._block_sequences.sum())
        self._epoch = functools.lru_cache(2)(self._make_epoch)
        self._window = functools.lru_cache(3)(self._make_window)

    def starts(self, indices: Int64Array) -> Int64Array:
        """Token offsets in the dataset where sequences `indices` of the stream start; int64, same shape."""
        first, last = int(indices.min()), int(indices.max())
        epoch, window = self.window_of(first)
        begin = epoch * self.sequences_per_epoch + self._epoch(epoch).sequences_before_window[window]
        starts = self._window(epoch, window)
        if last < begin + len(starts):
            return starts[indices - begin]
        inside = indices < begin + len(starts)
        result = np.empty_like(indices)
        result[inside] = starts[indices[inside] - begin]
        result[~inside] = self.starts(indices[~inside])
        return result

    def window_of(self, index: int) -> tuple[int, int]:
        """Epoch and window to which sequence `index` belongs."""
        epoch, place = divmod(index, self.sequences_per_epoch)
        return epoch, bisect_right(self._epoch(epoch).sequences_before_window, place) - 1

    def window_after(self, epoch: int, window: int) -> tuple[int, int]:
        """The window that is read next."""
        last = len(self._epoch(epoch).first_block_of_window) - 2
        return (epoch, window + 1) if window < last else (epoch + 1, 0)

    def shards_of(self, epoch: int, window: int) -> list[int]:
        """Numbers of the shards that a window reads, and no others."""
        layout = self._epoch(epoch)
        first, last = layout.first_block_of_window[window : window + 2]
        bounds = self._block_first_shard
        return [shard for block in layout.blocks[first:last] for shard in range(bounds[block], bounds[block + 1])]

    def _make_epoch(self, epoch: int) -> _Epoch:
        blocks = permutation(len(self._block_sequences), self.seed, epoch)
        before = np.concatenate([[0], np.cumsum(self._block_sequences[blocks])])
        windows = max(1, round(self.sequences_per_epoch / self._window_sequences))
        bounds = np.arange(windows + 1) * self.sequences_per_epoch // windows
        first_block = np.unique(np.searchsorted(before, bounds))
        return _Epoch(blocks, first_block.tolist(), before[first_block[:-1]].tolist())

    def _make_window(self, epoch: int, window: int) -> Int64Array:
        layout = self._epoch(epoch)
        first, last = layout.first_block_of_window[window : window + 2]
        starts = np.concatenate(
            [
                self._block_start[block] + np.arange(self._block_sequences[block]) * self.sequence_length
                for block in layout.blocks[first:last]
            ]
        )
        return starts[permutation(len(starts), self.seed, epoch, window)]


def _group_shards(shard_tokens: Int64Array, block_tokens: int) -> Int64Array:
    """First shards [blocks + 1] of blocks of consecutive shards, of `block_tokens` or more where there are as many."""
    bounds = [0]
    tokens = 0
    for shard, count in enumerate(shard_tokens.tolist(), 1):
        tokens += count
        if tokens >= block_tokens:
            bounds.append(shard)
            tokens = 0
    if len(bounds) == 1:
        bounds.append(len(shard_tokens))
    bounds[-1] = len(shard_tokens)  # a short rest joins the last block
    return np.array(bounds, dtype=np.int64)
