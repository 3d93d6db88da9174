"""Datasets behind a URL: shards come through webdataset into a local cache, whole and checked, ahead of their use."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.errors import DepthpipeError
from data_prep.manifest import MANIFEST, TOKENIZER_FILE, Manifest, write_atomically
from data_prep.shards import DamagedShardError, ShardInfo

logger = logging.getLogger(__name__)

DOWNLOADS_AT_ONCE = 4
CACHE_HELP = "make room there, name another data.cache_dir, or lower data.cache_bytes"
# webdataset reads http with curl, which says no more than these.
CURL_EXITS = {6: "host not found", 7: "connection refused", 22: "the server does not give it", 28: "no answer in time"}
BLOCK_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """Whether `path` is a URL that webdataset opens, and no directory."""
    return "://" in path or path.startswith("pipe:")


def load_manifest(path: str, cache_dir: str | Path | None = None) -> Manifest:
    """The manifest of a dataset, local or remote; a remote one's tokenizer is then in the cache beside it."""
    return RemoteDataset(path, cache_dir).manifest if is_remote(path) else Manifest.load(path)


class RemoteDataset:
    """A remote dataset and its local cache, which any number of processes may share."""

    def __init__(self, url: str, cache_dir: str | Path | None = None, cache_bytes: int | None = None) -> None:
        """Fetch manifest and tokenizer; `cache_bytes` limits the shards kept.

        Where the URL cannot be read now, what it last gave is in the cache and does. Raises DepthpipeError when nothing
        is, or the cache cannot be written.
        """
        self._url = url.rstrip("/")
        self._cache_bytes = cache_bytes
        root = cache_root(cache_dir)
        # Which dataset the URL held when it was last read, by its fingerprint.
        last = root / f"{hashlib.sha256(self._url.encode()).hexdigest()[:16]}.url"
        try:
            root.mkdir(parents=True, exist_ok=True)
            try:
                directory = self._fetch_manifest(root)
                write_atomically(last, directory.name.encode())
            except DepthpipeError as error:
                if not last.exists():
                    raise
                directory = root / last.read_text()
                logger.warning("%s; going on with what it last held, in %s", error, directory)
        except OSError as error:
            raise DepthpipeError(f"{root}: cannot write the cache ({error.strerror}): {CACHE_HELP}") from None
        self.manifest = Manifest.load(directory)
        self._wanted: set[int] = set()
        self._queue: queue.Queue[int] = queue.Queue()
        self._threads: list[threading.Thread] = []

    def fetch(self, shard: int) -> None:
        """Have shard number `shard` in the cache. Raises DamagedShardError when it is not to be had as listed."""
        info = self.manifest.shards[shard]
        target = self.manifest.directory / info.file
        if _touch(target, info):
            return
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others of this machine wait for it
            if not _touch(target, info):
                self._make_room(info.bytes)
                self._download(info, target)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch `shards` in the background, in this order. Errors show when a shard is read."""
        new = [shard for shard in dict.fromkeys(shards) if shard not in self._wanted]
        self._wanted = set(shards)
        for shard in new:
            self._queue.put(shard)
        while len(self._threads) < DOWNLOADS_AT_ONCE:  # daemons: a run that ends does not wait for downloads
            self._threads.append(threading.Thread(target=self._fetch_queued, name="depthpipe-fetch", daemon=True))
            self._threads[-1].start()

    def _fetch_manifest(self, root: Path) -> Path:
        """The dataset's directory in the cache, with manifest and tokenizer as they are behind the URL now."""
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=root) as staging:
            for name in (MANIFEST, TOKENIZER_FILE):
                (Path(staging) / name).write_bytes(b"".join(self._blocks(name)))
            # A dataset that is replaced behind its URL gets a directory of its own: no shard of another mixes in.
            directory = root / Manifest.load(staging).fingerprint
            (directory / "shards").mkdir(parents=True, exist_ok=True)
            for name in (MANIFEST, TOKENIZER_FILE):
                write_atomically(directory / name, (Path(staging) / name).read_bytes())
        return directory

    def _fetch_queued(self) -> None:
        while True:
            shard = self._queue.get()
            if shard in self._wanted:
                with contextlib.suppress(DamagedShardError):
                    self.fetch(shard)
            self._queue.task_done()

    def _download(self, info: ShardInfo, target: Path) -> None:
        temporary = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.partial")
        digest = hashlib.sha256()
        try:
            with open(temporary, "wb") as file:
                for block in self._blocks(info.file):
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != info.sha256:
                raise DamagedShardError(
                    f"{self._url}/{info.file}: damaged shard (not the listed SHA-256): restore it there"
                )
            os.replace(temporary, target)
        except DepthpipeError as error:
            raise DamagedShardError(str(error)) from None
        except OSError as error:
            raise DamagedShardError(f"{target}: cannot write the cache ({error.strerror}): {CACHE_HELP}") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _blocks(self, name: str) -> Iterator[bytes]:
        from webdataset.gopen import gopen  # imports torch where there is one, so only where it is needed

        try:
            with gopen(f"{self._url}/{name}", "rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    yield block
        except Exception as error:
            raise DepthpipeError(
                f"{self._url}/{name}: cannot read ({_reason(error)}): check the URL and access to it"
            ) from None

    def _make_room(self, needed: int) -> None:
        """Remove the shards used longest ago until `needed` bytes fit into the limit."""
        if self._cache_bytes is None:
            return
        shards = sorted((path.stat().st_mtime_ns, path) for path in self.manifest.directory.glob("shards/*.tar"))
        size = sum(path.stat().st_size for _, path in shards)
        for _, path in shards:
            if size + needed <= self._cache_bytes:
                return
            size -= path.stat().st_size
            path.unlink(missing_ok=True)  # whoever has it open reads on


def cache_root(cache_dir: str | Path | None) -> Path:
    """The directory of the cache: `cache_dir`, or where it is None the user's own."""
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthpipe"


def _reason(error: Exception) -> str:
    """What webdataset says in one line; where the command that it started has failed, what its exit code means."""
    status = re.search(r": exit (\d+) \(read\)", str(error))
    if status:
        return CURL_EXITS.get(int(status[1]), f"exit code {status[1]}")
    return (str(error).splitlines() or [repr(error)])[0]


def _touch(path: Path, info: ShardInfo) -> bool:
    """Whether the shard is in the cache; if so, note that it is in use."""
    try:
        os.utime(path)
        return path.stat().st_size == info.bytes
    except FileNotFoundError:
        return False
