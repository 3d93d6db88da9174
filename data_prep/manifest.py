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

FORMAT_VERSION = 2
SEAL = "sha256"
MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
MAKE_ANOTHER = "restore it from a copy, or tokenize to another --out"  # its own directory may hold the corpus too


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
            data = path.read_bytes()
            content = json.loads(data)
        except FileNotFoundError:
            raise DepthpipeError(f"{directory}: not a dataset (no {MANIFEST}){_hint(directory)}") from None
        except OSError as error:
            raise DepthpipeError(f"{path}: cannot read ({error.strerror}): check the directory") from None
        except ValueError:
            raise _damaged_manifest(path) from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise DepthpipeError(
                f"{path}: format version {version}, this depthpipe reads {FORMAT_VERSION}: {MAKE_ANOTHER}"
            )
        if not is_sealed(data):
            raise _damaged_manifest(path)
        del content[SEAL]
        try:
            shards = tuple(ShardInfo(**shard) for shard in content.pop("shards"))
            return cls(directory=directory, shards=shards, **content)
        except (TypeError, KeyError):
            raise _damaged_manifest(path) from None

    def save(self) -> None:
        """Write the manifest by atomic rename."""
        write_sealed(self.directory / MANIFEST, self._content())

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of this dataset, from the copy beside the manifest.

        Raises DepthpipeError if it is missing, or not the one that made the shards.
        """
        path = self.tokenizer_path
        remedy = "restore it: any copy of the tokenizer that made the shards will do"
        if not path.exists():
            raise DepthpipeError(f"{path}: missing: {remedy}")
        try:
            tokenizer = Tokenizer.load(path)
        except DepthpipeError:
            raise DepthpipeError(f"{path}: damaged (no tokenizer): {remedy}") from None
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise DepthpipeError(f"{path}: not the tokenizer that made the shards: {remedy}")
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


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """`write_json` of `content`, and last in it, under the key SEAL, the SHA-256 of the bytes before."""
    unsealed = {key: value for key, value in content.items() if key != SEAL}
    write_atomically(path, _sealed(json.dumps(unsealed, indent=1).encode().removesuffix(b"\n}")))


def is_sealed(data: bytes) -> bool:
    """Whether `data` is byte for byte what `write_sealed` wrote."""
    return data == _sealed(data[: -len(_sealed(b""))])


def _sealed(body: bytes) -> bytes:
    return body + f',\n "{SEAL}": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _damaged_manifest(path: Path) -> DepthpipeError:
    return DepthpipeError(f"{path}: damaged or edited manifest: {MAKE_ANOTHER}")


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
    if (unfinished := directory / "unfinished").exists():
        if _all_units_are_done(unfinished):
            return f": all its parts are done: run `depthpipe data merge {directory}`"
        return ": its tokenizing is unfinished; run the same `depthpipe tokenize` command again"
    if not directory.exists():
        return ": the directory does not exist; make it with `depthpipe tokenize`"
    return ": make one with `depthpipe tokenize`"


def _all_units_are_done(unfinished: Path) -> bool:
    try:
        units = json.loads((unfinished / "job.json").read_bytes())["units"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(len(list(unfinished.glob("unit_*.json"))) == units)
