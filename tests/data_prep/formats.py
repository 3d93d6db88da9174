"""Writes the same texts in every input format, and reads all documents back."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import zstandard
from pyarrow import parquet

from data_prep.corpus import find_files
from data_prep.documents import DocumentReader
from data_prep.plan import Options, Plan

Write = Callable[[Path, Sequence[str]], None]


def as_jsonl(texts: Sequence[str]) -> bytes:
    return b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))


def write_parquet(path: Path, texts: Sequence[str], row_group_size: int | None = 7, **options: object) -> None:
    table = pyarrow.table({"id": range(len(texts)), "text": list(texts)})
    parquet.write_table(table, path, row_group_size=row_group_size, **options)


def write_frames(path: Path, texts: Sequence[str]) -> None:
    """Two zstd frames one after the other, as appending tools write them."""
    half = len(texts) // 2
    parts = (as_jsonl(texts[:half]), as_jsonl(texts[half:]))
    path.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, parts)))


WRITERS: dict[str, Write] = {
    "a.jsonl": lambda path, texts: path.write_bytes(as_jsonl(texts)),
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(as_jsonl(texts))),
    "a.jsonl.zst": write_frames,
    "a.parquet": write_parquet,
    "one-row-group.parquet": lambda path, texts: write_parquet(path, texts, row_group_size=None),
}


def texts_for(rng: random.Random, count: int = 60) -> list[str]:
    words = ["a", "word", "longer-word", "é", "日本語", "\n", "\t", "  ", '"', "\\", "\u2028", "\r\n"]
    return [f"{i}:" + " ".join(rng.choices(words, k=rng.choice([0, 1, 3, 80]))) for i in range(count)]


def read_all(directory: Path, **options: object) -> tuple[list[str], DocumentReader]:
    """Documents over all slices of the plan, fragments joined; each slice by the same reader."""
    files = find_files([str(directory)])
    chosen = Options(**options)
    reader = DocumentReader(chosen.text_key, chosen.documents, cuttable=True, skip_bad=chosen.skip_bad)
    texts: list[str] = []
    open_text = ""
    for unit in Plan.make(files, "", chosen, cuttable=True).units:
        for piece in unit:
            for fragment in reader.read(files[piece.file], piece.start, piece.stop):
                open_text += fragment.text
                if fragment.ends:
                    texts.append(open_text)
                    open_text = ""
    assert not open_text
    return texts, reader
