"""The manifest of a dataset directory: the commit point of tokenizing, and all that reading needs to know."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DepthpipeError
from data_prep.shards import ShardInfo, ShardReader
from data_prep.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"


@dataclass(frozen=True)
class Manifest:
    """A dataset: its shards in stream order, and the tokenizer that made them (a copy lies beside the manifest)."""

    directory: Path
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: str
    end_of_document_id: int
    chunk_tokens: int
    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[ShardInfo, ...]
    format_version: int = FORMAT_VERSION

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / TOKENIZER_FILE

    @property
    def numpy_dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the token stream. The order of the data is a function of it."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Read and check `directory`'s manifest. Raises DepthpipeError when it is no dataset or does not add up."""
        directory = Path(directory)
        path = directory / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DepthpipeError(f"{directory}: not a dataset (no {MANIFEST}){_hint(directory)}") from None
        except (OSError, ValueError) as error:
            raise DepthpipeError(f"{path}: cannot read the manifest ({error}): tokenize again") from None
        return cls._parse(directory, path, content)

    @classmethod
    def _parse(cls, directory: Path, path: Path, content: Any) -> Manifest:
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise DepthpipeError(f"{path}: format version {version}, this depthpipe reads {FORMAT_VERSION}")
        try:
            shards = tuple(ShardInfo(**shard) for shard in content.pop("shards"))
            manifest = cls(directory=directory, shards=shards, **content)
        except (TypeError, KeyError) as error:
            raise DepthpipeError(f"{path}: damaged manifest ({error}): tokenize again") from None
        for name in ("tokens", "documents"):
            total = sum(getattr(shard, name) for shard in shards)
            if total != getattr(manifest, name):
                raise DepthpipeError(f"{path}: damaged manifest: {name} is not the sum over its shards: tokenize again")
        return manifest

    def save(self) -> None:
        """Write the manifest by atomic rename."""
        write_json(self.directory / MANIFEST, self._content())

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises DepthpipeError unless `tokenizer` made these shards."""
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise DepthpipeError(
                f"{tokenizer.path}: not the tokenizer of the shards in {self.directory}: "
                f"use {self.tokenizer_path} or tokenize again"
            )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of this dataset, from the copy beside the manifest. Raises DepthpipeError if replaced."""
        tokenizer = Tokenizer.load(self.tokenizer_path)
        self.check_tokenizer(tokenizer)
        return tokenizer

    def open_shard(self, index: int) -> ShardReader:
        """Open local shard `index`. Raises DepthpipeError when its file is missing or damaged."""
        shard = self.shards[index]
        return ShardReader(self.directory / shard.file, shard.tokens, self.numpy_dtype, self.chunk_tokens)

    def _content(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        del content["directory"]
        return content


def write_atomically(path: Path, content: bytes) -> None:
    """Write so that `path` holds either its old bytes or all of the new ones, whatever happens."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """`write_atomically` of `content` as JSON."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


@contextmanager
def write_errors(directory: Path) -> Iterator[None]:
    """Turn a failure to write, a full disk above all, into one line. What is finished stays usable."""
    try:
        yield
    except OSError as error:
        raise DepthpipeError(
            f"{directory}: cannot write ({error.strerror or error}): finished shards are kept; "
            "make room and run the same command again"
        ) from None


def _hint(directory: Path) -> str:
    if (directory / "train" / MANIFEST).exists():
        return f": name one of its halves, {directory / 'train'} or {directory / 'validation'}"
    if (directory / "unfinished").exists():
        return ": its tokenizing is unfinished; run the same `depthpipe tokenize` command again"
    if not directory.exists():
        return ": the directory does not exist; make it with `depthpipe tokenize`"
    return ": make one with `depthpipe tokenize`"
