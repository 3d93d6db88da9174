"""Lines of compressed files, with one kind of error for whatever damages them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator

from data_prep.corpus import CorpusFile

# What came out of a piece is lost when damage follows in it, so pieces are as small as they can be at full speed.
GZIP_READ_BYTES = 1 << 15  # decompressed
ZSTD_READ_BYTES = 1 << 12  # compressed
STRIPE_BYTES = 1 << 20


class DamagedArchive(Exception):
    """The compressed stream ends early or does not decompress."""


class CompressedLines:
    """Iterates over one share of a compressed file's lines as (line number from 1, line with its newline).

    Share `s` of `n` has the lines that begin in every n-th stripe of a mebibyte. Each share decompresses the whole
    file, which is many times faster than encoding it, and splits only its own stripes into lines.
    """

    def __init__(self, file: CorpusFile, share: int, shares: int) -> None:
        self._file = file
        self._share, self._shares = share, shares
        self._stripe = 0
        self.number = 1  # of the line that is read now

    @property
    def is_ours(self) -> bool:
        """Whether the place read last belongs to this share."""
        return self._stripe % self._shares == self._share

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        begun: list[bytes] | None = None  # a line of ours that goes on in the next stripe
        at_line_start = True
        for stripe, data in enumerate(_stripes(_decompressed(self._file))):
            self._stripe = stripe
            start = 0
            if not at_line_start:
                start = data.find(b"\n") + 1
                if begun is not None:
                    begun.append(data[:start] if start else data)
                if not start:
                    continue
                if begun is not None:
                    yield self.number, b"".join(begun)
                    begun = None
                self.number += 1
            stop = max(start, data.rfind(b"\n") + 1)
            if self.is_ours:
                for line in data[start:stop].split(b"\n")[:-1]:
                    yield self.number, line + b"\n"
                    self.number += 1
                begun = [data[stop:]] if stop < len(data) else None
            else:
                self.number += data.count(b"\n", start)
            at_line_start = stop == len(data)
        if begun is not None:
            yield self.number, b"".join(begun)


def _stripes(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of exactly STRIPE_BYTES, but for the last. What came before damage is handed on."""
    buffer = bytearray()
    damage: DamagedArchive | None = None
    while True:
        try:
            block = next(blocks, None)
        except DamagedArchive as error:
            block, damage = None, error
        if block is None:
            break
        buffer += block
        while len(buffer) >= STRIPE_BYTES:
            yield bytes(buffer[:STRIPE_BYTES])
            del buffer[:STRIPE_BYTES]
    if damage:
        whole_lines = buffer.rfind(b"\n") + 1
        del buffer[whole_lines:]
    if buffer:
        yield bytes(buffer)
    if damage:
        raise damage


def _decompressed(file: CorpusFile) -> Iterator[bytes]:
    if file.size == 0:
        raise DamagedArchive("it is empty")
    try:
        yield from _gzip_blocks(file.path) if file.kind == "jsonl.gz" else _zstd_blocks(file.path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedArchive(str(error)) from None


def _gzip_blocks(path: str) -> Iterator[bytes]:
    with gzip.open(path) as stream:
        while block := stream.read1(GZIP_READ_BYTES):  # `read` would lose what comes before damage
            yield block


def _zstd_blocks(path: str) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    with open(path, "rb") as stream:
        while block := stream.read(ZSTD_READ_BYTES):
            while block:
                frame = frame or decompressor.decompressobj()
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise DamagedArchive(str(error)) from None
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise DamagedArchive("it ends before its last frame does")
