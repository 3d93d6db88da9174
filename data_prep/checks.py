"""Checks a dataset against its manifest, and gathers what `data inspect` shows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.encoder import token_dtype
from data_prep.errors import DepthpipeError
from data_prep.manifest import MANIFEST, Manifest
from data_prep.shards import ShardInfo
from data_prep.tokenizer import Tokenizer

READ_BYTES = 1 << 20
SAMPLE_TOKENS = 120


def verify(directory: str | Path, progress: Callable[[int, int], None] = lambda *_: None) -> list[str]:
    """Everything wrong with a dataset, one line each; an empty list when every byte is as it was written.

    Reads every shard once. `progress(bytes read, bytes to read)`. Raises DepthpipeError when there is no manifest to
    check against.
    """
    manifest = Manifest.load(directory)
    problems: list[str] = []
    try:
        problems += _verify_facts(manifest, manifest.load_tokenizer())
    except DepthpipeError as error:
        problems.append(str(error))
    total = sum(shard.bytes for shard in manifest.shards)
    read = 0
    for index, shard in enumerate(manifest.shards):
        problem = _verify_shard(manifest, index, shard)
        if problem:
            problems.append(f"{manifest.directory / shard.file}: {problem}")
        read += shard.bytes
        progress(read, total)
    listed = {manifest.directory / shard.file for shard in manifest.shards}
    for path in sorted((manifest.directory / "shards").glob("*")):
        if path not in listed:
            problems.append(f"{path}: not in the manifest")
    return problems


def _verify_facts(manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    """What the manifest says of its tokenizer, and of sums over its shards, that is not so."""
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size),
        "end_of_document_id": tokenizer.end_of_document_id,
        "tokens": sum(shard.tokens for shard in manifest.shards),
        "documents": sum(shard.documents for shard in manifest.shards),
    }
    path = manifest.directory / MANIFEST
    return [
        f"{path}: {name} is {said!r}, but should be {fact!r}"
        for name, fact in facts.items()
        if (said := getattr(manifest, name)) != fact
    ]


def _verify_shard(manifest: Manifest, index: int, shard: ShardInfo) -> str | None:
    path = manifest.directory / shard.file
    try:
        size, digest = _sha256(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot read ({error.strerror})"
    if size != shard.bytes:
        return f"{size} bytes, the manifest says {shard.bytes}"
    if digest != shard.sha256:
        return "SHA-256 differs from the manifest's"
    try:
        reader = manifest.open_shard(index)
    except DepthpipeError as error:
        return str(error).removeprefix(f"{path}: ").rpartition(": ")[0]
    documents = sum(int(np.count_nonzero(chunk == manifest.end_of_document_id)) for chunk in reader.chunks())
    if documents != shard.documents:
        return f"{documents} documents, the manifest says {shard.documents}"
    return None


def _sha256(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


@dataclass(frozen=True)
class Statistics:
    """`length_histogram`: for each power of two, how many documents have fewer tokens than it (and not than half)."""

    manifest: Manifest
    length_histogram: dict[int, int]
    longest_document: int
    samples: list[str]

    @property
    def bytes_per_token(self) -> float:
        return self.manifest.text_bytes / self.manifest.tokens


def statistics(directory: str | Path, samples: int = 3) -> Statistics:
    """Read all of a dataset once and summarise it. Raises DepthpipeError for a missing or damaged one."""
    manifest = Manifest.load(directory)
    tokenizer = manifest.load_tokenizer()
    histogram: dict[int, int] = {}
    longest = 0
    for lengths in _document_lengths(manifest):
        longest = max(longest, int(lengths.max(initial=0)))
        for power, count in zip(*np.unique(np.ceil(np.log2(lengths + 1)), return_counts=True), strict=True):
            histogram[2 ** int(power)] = histogram.get(2 ** int(power), 0) + int(count)
    texts = []
    for number in range(samples):
        shard = math.floor((number + 0.5) / samples * len(manifest.shards))
        reader = manifest.open_shard(shard)
        tokens = np.empty(min(SAMPLE_TOKENS, reader.tokens), dtype=manifest.numpy_dtype)
        reader.read((reader.tokens - len(tokens)) // 2, tokens.data.cast("B"))
        texts.append(tokenizer.decode(tokens.tolist()))
    return Statistics(manifest, dict(sorted(histogram.items())), longest, texts)


def _document_lengths(manifest: Manifest) -> Iterator[npt.NDArray[np.int64]]:
    """Tokens of each document without its end; documents cross chunks and shards."""
    open_tokens = 0
    for index in range(len(manifest.shards)):
        for chunk in manifest.open_shard(index).chunks():
            (ends,) = np.nonzero(chunk == manifest.end_of_document_id)
            if len(ends):
                lengths = np.diff(ends, prepend=-1) - 1
                lengths[0] += open_tokens
                yield lengths
                open_tokens = len(chunk) - 1 - int(ends[-1])
            else:
                open_tokens += len(chunk)
