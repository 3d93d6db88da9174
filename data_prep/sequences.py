"""The global order of sequences over a mixture of datasets, with random access. Imports no torch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.errors import DepthpipeError
from data_prep.manifest import Manifest
from data_prep.mixture import Mixture
from data_prep.order import WINDOW_TOKENS, DatasetOrder, Int64Array
from data_prep.remote import RemoteDataset, cache_root, is_remote
from data_prep.shards import DATA_OFFSET, DamagedShardError, ShardReader, member_bytes
from data_prep.verified import VerifiedShards

logger = logging.getLogger(__name__)

OnBadShard = Literal["error", "skip"]
TokenArray = npt.NDArray[np.unsignedinteger]
MAX_OPEN_SHARDS = 256


@dataclass(frozen=True)
class DatasetSource:
    """A dataset and its weight in a mixture: its expected share of sequences is weight / sum of weights.

    `path` is a directory, or a URL that webdataset opens (`https://`, `s3://`, `gs://`, `pipe:` ...), to which the
    names of the dataset's files are appended.
    """

    path: str
    weight: float = 1.0


class SequenceStream:
    """The global, endless, reshuffled order of sequences.

    Sequence `k` is a function of (manifests, weights, seed, sequence_length, window_tokens) alone: the same on every
    rank, for every number of ranks, after every restart.
    """

    def __init__(
        self,
        sources: Sequence[DatasetSource],
        sequence_length: int,
        seed: int,
        *,
        window_tokens: int = WINDOW_TOKENS,
        on_bad_shard: OnBadShard = "error",
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """Raises DepthpipeError for what is no dataset, datasets of different tokenizers, and weights not above zero.

        `window_tokens`: how many tokens are shuffled together. `on_bad_shard`: with `skip`, a sequence that cannot be
        read is logged and gives its place to the next one of its dataset that can; no other changes its place.
        `cache_dir` (default `~/.cache/depthpipe`) keeps shards of remote datasets, in at most `cache_bytes`, and which
        local ones were read against their checksums, as happens once on each machine.
        """
        self.sequence_length = sequence_length
        self.seed = seed
        self.skipped: list[int] = []  # global numbers of the sequences that could not be read, in the order of reading
        self._on_bad_shard = on_bad_shard
        self._window_tokens = window_tokens
        self._datasets = [
            _Dataset(source.path, sequence_length, seed + number, window_tokens, cache_dir, cache_bytes)
            for number, source in enumerate(sources)
        ]
        self.manifests = [dataset.manifest for dataset in self._datasets]
        self._weights = [source.weight for source in sources]
        first = self.manifests[0]
        for manifest in self.manifests[1:]:
            if manifest.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise DepthpipeError(
                    f"{manifest.directory}: made with another tokenizer than {first.directory}: "
                    "tokenize one of them again"
                )
        self._mixture = Mixture([(source.path, source.weight) for source in sources], seed)

    @property
    def vocab_size(self) -> int:
        return self.manifests[0].vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifests[0].tokenizer_fingerprint

    @property
    def end_of_document_id(self) -> int:
        return self.manifests[0].end_of_document_id

    @property
    def sequences_per_epoch(self) -> list[int]:
        """Sequences in one pass over each source."""
        return [dataset.order.sequences_per_epoch for dataset in self._datasets]

    def sequence(self, index: int) -> Int64Array:
        """Sequence `index` of the global order: int64 [sequence_length + 1]."""
        sequence: Int64Array = self.read(np.array([index]))[0].astype(np.int64)
        return sequence

    def read(self, indices: Int64Array) -> TokenArray:
        """Sequences number `indices` of the global order, in the shards' dtype [len(indices), sequence_length + 1].

        Raises DamagedShardError for a shard that cannot be read, unless `on_bad_shard` is `skip`.
        """
        out = np.empty((len(indices), self.sequence_length + 1), dtype=self.manifests[0].numpy_dtype)
        sources, places = self._mixture.assign(indices)
        for number, dataset in enumerate(self._datasets):
            rows = np.arange(len(indices)) if len(self._datasets) == 1 else np.flatnonzero(sources == number)
            if not len(rows):
                continue
            for row, error in dataset.read(places[rows], out, rows):
                if self._on_bad_shard == "error":
                    raise error
                self._read_next_sound(dataset, int(places[row]), out[row : row + 1], error)
                self.skipped.append(int(indices[row]))
                logger.warning("sequence %d skipped, the next sound one read in its place: %s", indices[row], error)
        return out

    def identity(self) -> dict[str, Any]:
        """What decides the order, for comparison with a checkpoint's position."""
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "window_tokens": self._window_tokens,
            "sources": [
                {"dataset": manifest.fingerprint, "weight": weight}
                for manifest, weight in zip(self.manifests, self._weights, strict=True)
            ],
        }

    @staticmethod
    def _read_next_sound(dataset: _Dataset, place: int, out: TokenArray, error: DamagedShardError) -> None:
        for other in range(place + 1, place + 1 + dataset.order.sequences_per_epoch):
            if not dataset.read(np.array([other]), out, np.array([0])):
                return
        raise error


class _Dataset:
    """One source: its manifest, its order, and its tokens by their offset in its whole stream."""

    def __init__(
        self,
        path: str,
        sequence_length: int,
        seed: int,
        window_tokens: int,
        cache_dir: str | Path | None,
        cache_bytes: int | None,
    ) -> None:
        self._remote = RemoteDataset(path, cache_dir, cache_bytes) if is_remote(path) else None
        self.manifest = self._remote.manifest if self._remote else Manifest.load(path)
        self.order = DatasetOrder(self.manifest, sequence_length, seed, window_tokens)
        self._verified = VerifiedShards(cache_root(cache_dir))
        self._window: tuple[int, int] | None = None
        self._bad: dict[int, DamagedShardError] = {}  # shards that could not be opened
        self._shard_starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in self.manifest.shards])])
        self._shard_bounds: list[int] = self._shard_starts.tolist()
        self._itemsize = self.manifest.numpy_dtype.itemsize
        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(self._open_shard)

    def read(self, places: Int64Array, out: TokenArray, rows: Int64Array) -> list[tuple[int, DamagedShardError]]:
        """Read the sequences at `places` of this dataset's order into `rows` of `out`; returns the rows that failed."""
        if self._remote:
            self._fetch_in_advance(self._remote, int(places[0]))
        starts = self.order.starts(places)
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        positions = self._positions(starts, shards, out.shape[1])
        memory = out.data.cast("B")
        row_bytes = out.shape[1] * out.itemsize
        failed: dict[int, DamagedShardError] = {}
        located = list(zip(rows.tolist(), starts.tolist(), shards.tolist(), positions.tolist(), strict=True))
        for row, start, shard, position in located:
            target = memory[row * row_bytes : (row + 1) * row_bytes]
            try:
                if position >= 0:
                    self._open(shard).read_at(position, target)
                else:
                    self._read_tokens(start, shard, target)
            except DamagedShardError as error:
                failed[row] = error
        if int(out.max()) >= self.manifest.vocab_size:
            for row, start, shard, _ in located:
                if row not in failed and int(out[row].max()) >= self.manifest.vocab_size:
                    failed[row] = self._foreign_token(start, shard, out[row])
        return list(failed.items())

    def _positions(self, starts: Int64Array, shards: Int64Array, count: int) -> Int64Array:
        """Where in its shard's file each run of `count` tokens lies; -1 for one that crosses chunks or shards."""
        manifest = self.manifest
        offsets = starts - self._shard_starts[shards]
        chunks, places = np.divmod(offsets, manifest.chunk_tokens)
        positions = chunks * member_bytes(manifest.chunk_tokens, self._itemsize) + DATA_OFFSET + places * self._itemsize
        whole = (places + count <= manifest.chunk_tokens) & (starts + count <= self._shard_starts[shards + 1])
        return np.where(whole, positions, -1)

    def _read_tokens(self, start: int, shard: int, out: memoryview) -> None:
        """Fill `out` with tokens from `start` on, which lies in `shard`; sequences may cross shards."""
        bounds, itemsize = self._shard_bounds, self._itemsize
        while True:
            size = min(len(out), (bounds[shard + 1] - start) * itemsize)
            self._open(shard).read(start - bounds[shard], out[:size])
            if size == len(out):
                return
            out = out[size:]
            shard += 1
            start = bounds[shard]

    def _foreign_token(self, start: int, shard: int, tokens: TokenArray) -> DamagedShardError:
        place = start + int(np.argmax(tokens >= self.manifest.vocab_size))
        while place >= self._shard_bounds[shard + 1]:
            shard += 1
        file = self.manifest.directory / self.manifest.shards[shard].file
        return DamagedShardError(
            f"{file}: damaged shard (a token id beyond the vocabulary): restore it or tokenize again"
        )

    def _fetch_in_advance(self, remote: RemoteDataset, place: int) -> None:
        window = self.order.window_of(place)
        if window != self._window:
            self._window = window
            after = self.order.window_after(*window)
            remote.prefetch(self.order.shards_of(*window) + self.order.shards_of(*after))

    def _open_shard(self, shard: int) -> ShardReader:
        if shard in self._bad:
            raise self._bad[shard]
        try:
            if self._remote:
                self._remote.fetch(shard)
            reader = self.manifest.open_shard(shard)
            if not self._remote:  # a remote one was checked when it came
                self._verified.check(reader.path, self.manifest.shards[shard])
            return reader
        except DamagedShardError as error:
            self._bad[shard] = error  # fetching it again for each of its sequences would take for ever
            raise
