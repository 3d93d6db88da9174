"""From the global order of sequences to the batches of one data-parallel rank.

The only file of data_prep that imports torch.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from data_prep.errors import DepthpipeError
from data_prep.order import Int64Array
from data_prep.sequences import DatasetSource, SequenceStream, TokenArray

__all__ = ["BatchLoader", "DatasetSource", "SequenceStream"]

Columns = Literal["inputs", "labels", "both"]
Batch = tuple[torch.Tensor | None, ...]
POSITION_VERSION = 1
READ_TOKENS = 1 << 17
CLOSE_SECONDS = 2.0  # a download may hang; the thread is a daemon and ends with the process


class BatchLoader:
    """Micro-batches of one data-parallel rank, read ahead by a background thread.

    Step `s` of the loader consumes `global_batch_size` sequences; rank r of R gets the r-th part of them, in
    micro-batches in order. `next` gives `(inputs, labels)`, int64 [micro_batch_size, sequence_length] (pinned where
    there is a CUDA device), None for a column that was not asked for. With `document_boundaries`, a third tensor,
    int32 of the same shape: for each input token the number of its document within the sequence, from 0.
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
        document_boundaries: bool = False,
        prefetch: int = 4,
    ) -> None:
        """`position`: where another loader's `position()` left off; its batch sizes and ranks may have been others.
        `prefetch`: micro-batches to hold ready; one, the least, where it is 0.

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
        self._document_boundaries = document_boundaries
        self._first_sample = _samples_consumed(stream, position)
        self._pin = torch.cuda.is_available()
        self._taken = 0
        self.wait_seconds = 0.0
        self._skipped: list[int] = []
        self._stop = threading.Event()
        self._queue: queue.Queue[tuple[Batch, list[int]] | BaseException] = queue.Queue(maxsize=max(1, prefetch))
        self._thread = threading.Thread(target=self._read_ahead, name="depthpipe-batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        taken = self._queue.get()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(taken, BaseException):
            self._queue.put(taken)
            raise taken
        batch, skipped = taken
        self._taken += 1
        self._skipped += skipped
        return batch

    def take_skipped(self) -> list[int]:
        """Global numbers of the sequences since the last call that could not be read and were replaced."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def position(self) -> dict[str, Any]:
        """State after the last whole step that was consumed: small, JSON-able, the same on every rank."""
        samples = self._first_sample + self._taken // self._micro_batches_per_step * self._global_batch_size
        return {"version": POSITION_VERSION, "samples": samples, **self._stream.identity()}

    def close(self) -> None:
        """End the background thread. `next` must not be called afterwards."""
        self._stop.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            _drain(self._queue)
            self._thread.join(timeout=0.05)

    def _read_ahead(self) -> None:
        try:
            for batch in self._micro_batches():
                if not self._put(batch):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[Batch, list[int]] | BaseException) -> bool:
        """Wait for room in the queue; False when the loader was closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def _micro_batches(self) -> Iterator[tuple[Batch, list[int]]]:
        """Micro-batches, each with the sequences of it that could not be read.

        Small ones are read several at once, for a call costs as much as reading tens of sequences.
        """
        at_once = max(1, READ_TOKENS // (self._micro_batch_size * self._stream.sequence_length))
        indices = self._micro_batch_indices()
        while True:
            several = list(itertools.islice(indices, at_once))
            before = len(self._stream.skipped)
            tokens = self._stream.read(np.concatenate(several))
            skipped = self._stream.skipped[before:]
            for place, wanted in enumerate(several):
                batch = self._batch(tokens[place * len(wanted) : (place + 1) * len(wanted)])
                yield batch, [number for number in skipped if number in wanted]

    def _micro_batch_indices(self) -> Iterator[Int64Array]:
        step_start = self._first_sample
        while True:
            first = step_start + self._rank_offset
            for micro_batch in range(self._micro_batches_per_step):
                start = first + micro_batch * self._micro_batch_size
                yield np.arange(start, start + self._micro_batch_size)
            step_start += self._global_batch_size

    def _batch(self, tokens: TokenArray) -> Batch:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        batch = [
            self._tensor(column, torch.int64) if self._columns in (name, "both") else None
            for name, column in (("inputs", inputs), ("labels", labels))
        ]
        if self._document_boundaries:
            documents = document_numbers(inputs, self._stream.end_of_document_id)
            batch.append(self._tensor(documents, torch.int32))
        return tuple(batch)

    def _tensor(self, values: TokenArray | npt.NDArray[np.int32], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(values.shape, dtype=dtype, pin_memory=self._pin)
        tensor.numpy()[...] = values
        return tensor


def document_numbers(tokens: TokenArray, end_of_document_id: int) -> npt.NDArray[np.int32]:
    """For each token of each row, how many documents ended before it in the row: int32, the shape of `tokens`.

    The end-of-document token belongs to the document that it ends.
    """
    ends = tokens == end_of_document_id
    numbers = np.zeros(tokens.shape, dtype=np.int32)
    np.cumsum(ends[:, :-1], axis=1, out=numbers[:, 1:])
    return numbers


def _samples_consumed(stream: SequenceStream, position: dict[str, Any] | None) -> int:
    if position is None:
        return 0
    if position.get("version") != POSITION_VERSION:
        raise DepthpipeError(
            f"data position: version {position.get('version')}, this depthpipe reads {POSITION_VERSION}"
        )
    identity = stream.identity()
    names = {"sources": "data.train", "sequence_length": "data.sequence_length", "seed": "run.seed"}
    for key, value in identity.items():
        if position.get(key) != value:
            raise DepthpipeError(
                f"{names.get(key, key)}: differs from the run that the checkpoint comes from, so its data "
                "position means nothing here: restore it, or start a new run"
            )
    return int(position["samples"])


def _drain(batches: queue.Queue[tuple[Batch, list[int]] | BaseException]) -> None:
    while True:
        try:
            batches.get_nowait()
        except queue.Empty:
            return
