"""The plan of a tokenizing job: which slices of which files make which shard.

The plan is a function of the inputs and the options alone, so any number of workers, on any number of machines, killed
and started again any number of times, makes the same shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.corpus import CorpusFile, content_digest
from data_prep.documents import Slice
from data_prep.errors import DepthpipeError
from data_prep.parquet import DamagedRows, RowGroup, TextColumn
from data_prep.shards import CHUNK_TOKENS

# Moves whenever the documents that a slice gives change, or the half that a document falls to: the fingerprint sees
# only how files are cut. Or else new code would go on with a job of old code, and the result would be of neither.
PLAN_VERSION = 3
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 1 << 20, 256 << 20
UNITS_WANTED = 256
SLICES_PER_UNIT = 64
MIN_SLICE_BYTES = 1 << 16
DIGEST_BYTES = 4 << 30  # of inputs are read for their digests, in seconds; of a larger corpus, times must do
# Of a compressed file or a parquet row group: each share decodes anew what comes before its own part. Parquet decodes
# 20 times faster than text is encoded, so eight shares of a row group are a fifth more work, and sixteen two fifths.
MAX_SHARES = 8
COMPRESSION_RATIO = 4  # of text under gzip and zstd, near enough to size units by


@dataclass(frozen=True)
class Options:
    """What, beside inputs and tokenizer, decides the bytes of the result."""

    text_key: str = "text"
    documents: str = "file"
    validation_fraction: float = 0.0
    skip_bad: bool = False
    chunk_tokens: int = CHUNK_TOKENS


@dataclass(frozen=True)
class Plan:
    """A job: inputs, tokenizer, options, and the units of work. Unit `i` becomes one shard (of each half)."""

    files: tuple[CorpusFile, ...]
    tokenizer: str
    options: Options
    units: tuple[tuple[Slice, ...], ...]
    version: int = PLAN_VERSION

    @classmethod
    def make(cls, files: Sequence[CorpusFile], tokenizer: str, options: Options, *, cuttable: bool) -> Plan:
        """Cut `files` into units of about equal work. `cuttable`: whether one document may be cut over slices."""
        row_groups = {i: _row_groups(file, options) for i, file in enumerate(files) if file.kind == "parquet"}
        total = sum(_work(file) for file in files if file.kind != "parquet")
        total += sum(group.text_bytes for of_file in row_groups.values() for group in of_file)
        unit_bytes = min(max(total // UNITS_WANTED, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
        groups = _groups(files, row_groups, options, unit_bytes, cuttable=cuttable)
        # A shard then holds text from all over the corpus, so a shuffle over a few shards is as good as over all.
        random.Random(0).shuffle(groups)
        units: list[tuple[Slice, ...]] = []
        unit: list[Slice] = []
        filled = 0
        for group in groups:
            for piece, work in group:
                unit.append(piece)
                filled += work
                if filled >= unit_bytes:
                    units.append(tuple(unit))
                    unit, filled = [], 0
        if unit:
            units.append(tuple(unit))
        return cls(tuple(files), tokenizer, options, tuple(units))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the job without what differs between machines (paths and times of files).

        Nor does it see `skip_bad`: a unit that was finished without it holds nothing bad, and is the same with it.
        """
        files = [(file.name, file.kind, file.size) for file in self.files]
        options = dataclasses.asdict(dataclasses.replace(self.options, skip_bad=False))
        content = [self.version, files, self.tokenizer, options, self.units]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """For the record beside the result; the units follow from the rest. Reads up to DIGEST_BYTES of the inputs."""
        return {
            "version": self.version,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "options": dataclasses.asdict(self.options),
            "units": len(self.units),
            "files": [
                [*dataclasses.astuple(file), digest] for file, digest in zip(self.files, self._digests(), strict=True)
            ],
        }

    def _digests(self) -> Iterator[str | None]:
        """Of each file, by which a copy or a restored backup, whose time alone differs, is known for the same."""
        left = DIGEST_BYTES
        for file in self.files:
            left -= file.size
            yield content_digest(file) if left >= 0 else None

    def check_same_as(self, record: dict[str, Any], directory: Path, skipped: int) -> None:
        """Raises a DepthpipeError that names the first difference between this job and the one in `directory`.

        Another `skip_bad` is none as long as that job has `skipped` nothing.
        """
        if difference := self._difference(record, directory, skipped):
            what, remedy = difference
            # Nobody may be told to remove a directory that holds the corpus too.
            remove = "" if self.reads_from(directory) else f"remove {directory}, "
            raise DepthpipeError(f"{what}: {remedy}, {remove}or choose another --out")

    def _difference(self, record: dict[str, Any], directory: Path, skipped: int) -> tuple[str, str] | None:
        restore = "restore it"
        if record["tokenizer"] != self.tokenizer:
            return f"{directory}: was begun with another tokenizer", restore
        for name, value in dataclasses.asdict(self.options).items():
            if (was := record["options"].get(name)) == value:
                continue
            if name != "skip_bad":
                return f"{directory}: was begun with {name} {was!r}, now it is {value!r}", restore
            if was and skipped:
                return f"{directory}: was begun with --skip-bad, and has skipped something ({skipped:,})", "add it"
        return self._difference_of_inputs(record, directory)

    def _difference_of_inputs(self, record: dict[str, Any], directory: Path) -> tuple[str, str] | None:
        restore = "restore it"
        before = {fields[0]: (CorpusFile(*fields[:-1]), fields[-1]) for fields in record["files"]}
        now = {file.path: file for file in self.files}
        for path in sorted(before.keys() - now.keys()):
            return f"{path}: gone since {directory} was begun", restore
        for path, file in now.items():
            if path not in before:
                return f"{path}: new since {directory} was begun", "remove it from the inputs"
            was, digest = before[path]
            if file.size == was.size and file.mtime_ns != was.mtime_ns and digest is None:
                return f"{path}: its time has changed since {directory} was begun", "restore it with its time"
            if file.size != was.size or (file.mtime_ns != was.mtime_ns and content_digest(file) != digest):
                return f"{path}: changed since {directory} was begun", restore
        if record["fingerprint"] != self.fingerprint:
            return f"{directory}: was begun with other inputs or in another order", restore
        return None

    def reads_from(self, directory: Path, *others: Path) -> bool:
        """Whether an input, or one of `others`, lies in `directory`."""
        root = os.path.join(os.path.realpath(directory), "")
        paths = [*(Path(file.path) for file in self.files), *others]
        return any(os.path.realpath(path).startswith(root) for path in paths)


def _work(file: CorpusFile) -> int:
    return file.size if file.kind in ("text", "jsonl") else file.size * COMPRESSION_RATIO


Group = list[tuple[Slice, int]]  # slices that stay together, each with its work in bytes


def _groups(
    files: Sequence[CorpusFile],
    row_groups: Mapping[int, Sequence[RowGroup]],
    options: Options,
    unit_bytes: int,
    *,
    cuttable: bool,
) -> list[Group]:
    """Slices in groups that the plan may shuffle: parts of one long document stay together, small files share one."""
    slice_bytes = max(unit_bytes // SLICES_PER_UNIT, MIN_SLICE_BYTES)
    groups: list[Group] = []
    small: Group = []
    for index, file in enumerate(files):
        one_document = file.kind == "text" and options.documents == "file"
        if one_document:
            parts = _ranges(index, file.size, unit_bytes if cuttable else max(file.size, 1))
        elif file.kind in ("text", "jsonl"):
            parts = _ranges(index, file.size, slice_bytes)
        elif file.kind == "parquet":
            parts = _row_ranges(index, row_groups[index], slice_bytes, unit_bytes)
        else:
            shares = _shares(_work(file), unit_bytes)
            parts = [(Slice(index, share, shares), _work(file) // shares) for share in range(shares)]
        if len(parts) > 1:
            groups += [parts] if one_document else [[part] for part in parts]
            continue
        small += parts
        if sum(work for _, work in small) >= slice_bytes:
            groups.append(small)
            small = []
    if small:
        groups.append(small)
    return groups


def _row_groups(file: CorpusFile, options: Options) -> list[RowGroup]:
    """A file that cannot be opened counts as one row, for the reader to report."""
    try:
        return TextColumn(file.path, options.text_key).row_groups()
    except DamagedRows as error:
        if options.skip_bad:
            return [RowGroup(1, file.size)]
        raise DepthpipeError(f"{file.path}: {error}: mend it, or go on without it with --skip-bad") from None


def _shares(work: int, unit_bytes: int) -> int:
    return min(MAX_SHARES, 1 + work // unit_bytes)


def _row_ranges(index: int, row_groups: Sequence[RowGroup], slice_bytes: int, unit_bytes: int) -> Group:
    """Large row groups in shares, and small ones together: each slice opens the file, which takes time."""
    slices: Group = []
    first = start = stop = work = 0
    for rows, text_bytes in row_groups:
        shares = _shares(text_bytes, unit_bytes)
        for share in range(shares):
            stop = first + rows * (share + 1) // shares
            work += text_bytes // shares
            if work >= slice_bytes and start < stop:
                slices.append((Slice(index, start, stop), work))
                start, work = stop, 0
        first += rows
    if start < stop:
        slices.append((Slice(index, start, stop), work))
    return slices


def _ranges(index: int, size: int, step: int) -> Group:
    starts = range(0, size, step) if size else [0]
    return [(Slice(index, start, min(start + step, size)), min(step, size - start)) for start in starts]
