"""One unit of a tokenizing job, from slices of files to a finished shard, and the processes that do units."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from data_prep.corpus import CorpusFile
from data_prep.documents import Counters, DocumentReader, Fragment
from data_prep.encoder import Encoder
from data_prep.errors import DepthpipeError
from data_prep.manifest import write_errors, write_sealed
from data_prep.plan import Plan
from data_prep.shards import ShardInfo, ShardWriter
from data_prep.tokenizer import Tokenizer

TRAIN, VALIDATION = "train", "validation"
BATCH_BYTES = 1 << 20  # of text encoded at once
SELF_CHECK_EVERY = 1024  # documents; checking one costs as much as plain encoding
SELF_CHECK_CHARACTERS = 1 << 14
PROGRESS_SLOTS = 3  # documents, tokens, bytes of text


@dataclass(frozen=True)
class UnitResult:
    """What a finished unit wrote: one shard for each half that got any text, and what it counted for each."""

    shards: dict[str, ShardInfo]
    counters: dict[str, Counters]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> UnitResult:
        return cls(
            {half: ShardInfo(**shard) for half, shard in record["shards"].items()},
            {half: Counters.from_json(counters) for half, counters in record["counters"].items()},
        )


def unit_file(directory: Path, unit: int, half: str) -> Path:
    """Where a finished unit's shard waits for the commit."""
    return directory / f"{half}_{unit:06d}.tar"


def unit_record(directory: Path, unit: int) -> Path:
    """The file whose presence says that the unit is finished."""
    return directory / f"unit_{unit:06d}.json"


class UnitWorker:
    """Does units of one plan in `directory`. Its result for a unit does not depend on which units it did before."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, directory: Path) -> None:
        self.plan = plan
        self.directory = directory
        self.encoder = Encoder(tokenizer)
        self._documents_until_check = 0

    def run(self, unit: int, progress: Callable[[int, int, int], None] = lambda *_: None) -> UnitResult:
        """Tokenize a unit; its record appears last. Raises DepthpipeError for unreadable input or a full disk."""
        writers: dict[str, ShardWriter] = {}
        counters = {TRAIN: Counters(), VALIDATION: Counters()}
        try:
            with write_errors(self.directory):
                self._write_shards(unit, writers, counters, progress)
                shards = {half: info for half, writer in writers.items() if (info := writer.finish())}
                for half, info in shards.items():
                    counters[half].documents, counters[half].tokens = info.documents, info.tokens
                result = UnitResult(shards, counters)
                write_sealed(unit_record(self.directory, unit), result.to_json())
            return result
        finally:
            for writer in writers.values():
                writer.discard()

    def _write_shards(
        self,
        unit: int,
        writers: dict[str, ShardWriter],
        counters: dict[str, Counters],
        progress: Callable[[int, int, int], None],
    ) -> None:
        waiting: dict[str, list[tuple[str, bool]]] = {TRAIN: [], VALIDATION: []}
        sizes = dict.fromkeys(waiting, 0)

        def write(half: str) -> None:
            if half not in writers:
                path = unit_file(self.directory, unit, half)
                writers[half] = ShardWriter(path, self.encoder.dtype, self.plan.options.chunk_tokens)
            packed = self.encoder.encode_fragments(waiting[half])
            documents = sum(ends for _, ends in waiting[half])
            writers[half].append(packed)
            writers[half].documents += documents
            counters[half].text_bytes += sizes[half]
            progress(documents, len(packed) // self.encoder.dtype.itemsize, sizes[half])
            waiting[half], sizes[half] = [], 0

        for half, fragment in self._fragments(unit, counters[TRAIN]):
            self._check_now_and_then(fragment.text)
            waiting[half].append((fragment.text, fragment.ends))
            sizes[half] += len(fragment.text) if fragment.text.isascii() else len(fragment.text.encode())
            if sizes[half] >= BATCH_BYTES:
                write(half)
        for half in waiting:
            if waiting[half]:
                write(half)

    def _fragments(self, unit: int, counters: Counters) -> Iterator[tuple[str, Fragment]]:
        options = self.plan.options
        reader = DocumentReader(options.text_key, options.documents, self.encoder.cuttable, options.skip_bad, counters)
        for index, start, stop in self.plan.units[unit]:
            file = self.plan.files[index]
            half, begins = TRAIN, True
            for fragment in reader.read(file, start, stop):
                if begins:
                    half = half_of(fragment.head, options.validation_fraction)
                begins = fragment.ends
                yield half, fragment
            _check_unchanged(file)

    def _check_now_and_then(self, text: str) -> None:
        self._documents_until_check -= 1
        if self._documents_until_check < 0:
            self._documents_until_check = SELF_CHECK_EVERY
            self.encoder.check(text[:SELF_CHECK_CHARACTERS])


def half_of(head: bytes, validation_fraction: float) -> str:
    """The half a document belongs to: by a hash of its first bytes, so that copies fall on the same side."""
    if not validation_fraction:
        return TRAIN
    value = int.from_bytes(hashlib.blake2b(head, digest_size=8).digest(), "little")
    return VALIDATION if value < validation_fraction * 2**64 else TRAIN


def _check_unchanged(file: CorpusFile) -> None:
    try:
        status = os.stat(file.path)
    except OSError:
        raise DepthpipeError(f"{file.path}: gone while it was read: restore it and run again") from None
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise DepthpipeError(f"{file.path}: changed while it was read: restore it, or start again with another --out")


class WorkerPool:
    """Processes that take units one at a time, first come first served. A context manager that leaves none behind."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, directory: Path, workers: int) -> None:
        # Forked: a worker then starts in milliseconds with the plan in place. No thread runs yet when this is called.
        context = get_context("fork")
        self._progress = context.RawArray("q", workers * PROGRESS_SLOTS)
        self._pipes: list[connection.Connection] = []
        self._processes = []
        for index in range(workers):
            ours, theirs = context.Pipe()
            arguments = (plan, tokenizer, directory, theirs, self._progress, index)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def progress(self) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text done so far by all workers."""
        slots = list(self._progress)
        documents, tokens, size = (sum(slots[i::PROGRESS_SLOTS]) for i in range(PROGRESS_SLOTS))
        return documents, tokens, size

    def run(self, units: list[int], interval: float = 0.1) -> Iterator[UnitResult | None]:
        """Do `units`; yields each result as it comes, and None at least every `interval` seconds in between.

        Raises DepthpipeError when a worker reports one or is killed.
        """
        waiting = iter(units)
        try:
            busy = {pipe for pipe in self._pipes if _send_next(pipe, waiting)}
            while busy:
                ready = connection.wait(list(busy), timeout=interval)
                if not ready:
                    yield None
                for pipe in ready:
                    assert isinstance(pipe, connection.Connection)
                    outcome = pipe.recv()
                    if isinstance(outcome, BaseException):
                        raise outcome
                    if not _send_next(pipe, waiting):
                        busy.remove(pipe)
                    yield outcome
        except (EOFError, ConnectionError):
            raise DepthpipeError(
                "a worker process was killed (out of memory?): run the same command again, "
                "with fewer --workers if memory is short"
            ) from None


def _send_next(pipe: connection.Connection, units: Iterator[int]) -> bool:
    unit = next(units, None)
    if unit is not None:
        pipe.send(unit)
    return unit is not None


def _work(
    plan: Plan, tokenizer: Tokenizer, directory: Path, pipe: connection.Connection, slots: Any, index: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    parent = os.getppid()
    worker = UnitWorker(plan, tokenizer, directory)
    base = index * PROGRESS_SLOTS

    def progress(documents: int, tokens: int, size: int) -> None:
        slots[base] += documents
        slots[base + 1] += tokens
        slots[base + 2] += size
        exit_if_orphaned()

    def exit_if_orphaned() -> None:
        if os.getppid() != parent:
            os._exit(1)

    while True:
        while not pipe.poll(1.0):
            exit_if_orphaned()
        try:
            outcome: Any = worker.run(pipe.recv(), progress)
        except DepthpipeError as error:
            outcome = error
        except Exception as error:
            outcome = RuntimeError(f"in a worker process: {error!r}\n{traceback.format_exc()}")
        pipe.send(outcome)
