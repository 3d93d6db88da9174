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
from data_prep.corpus import find_files
from data_prep.documents import DocumentReader
from data_prep.errors import DepthpipeError
from tests.data_prep.formats import WRITERS, as_jsonl, read_all


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_archive_is_named_or_its_sound_start_kept(
    name: str, damage: str, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 20_000)  # several shares
    monkeypatch.setattr(containers, "STRIPE_BYTES", 1000)
    monkeypatch.setattr(containers, "READ_BYTES", 500)
    texts = [f"{i} " + "".join(rng.choices("abcdefghijklmnop", k=300)) for i in range(400)]
    path = tmp_path / name
    if name.endswith("zst"):
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        blocks = [as_jsonl(texts[i : i + 20]) for i in range(0, 400, 20)]
        path.write_bytes(b"".join(map(compressor.compress, blocks)))
    else:
        path.write_bytes(b"".join(gzip.compress(as_jsonl(texts[i : i + 20])) for i in range(0, 400, 20)))
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) * 2 // 3 :]
    else:
        data[len(data) * 2 // 3] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(DepthpipeError, match=rf"{name}:\d+: damaged archive \(.+\): mend it"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert reader.counters.skipped == 1
    assert sorted(got) == sorted(texts[: len(got)]) and 250 < len(got) < 280
    assert len(got) % 20 == 0 or damage == "truncated", "nothing of a corrupt member"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_stream_that_ends_early_loses_little_in_front_of_it(name: str, tmp_path: Path, rng: random.Random) -> None:
    texts = [f"{i} " + "".join(rng.choices("abcdefghijklmnop", k=60)) for i in range(20_000)]
    sound, rest = as_jsonl(texts[:15_000]), as_jsonl(texts[15_000:])
    if name.endswith("gz"):
        gzip_stream = zlib.compressobj(wbits=31)
        start = gzip_stream.compress(sound) + gzip_stream.flush(zlib.Z_FULL_FLUSH)
        data = start + gzip_stream.compress(rest)
    else:
        frame = zstandard.ZstdCompressor().compressobj()
        start = frame.compress(sound) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        data = start + frame.compress(rest)
    (tmp_path / name).write_bytes(data[: len(start) + 8])
    got, reader = read_all(tmp_path, skip_bad=True)
    assert got == texts[: len(got)] and reader.counters.skipped == 1
    assert f"{name}:{len(got) + 1}: damaged archive (it ends early)" in reader.counters.skipped_examples[0].what
    lost = len(sound) - len(as_jsonl(got))
    assert 0 <= lost < 150_000, "at most a block of zstd, which is 128 KiB"


@pytest.mark.parametrize("overwritten", range(10))
def test_no_altered_text_is_taken_from_a_corrupt_gzip_member(
    overwritten: int, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deflate turns a few wrong bytes into other text that goes on to the end; only the checksum there tells."""
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 20_000)
    monkeypatch.setattr(containers, "STRIPE_BYTES", 1000)
    texts = [f"{i} " + " ".join(rng.choices(["the", "cat", "sat", "on", "mats"], k=200)) for i in range(235)]
    first, second = as_jsonl(texts[:100])[:-5], as_jsonl(texts[:100])[-5:] + as_jsonl(texts[100:])
    start, data = gzip.compress(first), bytearray(gzip.compress(second))
    place = len(data) * (overwritten + 1) // 12
    data[place : place + 4] = b"WXYZ"
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(start + data)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert sorted(got) == sorted(texts[:99]), "the line that goes on in the corrupt member is none"
    assert (
        reader.counters.skipped == 1 and "a.jsonl.gz:100: damaged archive" in reader.counters.skipped_examples[0].what
    )
    with pytest.raises(DepthpipeError, match=r"a\.jsonl\.gz:\d+: damaged archive \(.+\): mend it"):
        read_all(tmp_path)


def test_without_skip_bad_no_share_of_a_damaged_archive_ends_as_if_it_were_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "STRIPE_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(as_jsonl([f"document {i}" for i in range(2000)]))[:-20])
    (file,) = find_files([str(path)])
    for share in range(4):
        with pytest.raises(DepthpipeError, match="damaged archive"):
            list(DocumentReader("text", "file", cuttable=True, skip_bad=False).read(file, share, 4))


def test_an_archive_filled_up_with_zeros_is_sound_and_one_of_zeros_alone_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_jsonl(["a"])) + bytes(10_000))
    assert read_all(tmp_path, skip_bad=True)[0] == ["a"]
    (tmp_path / "a.jsonl.gz").write_bytes(bytes(5_000))
    got, reader = read_all(tmp_path, skip_bad=True)
    assert (got, reader.counters.skipped) == ([], 1)


def test_damaged_archives_come_first_among_what_was_skipped_then_files_and_lines(
    tmp_path: Path, small_pieces: None
) -> None:
    (tmp_path / "a.jsonl").write_text("bad\n" * 40)
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(as_jsonl(["x"]))[:-9])
    _, reader = read_all(tmp_path, skip_bad=True)
    shown = [example.what.removeprefix(f"{tmp_path}/") for example in reader.counters.skipped_examples]
    assert shown[0].startswith("z.jsonl.gz:1: damaged archive")
    assert shown[1:] == [f"a.jsonl:{line}: not valid JSON" for line in (1, 2, 3, 4)]


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
