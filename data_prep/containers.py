"""Lines of compressed files, with one kind of error for whatever damages them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from data_prep.corpus import CorpusFile

READ_BYTES = 1 << 12  # compressed: little, for it may hold a thousand times as much
STRIPE_BYTES = 1 << 20
PADDING = b"\0"  # with which some writers of gzip fill the last disk block


class DamagedArchive(Exception):
    """The compressed stream does not decompress, or not to what its checksum says."""


class TruncatedArchive(DamagedArchive):
    """The compressed stream ends early."""


class Damage(NamedTuple):
    """What is wrong with an archive, and how many bytes from its start on, decompressed, are sound all the same."""

    sound_bytes: int
    reason: str


@functools.cache
def find_damage(file: CorpusFile) -> Damage | None:
    """Decompress all of `file`, once in a process. None when it is sound.

    A member of gzip (a frame of zstd) that is corrupt may have given altered text long before that shows, for its
    checksum comes last: nothing of it is sound, nor what follows, whose place it hides. Of a file that only ends early,
    everything is. A frame of zstd has a checksum only if it was written with one (`zstd` does, its libraries do not
    unless told to): without one, altered text that still decompresses cannot be known.
    """
    size = sound = 0
    try:
        for data, is_checked in _blocks(file):
            size += len(data)
            if is_checked:
                sound = size
    except TruncatedArchive as error:
        return Damage(size, str(error))
    except DamagedArchive as error:
        return Damage(sound, str(error))
    return None


class CompressedLines:
    """Iterates over one share of a compressed file's lines as (line number from 1, line with its newline).

    Share `s` of `n` has the lines that begin in every n-th stripe of a mebibyte. Each share decompresses the whole
    file, which is many times faster than encoding it, and splits only its own stripes into lines. Of a damaged file
    it has the lines of the part that is sound, or with `checked=False` all that can be read, and raises DamagedArchive.
    """

    def __init__(self, file: CorpusFile, share: int, shares: int, *, checked: bool) -> None:
        self._file = file
        self._checked = checked
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
        for stripe, data in enumerate(_stripes(_decompressed(self._file, self._checked))):
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


def _decompressed(file: CorpusFile, checked: bool) -> Iterator[bytes]:
    damage = find_damage(file) if checked else None
    left = damage.sound_bytes if damage else None
    for data, _ in _blocks(file):
        yield data[:left]
        if left is not None:
            left -= len(data)
            if left <= 0:
                break
    if damage:
        raise DamagedArchive(damage.reason)


def _blocks(file: CorpusFile) -> Iterator[tuple[bytes, bool]]:
    """Decompressed data, each with whether a member (of gzip, a frame of zstd) ends with it and is sound so far."""
    if file.size == 0:
        raise DamagedArchive("it is empty")
    is_gzip = file.kind == "jsonl.gz"
    new_member, member_error = _gzip() if is_gzip else _zstd()
    member: Any = None
    ends_a_member = False
    with open(file.path, "rb") as stream:
        while block := stream.read(READ_BYTES):
            if is_gzip and ends_a_member:
                block = block.lstrip(PADDING)
            while block:
                member = member or new_member()
                try:
                    data = member.decompress(block)
                except member_error as error:
                    raise DamagedArchive(str(error)) from None
                ends_a_member = member.eof
                yield data, ends_a_member
                if not ends_a_member:
                    break
                block, member = member.unused_data, None
                if is_gzip:
                    block = block.lstrip(PADDING)
    if member is not None:
        raise TruncatedArchive("it ends early")


def _gzip() -> tuple[Callable[[], Any], type[Exception]]:
    return lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), zlib.error


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, zstandard.ZstdError
