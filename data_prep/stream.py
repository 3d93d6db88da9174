"""From shards to batches: the global order of sequences, and the loader that feeds one data-parallel rank.

The only file of data_prep that imports torch.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from data_prep.errors import DepthpipeError
from data_prep.manifest import Manifest
from data_prep.mixture import Mixture
from data_prep.order import WINDOW_TOKENS, DatasetOrder, Int64Array
from data_prep.shards import ShardReader

Columns = Literal["inputs", "labels", "both"]
Batch = tuple[torch.Tensor | None, torch.Tensor | None]
POSITION_VERSION = 1


@dataclass(frozen=True)
class DatasetSource:
    """A dataset directory and its weight in a mixture: the expected share of sequences is weight / sum of weights."""

    path: str
    weight: float = 1.0


class TokenReader:
    """Tokens of one dataset by their offset in its whole stream. Shards are opened when they are first read."""

    def __init__(self, manifest: Manifest) -> None:
        self._shard_starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in manifest.shards])])
        self._open: functools._lru_cache_wrapper[ShardReader] = functools.lru_cache(1024)(manifest.open_shard)

    def read(self, start: int, out: Int64Array) -> None:
        """Copy tokens `start : start + len(out)` into `out`."""
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        done = 0
        while done < len(out):
            first = start + done - int(self._shard_starts[shard])
            count = min(len(out) - done, int(self._shard_starts[shard + 1]) - (start + done))
            self._open(shard).read(first, out[done : done + count])
            done += count
            shard += 1


class SequenceStream:
    """The global, endless, reshuffled order of sequences over a mixture of datasets.

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
    ) -> None:
        """Raises DepthpipeError for a directory that is no dataset, datasets of different tokenizers, bad weights."""
        self.sources = tuple(sources)
        self.sequence_length = sequence_length
        self.seed = seed
        self.manifests = [Manifest.load(source.path) for source in self.sources]
        first = self.manifests[0]
        for manifest in self.manifests[1:]:
            if manifest.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise DepthpipeError(
                    f"{manifest.directory}: made with another tokenizer than {first.directory}: "
                    "tokenize one of them again"
                )
        self._orders = [
            DatasetOrder(manifest, sequence_length, seed + index, window_tokens)
            for index, manifest in enumerate(self.manifests)
        ]
        self._readers = [TokenReader(manifest) for manifest in self.manifests]
        self._mixture = Mixture([(source.path, source.weight) for source in self.sources], seed)

    @property
    def vocab_size(self) -> int:
        return self.manifests[0].vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifests[0].tokenizer_fingerprint

    @property
    def sequences_per_epoch(self) -> list[int]:
        """Sequences in one pass over each source."""
        return [order.sequences_per_epoch for order in self._orders]

    def sequence(self, index: int) -> Int64Array:
        """Sequence `index` of the global order: int64 [sequence_length + 1]."""
        out: Int64Array = np.empty(self.sequence_length + 1, dtype=np.int64)
        self.fill(np.array([index]), out[np.newaxis])
        return out

    def fill(self, indices: Int64Array, out: Int64Array, shift: int = 0) -> None:
        """Write the first `out.shape[1]` tokens from token `shift` on of each sequence into `out` [len(indices), n]."""
        sources, places = self._mixture.assign(indices)
        for source, (order, reader) in enumerate(zip(self._orders, self._readers, strict=True)):
            (rows,) = np.nonzero(sources == source)
            for row, start in zip(rows.tolist(), order.starts(places[rows]).tolist(), strict=True):
                reader.read(start + shift, out[row])

    def identity(self) -> dict[str, Any]:
        """What decides the order, for comparison with a checkpoint's position."""
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "sources": [
                {"dataset": manifest.fingerprint, "weight": source.weight}
                for manifest, source in zip(self.manifests, self.sources, strict=True)
            ],
        }


class BatchLoader:
    """Micro-batches of one data-parallel rank, read ahead by a background thread.

    Step `s` of the loader consumes `global_batch_size` sequences; rank r of R gets the r-th part of them, in
    micro-batches in order. `next` gives `(inputs, labels)`, int64 [micro_batch_size, sequence_length] (pinned where
    there is a CUDA device), None for a column that was not asked for.
    """

    def __init__(
        self,
        stream: SequenceStream,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        position: dict[str, Any] | None = None,
        columns: Columns = "both",
        prefetch: int = 4,
    ) -> None:
        """`position`: where another loader's `position()` left off; its batch sizes and ranks may have been others.

        Raises ValueError for sizes that do not divide, DepthpipeError for a position in another stream.
        """
        per_rank, rest = divmod(global_batch_size, data_parallel_size)
        if rest or per_rank % micro_batch_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"x data_parallel_size {data_parallel_size}"
            )
        self._stream = stream
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank_offset = data_parallel_rank * per_rank
        self._micro_batches_per_step = per_rank // micro_batch_size
        self._columns = columns
        self._first_sample = _samples_consumed(stream, position)
        self._pin = torch.cuda.is_available()
        self._taken = 0
        self.wait_seconds = 0.0
        self._stop = threading.Event()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(1, prefetch))
        self._thread = threading.Thread(target=self._read_ahead, name="depthpipe-batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = self._queue.get()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(batch, BaseException):
            self._queue.put(batch)
            raise batch
        self._taken += 1
        return batch

    def position(self) -> dict[str, Any]:
        """State after the last whole step that was consumed: small, JSON-able, the same on every rank."""
        samples = self._first_sample + self._taken // self._micro_batches_per_step * self._global_batch_size
        return {"version": POSITION_VERSION, "samples": samples, **self._stream.identity()}

    def close(self) -> None:
        """End the background thread. `next` must not be called afterwards."""
        self._stop.set()
        while self._thread.is_alive():
            _drain(self._queue)
            self._thread.join(timeout=0.05)

    def _read_ahead(self) -> None:
        try:
            for indices in self._micro_batch_indices():
                batch = self._read(indices)
                while not self._stop.is_set():
                    try:
                        self._queue.put(batch, timeout=0.5)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._queue.put(error)

    def _micro_batch_indices(self) -> Iterator[Int64Array]:
        step_start = self._first_sample
        while True:
            first = step_start + self._rank_offset
            for micro_batch in range(self._micro_batches_per_step):
                yield first + np.arange(
                    micro_batch * self._micro_batch_size, (micro_batch + 1) * self._micro_batch_size
                )
            step_start += self._global_batch_size

    def _read(self, indices: Int64Array) -> Batch:
        length = self._stream.sequence_length
        columns: list[torch.Tensor | None] = []
        for name, shift in (("inputs", 0), ("labels", 1)):
            if self._columns not in (name, "both"):
                columns.append(None)
                continue
            tensor = torch.empty(len(indices), length, dtype=torch.int64, pin_memory=self._pin)
            self._stream.fill(indices, tensor.numpy(), shift)
            columns.append(tensor)
        return columns[0], columns[1]


def _samples_consumed(stream: SequenceStream, position: dict[str, Any] | None) -> int:
    if position is None:
        return 0
    if position.get("version") != POSITION_VERSION:
        raise DepthpipeError(
            f"data position: version {position.get('version')}, this depthpipe reads {POSITION_VERSION}"
        )
    identity = stream.identity()
    for key, config in (("sources", "data.train"), ("sequence_length", "data.sequence_length"), ("seed", "run.seed")):
        if position[key] != identity[key]:
            raise DepthpipeError(
                f"{config}: differs from the run that the checkpoint comes from, so its data position means nothing "
                "here: restore it, or start a new run"
            )
    return int(position["samples"])


def _drain(batches: queue.Queue[Batch | BaseException]) -> None:
    while True:
        try:
            batches.get_nowait()
        except queue.Empty:
            return
