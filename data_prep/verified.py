"""Local shards are read against their checksums, once on each machine: a damaged one is never trained on."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from data_prep.shards import DamagedShardError, ShardInfo


class VerifiedShards:
    """Remembers which files were found to be what their manifests say, in an empty file for each.

    A file that is written to, or another one under the same path, is checked again: its inode and its times differ.
    """

    def __init__(self, cache_root: Path) -> None:
        self._directory = cache_root / "verified"

    def check(self, path: Path, info: ShardInfo) -> None:
        """Raises DamagedShardError unless `path` has the bytes that `info` says; it is read whole the first time."""
        try:
            status = os.stat(path)
            file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            note = self._directory / hashlib.sha256(repr((info.sha256, file)).encode()).hexdigest()
            if note.exists():
                return
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DamagedShardError(_message(path, str(error.strerror))) from None
        if digest != info.sha256:
            raise DamagedShardError(_message(path, "not the SHA-256 in its manifest"))
        with contextlib.suppress(OSError):  # without a place for notes it is read again next time
            self._directory.mkdir(parents=True, exist_ok=True)
            note.touch()


def _message(path: Path, reason: str) -> str:
    return f"{path}: damaged shard ({reason}): restore it or tokenize again"
