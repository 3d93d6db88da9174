"""Every input format gives every document once, however it is cut; what cannot be read is named or counted."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import time
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_prep import documents
from data_prep.corpus import CorpusFile, Kind, find_files
from data_prep.documents import DocumentReader, first_cut, last_cut
from data_prep.errors import DepthpipeError
from data_prep.plan import PLAN_VERSION, Options, Plan
from data_prep.worker import half_of
from tests.data_prep.formats import WRITERS, as_jsonl, read_all, texts_for, write_parquet


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_every_document_once(
    name: str, tmp_path: Path, rng: random.Random, small_pieces: None
) -> None:
    texts = texts_for(rng)
    WRITERS[name](tmp_path / name, texts)
    got, _ = read_all(tmp_path)
    assert sorted(got) == sorted(texts)
    assert got != texts, "slices are shuffled, so that a shard holds text from all over the corpus"


def test_long_text_files_are_cut_and_come_back_whole(tmp_path: Path, rng: random.Random, small_pieces: None) -> None:
    texts = [" ".join(texts_for(rng)) + tail for tail in ("\n", "   ", "", "\n\n x")]
    texts += ["nospace" * 300, " " * 2000, "\n" * 999, "short"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    got, _ = read_all(tmp_path)
    assert sorted(got) == sorted(texts)


def test_lines_of_text_files_are_documents_when_asked(tmp_path: Path, small_pieces: None) -> None:
    lines = [f"line {i} " + "x" * (i % 90) for i in range(100)]
    (tmp_path / "a.txt").write_text("\n".join([*lines, "", "last without newline"]))
    got, reader = read_all(tmp_path, documents="line")
    assert sorted(got) == sorted([*lines, "last without newline"])
    assert reader.counters.empty_documents == 1


def test_cuts_fall_only_after_newlines_and_before_runs_of_spaces(tmp_path: Path) -> None:
    data = b"ab  cd\n  ef g"
    path = tmp_path / "x"
    path.write_bytes(data)
    with open(path, "rb") as stream:
        assert [first_cut(stream, i, len(data)) for i in range(len(data))] == [
            0,
            2,
            2,
            7,
            7,
            7,
            7,
            7,
            11,
            11,
            11,
            11,
            13,
        ]
    assert [last_cut(data[:n]) for n in range(len(data) + 1)] == [0, 0, 0, 2, 2, 2, 2, 7, 7, 7, 7, 7, 11, 11]


def test_undecodable_bytes_and_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe bad \xe2\x82 end \xef\xbf\xbd")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": ""}\n{"text": null}\n{"text": "\\ud800x"}\n\n')
    got, reader = read_all(tmp_path)
    assert sorted(got) == sorted(["good \ufffd\ufffd bad \ufffd end \ufffd", "\ufffd\ufffd\ufffdx"])
    assert reader.counters.undecodable_bytes == 4 + 3
    assert reader.counters.empty_documents == 3


HEADS = {
    "long Japanese": "日本語の長い文章です。 " * 9000,
    "a character across the head's end": "x" * (documents.HEAD_BYTES - 1) + "日本",
    "not UTF-8": b"bad \xff\xe6\x97".decode("utf-8", "surrogateescape") + " é" * 40_000,
    "half of a surrogate pair": "\ud800" + "日" * 40_000,
    "short": "short",
}


@pytest.mark.parametrize("name", HEADS)
def test_copies_of_a_document_in_any_format_have_the_same_first_bytes(name: str, tmp_path: Path) -> None:
    encode = "surrogatepass" if name == "half of a surrogate pair" else "surrogateescape"
    data = HEADS[name].encode("utf-8", encode)
    (tmp_path / "a.txt").write_bytes(data)
    escaped = json.dumps({"text": HEADS[name]}).encode() if encode == "surrogatepass" else b'{"text": "%s"}' % data
    (tmp_path / "b.jsonl").write_bytes(escaped)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(escaped))
    parquet.write_table(pyarrow.table({"text": [data]}), tmp_path / "d.parquet")
    reader = DocumentReader("text", "file", cuttable=True, skip_bad=False)
    fragments = [list(reader.read(file, 0, max(file.size, 1))) for file in find_files([str(tmp_path)])]
    texts = {"".join(fragment.text for fragment in of_file) for of_file in fragments}
    assert len(fragments) == 4 and len(texts) == 1
    expected = texts.pop().encode()[: documents.HEAD_BYTES]
    assert {fragment.head for of_file in fragments for fragment in of_file} == {expected}


BAD_LINES = {
    "not valid JSON": b"{not json}",
    "no key 'text'": b'{"body": "x"}',
    "'text' is not text": b'{"text": 5}',
}


@pytest.mark.parametrize("message", BAD_LINES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_corrupt_line_is_named_with_its_number_or_skipped(
    name: str, message: str, tmp_path: Path, small_pieces: None
) -> None:
    good = as_jsonl([f"document {i}" for i in range(40)]).splitlines()
    data = b"\n".join([*good[:17], BAD_LINES[message], *good[17:]]) + b"\n"
    compress = {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstandard.ZstdCompressor().compress}
    (tmp_path / name).write_bytes(compress[name](data))
    with pytest.raises(DepthpipeError, match=rf"{name}:18: {message}"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert sorted(got) == sorted(f"document {i}" for i in range(40))
    assert reader.counters.skipped == 1
    assert f"{name}:18: {message}" in reader.counters.skipped_examples[0].what


def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + as_jsonl(["a"]) + b"\xef\xbb\xbf" + as_jsonl(["\ufeffb"]))
    assert read_all(tmp_path)[0] == ["a", "\ufeffb"]


def test_the_plan_version_moves_with_what_slices_give(tmp_path: Path) -> None:
    texts = texts_for(random.Random(0), 3000)
    lines = as_jsonl(texts)
    odd = b'\xef\xbb\xbf{"text": "mark"}\n{"text": ""}\nbad\n{"text": "\\ud800"}\n{"text": "\xff"}\n{"text": "end"}'
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b" ".join(text.encode() for text in texts) + b"\xff")
    (tmp_path / "b.jsonl").write_bytes(lines + odd)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(odd + b"\n" + lines * 6))
    (tmp_path / "d.json.zst").write_bytes(zstandard.compress(odd + b"\n" + lines * 6))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines[:5000], compresslevel=0)[:3000])
    write_parquet(tmp_path / "f.parquet", texts, row_group_size=1000)
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(lines) + gzip.compress(lines)[:-8] + bytes(8))
    digest = hashlib.sha256()
    for file in find_files([str(tmp_path)]):
        stop = len(texts) if file.kind == "parquet" else file.size
        ends = [0, stop // 7, stop // 2, stop]
        slices = list(itertools.pairwise(ends)) if file.kind in ("text", "jsonl", "parquet") else [(0, 2), (1, 2)]
        for cut in slices:
            reader = DocumentReader("text", "file", cuttable=True, skip_bad=True)
            for fragment in reader.read(file, *cut):
                digest.update(fragment.text.encode())
                if fragment.ends:
                    digest.update(f"\0{half_of(fragment.head, 0.5)}\0".encode())
            digest.update(b"end of slice")
    now = "e66b7bbfb98c43a6cc0df5ccfbe63df99f3ef10111b392f8216dc7b9542ebe80"
    assert (PLAN_VERSION, digest.hexdigest()) == (3, now), "raise PLAN_VERSION, and put what it gives now here"


def test_slices_inside_a_long_line_do_not_read_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl(["x" * 20_000_000, "second"]))
    (file,) = find_files([str(path)])
    reader = DocumentReader("text", "file", cuttable=True, skip_bad=False)
    started = time.process_time()
    for start in range(1000, 19_980_000, 10_000):
        assert not list(reader.read(file, start, start + 10_000))
    assert time.process_time() - started < 5, "2000 slices that each read 10 MB take longer"
    assert [fragment.text for fragment in reader.read(file, 19_981_000, file.size)] == ["second"]


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_one_giant_file_among_small_ones_is_work_for_all_cores(kind: Kind) -> None:
    giant = CorpusFile("giant", "giant", kind, 10 << 30, 0)
    small = [CorpusFile(f"{i}.txt", f"{i}.txt", "text", 20_000, 0) for i in range(1000)]
    units = Plan.make([giant, *small], "", Options(), cuttable=True).units
    with_giant = [unit for unit in units if any(piece.file == 0 for piece in unit)]
    assert len(with_giant) >= (8 if kind in ("jsonl.gz", "jsonl.zst") else 40)
    assert len(units) < 1000
    covered = sorted((piece.start, piece.stop) for unit in units for piece in unit if piece.file == 0)
    if kind in ("text", "jsonl"):
        assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
        assert covered[-1][1] == giant.size
    else:
        assert covered == [(share, 8) for share in range(8)]
    assert sorted(piece.file for unit in units for piece in unit if piece.file) == list(range(1, 1001))


def test_a_giant_text_is_one_unit_for_a_model_that_may_not_be_cut() -> None:
    giant = CorpusFile("giant", "giant", "text", 10 << 30, 0)
    assert len(Plan.make([giant], "", Options(), cuttable=False).units) == 1
