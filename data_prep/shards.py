"""Shards: uncompressed tars of `.npy` token chunks, laid out so that the place of every token is arithmetic.

Every member but the last holds exactly `chunk_tokens` tokens, so member `k` starts `k * member_bytes` into the file,
and a shard reads as one memory map. Plain `tar` and plain `webdataset` read the same file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.errors import DepthpipeError

CHUNK_TOKENS = 65_536
TAR_BLOCK = 512
NPY_HEADER_BYTES = 128
DATA_OFFSET = TAR_BLOCK + NPY_HEADER_BYTES  # of the tokens in a member
TAR_END = bytes(2 * TAR_BLOCK)


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest lists it. `file` is relative to the dataset, `sha256` is of the whole file."""

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


def member_bytes(tokens: int, itemsize: int) -> int:
    """Bytes that a chunk of `tokens` takes in a tar: tar header, npy header, tokens, padding."""
    payload = NPY_HEADER_BYTES + tokens * itemsize
    return TAR_BLOCK + -(-payload // TAR_BLOCK) * TAR_BLOCK


def shard_bytes(tokens: int, itemsize: int, chunk_tokens: int) -> int:
    """Size in bytes of a shard of `tokens` tokens."""
    full, rest = divmod(tokens, chunk_tokens)
    last = member_bytes(rest, itemsize) if rest else 0
    return full * member_bytes(chunk_tokens, itemsize) + last + len(TAR_END)


class ShardWriter:
    """Appends packed tokens to a temporary file, which takes the place of `path` only when it is whole and on disk."""

    def __init__(self, path: Path, dtype: np.dtype[np.unsignedinteger], chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.path = path
        self.documents = 0
        self.tokens = 0
        self._dtype = dtype
        self._chunk_bytes = chunk_tokens * dtype.itemsize
        self._buffer = bytearray()
        self._members = 0
        self._sha256 = hashlib.sha256()
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by finish or discard)

    def append(self, packed: bytes) -> None:
        """Add ids packed as `dtype`."""
        self._buffer += packed
        self.tokens += len(packed) // self._dtype.itemsize
        if len(self._buffer) >= self._chunk_bytes:
            whole = len(self._buffer) // self._chunk_bytes * self._chunk_bytes
            for start in range(0, whole, self._chunk_bytes):
                self._write_member(self._buffer[start : start + self._chunk_bytes])
            del self._buffer[:whole]

    def finish(self) -> ShardInfo | None:
        """Make the shard appear under its path; None, and no file, when it has no tokens."""
        if not self.tokens:
            self.discard()
            return None
        if self._buffer:
            self._write_member(self._buffer)
        self._write(TAR_END)
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return ShardInfo(self.path.name, self.tokens, self.documents, size, self._sha256.hexdigest())

    def discard(self) -> None:
        """Forget what was written."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write_member(self, packed: bytes | bytearray) -> None:
        header = npy_header(len(packed) // self._dtype.itemsize, self._dtype.str)
        info = tarfile.TarInfo(f"{self.path.stem}_{self._members:06d}.npy")
        info.size = len(header) + len(packed)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        self._write(header)
        self._write(packed)
        self._write(bytes(-info.size % TAR_BLOCK))
        self._members += 1

    def _write(self, data: bytes | bytearray) -> None:
        self._file.write(data)
        self._sha256.update(data)


@functools.lru_cache
def npy_header(tokens: int, dtype: str) -> bytes:
    """The header of a one-dimensional `.npy` file; NumPy pads it to 128 bytes at these sizes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": (tokens,)})
    header = buffer.getvalue()
    assert len(header) == NPY_HEADER_BYTES
    return header


class DamagedShardError(DepthpipeError):
    """A shard that is missing, cannot be read, or is not what the manifest says."""


class ShardReader:
    """Random access to the tokens of one local shard.

    Reads with `pread`, not through a memory map: it is as fast from the page cache, and a file that shrinks or a disk
    that fails is an error with a name instead of the end of the process.
    """

    def __init__(self, path: Path, tokens: int, dtype: np.dtype[np.unsignedinteger], chunk_tokens: int) -> None:
        """Raises DamagedShardError when the file is missing, unreadable, or not of the size the manifest implies."""
        self.path = path
        self.tokens = tokens
        self._dtype = dtype
        self._itemsize = dtype.itemsize
        self._chunk_tokens = chunk_tokens
        self._member_bytes = member_bytes(chunk_tokens, dtype.itemsize)
        self._file = -1
        expected = shard_bytes(tokens, dtype.itemsize, chunk_tokens)
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(self._file).st_size
            last = (tokens - 1) // chunk_tokens
            headers = [os.pread(self._file, NPY_HEADER_BYTES, m * self._member_bytes + TAR_BLOCK) for m in (0, last)]
        except OSError as error:
            raise self._damaged(error.strerror) from None
        if size != expected:
            raise self._damaged(f"{size} bytes, its manifest says {expected}")
        counts = (min(tokens, chunk_tokens), tokens - last * chunk_tokens)
        if headers != [npy_header(count, dtype.str) for count in counts]:
            raise self._damaged("not the token chunks that its manifest describes")

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def read(self, start: int, out: memoryview) -> None:
        """Copy tokens from `start` on into `out`, which is bytes, as many as it holds.

        Raises DamagedShardError when the file gives them no longer.
        """
        itemsize = self._itemsize
        done = 0
        while done < len(out):
            chunk, offset = divmod(start + done // itemsize, self._chunk_tokens)
            size = min(len(out) - done, (self._chunk_tokens - offset) * itemsize)
            position = chunk * self._member_bytes + DATA_OFFSET + offset * itemsize
            self.read_at(position, out[done : done + size])
            done += size

    def read_at(self, position: int, out: memoryview) -> None:
        """Fill `out` from byte `position` of the file. Raises DamagedShardError."""
        try:
            size = os.preadv(self._file, [out], position)
        except OSError as error:
            raise self._damaged(error.strerror) from None
        if size != len(out):
            raise self._damaged("it became shorter while it was open")

    def chunks(self) -> Iterator[npt.NDArray[np.unsignedinteger]]:
        """The token chunks in order."""
        for start in range(0, self.tokens, self._chunk_tokens):
            chunk = np.empty(min(self._chunk_tokens, self.tokens - start), dtype=self._dtype)
            self.read(start, chunk.data.cast("B"))
            yield chunk

    def _damaged(self, reason: str | None) -> DamagedShardError:
        return DamagedShardError(f"{self.path}: damaged shard ({reason}): restore it or tokenize again")
