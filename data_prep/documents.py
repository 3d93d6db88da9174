"""Reads the documents of one slice of a corpus file, never holding more than a block of a long document in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import IO, Any, NamedTuple

from data_prep.containers import CompressedLines, DamagedArchive, find_damage
from data_prep.corpus import SUFFIXES, CorpusFile
from data_prep.errors import DepthpipeError
from data_prep.parquet import DamagedRows, RowGroup, TextColumn, values

READ_BYTES = 1 << 20
HEAD_BYTES = 1 << 16
LINE_BUFFER_BYTES = 1 << 16
EXAMPLES = 5  # shown of what was skipped
BYTE_ORDER_MARK = "\ufeff"  # some editors begin a file with it, and joined files have it inside
MAGIC_NUMBERS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zX", b"PK\x03\x04")  # gzip, zstd, xz, zip: none begins a text
COMPRESSED_SUFFIXES = [suffix for suffix, kind in SUFFIXES.items() if kind in ("jsonl.gz", "jsonl.zst")]
# Where the encoder may be restarted inside a document: in front of a run of spaces, and after a newline.
CUT = re.compile(rb"(?<=\n)|(?<=[^ ])(?= )")


class Slice(NamedTuple):
    """A part of one file: a range of bytes of text and jsonl, or of rows of parquet.

    Of a compressed file, which has no other way in than from its start: share `start` of `stop` shares of its lines.
    """

    file: int
    start: int
    stop: int


class Fragment(NamedTuple):
    """Consecutive text of one document, as UTF-8 where bytes are meant.

    `head` is the document's first HEAD_BYTES bytes, the same for all its fragments and whatever format it came in.
    """

    head: bytes
    text: str
    ends: bool


class Skipped(NamedTuple):
    """Something that could not be read. They sort as they are shown: damaged archives first, then by file and place.

    `place` is a byte of plain files, a line of compressed ones, a row (or its group, in `group`) of parquet.
    """

    is_line: bool
    path: str
    group: int
    place: int
    what: str


@dataclass
class Counters:
    """What was read, and what could not be: nothing is lost silently.

    `skipped_examples` are the first in order of all that was skipped, whichever worker came to them first.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    undecodable_bytes: int = 0
    skipped: int = 0
    skipped_examples: list[Skipped] = field(default_factory=list)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Counters:
        """From what `vars` gave, through JSON and back."""
        return cls(**record | {"skipped_examples": [Skipped(*example) for example in record["skipped_examples"]]})

    def skip(self, is_line: bool, path: str, group: int, place: int, what: Callable[[], str]) -> None:
        """Count something that could not be read; `what` is called if it is an example to show."""
        self.skipped += 1
        key = (is_line, path, group, place)
        if len(self.skipped_examples) < EXAMPLES or key < self.skipped_examples[-1][:-1]:
            self.skipped_examples = sorted([*self.skipped_examples, Skipped(*key, what())])[:EXAMPLES]

    def add(self, other: Counters) -> None:
        """Add `other`'s counts to these."""
        for name in (f.name for f in fields(self) if f.type == "int"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped_examples = sorted(self.skipped_examples + other.skipped_examples)[:EXAMPLES]


@dataclass
class DocumentReader:
    """Turns slices into documents.

    `documents`: what a document of a plain text file is, the whole `file` or each `line`. `cuttable`: whether a
    document may be handed on in fragments, which asks for an encoder that is exact at every CUT. `skip_bad`: count
    what cannot be read and go on, where the default is a DepthpipeError that names file and line.
    """

    text_key: str
    documents: str
    cuttable: bool
    skip_bad: bool
    counters: Counters = field(default_factory=Counters)

    def read(self, file: CorpusFile, start: int, stop: int) -> Iterator[Fragment]:
        """Documents of `file` that begin in the slice (for a document cut over slices: its text in the slice)."""
        try:
            if file.kind == "text" and self.documents == "file":
                yield from self._text_file(file, start, stop)
            elif file.kind == "parquet":
                yield from self._rows(file, start, stop)
            elif file.kind in ("text", "jsonl"):
                yield from self._lines(file, start, stop)
            else:
                yield from self._compressed_lines(file, start, stop)
        except OSError as error:
            raise DepthpipeError(f"{file.path}: cannot read ({error.strerror or error}): check the file") from None

    def _text_file(self, file: CorpusFile, start: int, stop: int) -> Iterator[Fragment]:
        if file.size == 0:
            self.counters.empty_documents += 1
            return
        with open(file.path, "rb") as stream:
            if self._is_compressed(file, stream, start):
                return
            head = _head(stream.read(HEAD_BYTES + 3).decode("utf-8", "replace"))  # 3: no half character in the head
            start = first_cut(stream, start, file.size)
            stop = first_cut(stream, stop, file.size)
            stream.seek(start)
            rest = bytearray()
            position = start
            while position < stop:
                block = stream.read(min(READ_BYTES, stop - position))
                if not block:
                    raise OSError("it became shorter while it was read")
                position += len(block)
                searched = len(rest)
                rest += block
                at_end = position == stop
                cut = len(rest) if at_end else last_cut(rest, searched) if self.cuttable else 0
                if cut:
                    yield Fragment(head, self._decode(bytes(rest[:cut])), ends=at_end and stop == file.size)
                    del rest[:cut]

    def _lines(self, file: CorpusFile, start: int, stop: int) -> Iterator[Fragment]:
        parse = self._parse_json if file.kind == "jsonl" else self._parse_line
        with open(file.path, "rb", buffering=LINE_BUFFER_BYTES) as stream:
            if self._is_compressed(file, stream, start):
                return
            if start:
                stream.seek(start - 1)
                # Not further than the slice, for a line that is longer than many slices would be read in each.
                if not stream.readline(stop - start).endswith(b"\n"):
                    return
            position = stream.tell()
            while position < stop:
                line = stream.readline()
                if not line:
                    break
                yield from parse(line, file, position)
                position += len(line)

    def _is_compressed(self, file: CorpusFile, stream: IO[bytes], start: int) -> bool:
        """Whether what goes as plain text is none, which the file's first slice reports."""
        if not os.pread(stream.fileno(), 4, 0).startswith(MAGIC_NUMBERS):
            return False
        if start == 0:
            suffixes = ", ".join(COMPRESSED_SUFFIXES)
            self._bad(file, lambda: f"{file.path}: compressed, which is read only as {suffixes}", is_line=False)
        return True

    def _compressed_lines(self, file: CorpusFile, share: int, shares: int) -> Iterator[Fragment]:
        lines = CompressedLines(file, share, shares, checked=self.skip_bad)
        try:
            for number, line in lines:
                yield from self._parse_json(line, file, number)
        except DamagedArchive as error:
            # To skip it, one share reports it. Without that no share may end as if its lines were sound.
            if lines.is_ours or not self.skip_bad:
                reason = f"{file.path}:{lines.number}: damaged archive ({error})"
                remark = ", nothing taken from there on" if self.skip_bad else ""
                self._bad(file, lambda: reason + remark, place=lines.number, is_line=False)
        except DepthpipeError:
            if damage := find_damage(file):  # of which a line that is no JSON is only a sign
                self._bad(file, lambda: f"{file.path}:{lines.number}: damaged archive ({damage.reason})")
            raise

    def _rows(self, file: CorpusFile, start: int, stop: int) -> Iterator[Fragment]:
        try:
            column = TextColumn(file.path, self.text_key)
        except DamagedRows as error:
            reason = f"{file.path}: {error}"
            self._bad(file, lambda: reason, is_line=False)
            return
        first = 0
        for index, group in enumerate(column.row_groups()):
            if first < stop and start < first + group.rows:
                yield from self._row_group(file, column, index, group, max(start - first, 0), stop - first)
            first += group.rows

    def _row_group(
        self, file: CorpusFile, column: TextColumn, index: int, group: RowGroup, start: int, stop: int
    ) -> Iterator[Fragment]:
        row = 0
        try:
            for batch in column.batches(index, group):
                skipped = max(start - row, 0)
                for position, value in enumerate(values(batch[skipped : max(stop - row, 0)]), row + skipped):
                    yield from self._value(value, file, position, index)
                row += len(batch)
                if row >= stop:
                    return
        except DamagedRows as error:
            if row >= start:  # or else the slices behind it would report it too
                reason = f"{file.path}: row group {index}: damaged ({error})"
                self._bad(file, lambda: reason, group=index, place=row, is_line=False)

    def _parse_json(self, line: bytes, file: CorpusFile, place: int) -> Iterator[Fragment]:
        if not line.strip():
            return
        try:
            value = json.loads(self._decode(line).removeprefix(BYTE_ORDER_MARK))
            text = value[self.text_key]
        except (ValueError, RecursionError):
            self._bad(file, lambda: f"{_where(file, place)}: not valid JSON", place=place)
        except (KeyError, TypeError, IndexError):
            message = f"no key {self.text_key!r} (another name goes with --text-key)"
            self._bad(file, lambda: f"{_where(file, place)}: {message}", place=place)
        else:
            yield from self._value(text, file, place)

    def _parse_line(self, line: bytes, file: CorpusFile, place: int) -> Iterator[Fragment]:
        yield from self._whole(self._decode(line.removesuffix(b"\n")))

    def _value(self, value: object, file: CorpusFile, place: int, group: int = 0) -> Iterator[Fragment]:
        if isinstance(value, bytes):
            value = self._decode(value)
        if value is None:
            self.counters.empty_documents += 1
        elif isinstance(value, str):
            yield from self._whole(value)
        else:
            message = f"{self.text_key!r} is not text"
            self._bad(file, lambda: f"{_where(file, place, group)}: {message}", place=place, group=group)

    def _whole(self, text: str) -> Iterator[Fragment]:
        if not text:
            self.counters.empty_documents += 1
            return
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
            text = self._decode(text.encode("utf-8", "surrogatepass"))
        head = _head(text)
        start = 0
        while self.cuttable and (stop := cut_after(text, start)):
            yield Fragment(head, text[start:stop], ends=False)
            start = stop
        yield Fragment(head, text[start:], ends=True)

    def _decode(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.counters.undecodable_bytes += len(data) - len(data.decode("utf-8", "ignore").encode())
            return data.decode("utf-8", "replace")

    def _bad(
        self,
        file: CorpusFile,
        what: Callable[[], str],
        *,
        place: int = 0,
        group: int = 0,
        is_line: bool = True,
    ) -> None:
        if not self.skip_bad:
            raise DepthpipeError(f"{what()}: mend it, or go on without it with --skip-bad") from None
        self.counters.skip(is_line, file.path, group, place, what)


def _where(file: CorpusFile, place: int, group: int = 0) -> str:
    if file.kind == "parquet":
        return f"{file.path}: row {place} of row group {group}"
    number = _line_number(file.path, place) if file.kind in ("text", "jsonl") else place
    return f"{file.path}:{number}"


def _head(text: str) -> bytes:
    return text[:HEAD_BYTES].encode()[:HEAD_BYTES]


def first_cut(stream: IO[bytes], position: int, size: int) -> int:
    """The first place at or after `position` where a document may be cut; `size` when there is none."""
    if position <= 0 or position >= size:
        return max(0, min(position, size))
    stream.seek(position - 1)
    window = stream.read(READ_BYTES)
    searched = 1
    while True:
        match = CUT.search(window, searched)
        if match and match.start() < len(window):
            return position - 1 + match.start()
        more = stream.read(len(window))
        if not more:
            return size
        searched = len(window)
        window += more


def last_cut(data: bytes | bytearray, start: int = 0) -> int:
    """The last place in `data`, from about `start` on, where a document may be cut; 0 when there is none."""
    newline = data.rfind(b"\n", start) + 1
    space = data.rfind(b" ", start)
    while space > 0 and data[space - 1] == ord(" "):
        space -= 1
    return max(newline, space, 0)


def cut_after(text: str, start: int) -> int:
    """Where `text` may be cut, some READ_BYTES after `start`; 0 when there is no such place or little text is left."""
    characters = READ_BYTES
    while start + characters < len(text):
        piece = text[start : start + characters].encode()
        if cut := last_cut(piece):
            return start + len(piece[:cut].decode())
        characters *= 2
    return 0


def _line_number(path: str, position: int) -> int:
    with open(path, "rb") as stream:
        newlines = 0
        while position > 0 and (block := stream.read(min(READ_BYTES, position))):
            newlines += block.count(b"\n")
            position -= len(block)
    return newlines + 1
