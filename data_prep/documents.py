"""Reads the documents of one slice of a corpus file, never holding more than a block of a long document in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import IO, NamedTuple

from data_prep.containers import CompressedLines, DamagedArchive
from data_prep.corpus import SUFFIXES, CorpusFile
from data_prep.errors import DepthpipeError
from data_prep.parquet import DamagedRows, RowGroup, TextColumn, values

READ_BYTES = 1 << 20
HEAD_BYTES = 1 << 16
LINE_BUFFER_BYTES = 1 << 16
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


@dataclass
class Counters:
    """What was read, and what could not be: nothing is lost silently."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    undecodable_bytes: int = 0
    skipped: int = 0
    skipped_examples: list[str] = field(default_factory=list)

    def add(self, other: Counters) -> None:
        """Add `other`'s counts to these."""
        for name in (f.name for f in fields(self) if f.type == "int"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped_examples = (self.skipped_examples + other.skipped_examples)[:5]


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
                yield from parse(line, file, partial(_line_number, file.path, position))
                position += len(line)

    def _is_compressed(self, file: CorpusFile, stream: IO[bytes], start: int) -> bool:
        """Whether what goes as plain text is none, which the file's first slice reports."""
        if not os.pread(stream.fileno(), 4, 0).startswith(MAGIC_NUMBERS):
            return False
        if start == 0:
            self._bad(f"{file.path}: compressed, which is read only as {', '.join(COMPRESSED_SUFFIXES)}")
        return True

    def _compressed_lines(self, file: CorpusFile, share: int, shares: int) -> Iterator[Fragment]:
        lines = CompressedLines(file, share, shares)
        try:
            for number, line in lines:
                yield from self._parse_json(line, file, partial(int, number))
        except DamagedArchive as error:
            if lines.is_ours:  # or else every share would report it
                self._bad(f"{file.path}:{lines.number}: damaged archive ({error})")

    def _rows(self, file: CorpusFile, start: int, stop: int) -> Iterator[Fragment]:
        try:
            column = TextColumn(file.path, self.text_key)
        except DamagedRows as error:
            self._bad(f"{file.path}: {error}")
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
                    yield from self._value(value, f"{file.path}: row {position} of row group {index}")
                row += len(batch)
                if row >= stop:
                    return
        except DamagedRows as error:
            if row >= start:  # or else the slices behind it would report it too
                self._bad(f"{file.path}: row group {index}: damaged ({error})")

    def _parse_json(self, line: bytes, file: CorpusFile, number: Callable[[], int]) -> Iterator[Fragment]:
        if not line.strip():
            return
        try:
            value = json.loads(self._decode(line).removeprefix(BYTE_ORDER_MARK))
            text = value[self.text_key]
        except (ValueError, RecursionError):
            self._bad(f"{file.path}:{number()}: not valid JSON")
        except (KeyError, TypeError, IndexError):
            self._bad(f"{file.path}:{number()}: no key {self.text_key!r} (another name goes with --text-key)")
        else:
            where = "" if isinstance(text, str) else f"{file.path}:{number()}"  # counting lines takes time
            yield from self._value(text, where)

    def _parse_line(self, line: bytes, file: CorpusFile, number: Callable[[], int]) -> Iterator[Fragment]:
        yield from self._whole(self._decode(line.removesuffix(b"\n")))

    def _value(self, value: object, where: str) -> Iterator[Fragment]:
        if isinstance(value, bytes):
            value = self._decode(value)
        if value is None:
            self.counters.empty_documents += 1
        elif isinstance(value, str):
            yield from self._whole(value)
        else:
            self._bad(f"{where}: {self.text_key!r} is not text")

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

    def _bad(self, what: str) -> None:
        if not self.skip_bad:
            raise DepthpipeError(f"{what}: mend it, or go on without it with --skip-bad")
        self.counters.skipped += 1
        if len(self.counters.skipped_examples) < 5:
            self.counters.skipped_examples.append(what)


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
