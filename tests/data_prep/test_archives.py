"""Compressed inputs: damage is named with file and line, and everything in front of it is kept."""

from __future__ import annotations

import gzip
import random
import re
import zlib
from pathlib import Path

import pytest
import zstandard

from data_prep import containers, plan
from data_prep.errors import DepthpipeError
from tests.data_prep.formats import WRITERS, as_jsonl, read_all


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_archive_is_named_or_its_sound_start_kept(
    name: str, damage: str, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 20_000)  # several shares
    monkeypatch.setattr(containers, "STRIPE_BYTES", 1000)
    monkeypatch.setattr(containers, "GZIP_READ_BYTES", 500)
    monkeypatch.setattr(containers, "ZSTD_READ_BYTES", 500)
    texts = [f"{i} " + "".join(rng.choices("abcdefghijklmnop", k=300)) for i in range(400)]
    path = tmp_path / name
    if name.endswith("zst"):
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        blocks = [as_jsonl(texts[i : i + 20]) for i in range(0, 400, 20)]
        path.write_bytes(b"".join(map(compressor.compress, blocks)))
    else:
        path.write_bytes(gzip.compress(as_jsonl(texts)))
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) * 2 // 3 :]
    else:
        data[len(data) * 2 // 3] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(DepthpipeError, match=rf"{name}:\d+: (damaged archive|not valid JSON|no key)"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert reader.counters.skipped >= 1
    assert set(texts[:200]) <= set(got)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_damage_in_the_middle_of_a_stream_loses_little_in_front_of_it(
    name: str, tmp_path: Path, rng: random.Random
) -> None:
    texts = [f"{i} " + "".join(rng.choices("abcdefghijklmnop", k=60)) for i in range(20_000)]
    sound, rest = as_jsonl(texts[:15_000]), as_jsonl(texts[15_000:])
    if name.endswith("gz"):
        gzip_stream = zlib.compressobj(wbits=31)
        start = gzip_stream.compress(sound) + gzip_stream.flush(zlib.Z_FULL_FLUSH)
        data = bytearray(start + gzip_stream.compress(rest) + gzip_stream.flush())
    else:
        frame = zstandard.ZstdCompressor().compressobj()
        start = frame.compress(sound) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        data = bytearray(start + frame.compress(rest) + frame.flush())
    data[len(start) : len(start) + 8] = b"\xff" * 8  # of a type of block that neither format has
    (tmp_path / name).write_bytes(data)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert got == texts[: len(got)] and reader.counters.skipped == 1
    assert f"{name}:{len(got) + 1}: damaged archive" in reader.counters.skipped_examples[0]
    lost = len(sound) - len(as_jsonl(got))
    assert 0 <= lost < 150_000, "at most a block of zstd, which is 128 KiB"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_an_empty_file_that_should_be_an_archive_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DepthpipeError, match=rf"{name}.*(empty|not a readable)"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert got == ["text"] and reader.counters.skipped == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_everything_in_front_of_trailing_garbage_is_kept(name: str, tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(500)]
    WRITERS[name](tmp_path / name, texts)
    with open(tmp_path / name, "ab") as stream:
        stream.write(b"trailing garbage")
    with pytest.raises(DepthpipeError, match=rf"{name}:501: damaged archive"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert got == texts and reader.counters.skipped == 1


@pytest.mark.parametrize("documents", ["file", "line"])
def test_compressed_text_is_not_taken_for_text(documents: str, tmp_path: Path, small_pieces: None) -> None:
    (tmp_path / "a.txt").write_bytes(gzip.compress(random.Random(0).randbytes(2000)))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(as_jsonl(["json"])))
    with pytest.raises(
        DepthpipeError,
        match=re.escape("a.txt: compressed, which is read only as .jsonl.gz, .jsonl.zst, .json.gz, .json.zst: mend"),
    ):
        read_all(tmp_path, documents=documents)
    got, reader = read_all(tmp_path, documents=documents, skip_bad=True)
    assert got == ["json"] and reader.counters.skipped == 1
