"""Every input format gives every document once, however it is cut; what cannot be read is named or counted."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_prep import containers, documents, plan
from data_prep import parquet as parquet_reader
from data_prep.corpus import CorpusFile, Kind, find_files
from data_prep.documents import DocumentReader, first_cut, last_cut
from data_prep.errors import DepthpipeError
from data_prep.job import merge_parts, tokenize_corpus
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


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut everything into pieces far smaller than the documents."""
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 300)
    monkeypatch.setattr(plan, "MIN_SLICE_BYTES", 75)
    monkeypatch.setattr(containers, "STRIPE_BYTES", 64)
    monkeypatch.setattr(containers, "READ_BYTES", 50)
    monkeypatch.setattr(documents, "READ_BYTES", 40)
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", 3)


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
    assert f"{name}:18: {message}" in reader.counters.skipped_examples[0]


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


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_an_empty_file_that_should_be_an_archive_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DepthpipeError, match=rf"{name}.*(empty|not a readable)"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert got == ["text"] and reader.counters.skipped == 1


def test_a_damaged_parquet_file_is_named_or_skipped(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    write_parquet(tmp_path / "good.parquet", ["x", "y"])
    with pytest.raises(DepthpipeError, match=r"bad\.parquet: not a readable parquet file"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert got == ["x", "y"] and reader.counters.skipped == 1
    with pytest.raises(DepthpipeError, match=r"good\.parquet: no column 'body'"):
        read_all(tmp_path, skip_bad=True, text_key="body")


@pytest.mark.parametrize("checksum", [False, True])
def test_a_damaged_row_group_is_counted_once_however_many_slices_share_it(
    checksum: bool, tmp_path: Path, rng: random.Random, small_pieces: None
) -> None:
    texts = [f"{i} " + "".join(rng.choices("abcdefghijklmnop", k=50)) for i in range(400)]
    path = tmp_path / "a.parquet"
    write_parquet(
        path,
        texts,
        row_group_size=200,
        data_page_size=500,
        write_batch_size=8,
        use_dictionary=False,
        compression="none" if checksum else "gzip",
        write_page_checksum=checksum,
    )
    column = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(DepthpipeError, match=r"a\.parquet: row group 1: damaged \(.+\): mend it"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    read = len(got)
    assert 250 < read < 350 and sorted(got) == sorted(texts[:read]), "the rows before the damage are kept"
    assert reader.counters.skipped == 1 and "row group 1: damaged" in reader.counters.skipped_examples[0]


def test_a_large_row_group_is_work_for_all_cores_and_small_ones_share_a_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"document {i} " + "x" * (i % 100) for i in range(4000)]
    write_parquet(tmp_path / "large.parquet", texts, row_group_size=None)
    write_parquet(tmp_path / "small.parquet", texts, row_group_size=2)
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 10_000)
    monkeypatch.setattr(plan, "MIN_SLICE_BYTES", 5_000)
    files = find_files([str(tmp_path)])
    units = Plan.make(files, "", Options(), cuttable=True).units
    for index in (0, 1):
        rows = sorted((piece.start, piece.stop) for unit in units for piece in unit if piece.file == index)
        assert rows[0][0] == 0 and rows[-1][1] == 4000
        assert all(before[1] == after[0] for before, after in itertools.pairwise(rows))
        assert 8 <= len(rows) < 200, "of 1 and 2000 row groups"
    assert sum(any(piece.file == 0 for piece in unit) for unit in units) == 8


def test_a_row_that_is_not_text_is_named_with_its_row_group(tmp_path: Path, small_pieces: None) -> None:
    parquet.write_table(pyarrow.table({"text": list(range(40))}), tmp_path / "a.parquet", row_group_size=10)
    with pytest.raises(DepthpipeError, match=r"a\.parquet: row \d of row group [0-3]: 'text' is not text"):
        read_all(tmp_path)
    _, reader = read_all(tmp_path, skip_bad=True)
    assert reader.counters.skipped == 40
    assert len({re.sub(".*: row", "", example) for example in reader.counters.skipped_examples}) == 5


TEXT_TYPES = {
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "binary": pyarrow.binary(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("name", TEXT_TYPES)
def test_text_of_every_parquet_type_is_read(name: str, tmp_path: Path) -> None:
    texts = ["a", "b\u00e9", "a", "", None]
    parquet.write_table(pyarrow.table({"text": pyarrow.array(texts).cast(TEXT_TYPES[name])}), tmp_path / "a.parquet")
    got, reader = read_all(tmp_path)
    assert got == ["a", "b\u00e9", "a"] and reader.counters.empty_documents == 2


def test_parquet_text_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    column = pyarrow.array([b"good", b"bad \xff\xfe", None, "\u00e9".encode()]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    got, reader = read_all(tmp_path)
    assert got == ["good", "bad \ufffd\ufffd", "\u00e9"]
    assert (reader.counters.undecodable_bytes, reader.counters.empty_documents) == (2, 1)


def test_inputs_are_found_by_suffix_include_exclude_and_glob(tmp_path: Path) -> None:
    for name in ("a.txt", "b.py", "c.md", "tests/d.py", "sub/e.py", "sub/f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    names = lambda *args, **kwargs: [file.name for file in find_files(*args, **kwargs)]  # noqa: E731
    assert names([str(tmp_path)]) == ["a.txt", "sub/f.txt"]
    assert names([str(tmp_path)], include=["*.py"]) == ["b.py", "sub/e.py", "tests/d.py"]
    assert names([str(tmp_path)], include=["*.py"], exclude=["tests"]) == ["b.py", "sub/e.py"]
    assert names([str(tmp_path)], include=["*.py"], exclude=["sub/*", "b.*"]) == ["tests/d.py"]
    assert names([str(tmp_path / "**/*.py")]) == ["b.py", "e.py", "d.py"]
    assert names([str(tmp_path / "c.md"), str(tmp_path)]) == ["c.md", "a.txt", "sub/f.txt"]


def test_what_is_no_regular_file_is_left_out_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for name in ("pipe.txt", "pipe.jsonl", "pipe.jsonl.gz", "pipe.parquet"):
        os.mkfifo(tmp_path / name)  # opening one would wait for ever
    (tmp_path / "self").symlink_to(tmp_path)
    assert [file.name for file in find_files([str(tmp_path)])] == ["a.txt"]
    with pytest.raises(DepthpipeError, match=r"pipe\.txt: not a regular file"):
        find_files([str(tmp_path / "pipe.txt")])
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(DepthpipeError, match=r"b\.txt: cannot read"):
        find_files([str(tmp_path)])


def test_a_job_inside_its_input_does_not_read_its_own_result(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.chdir(tmp_path)
    for part in ((1, 2), (2, 2)):
        tokenize_corpus(["."], tokenizer_path, "data", workers=1, include=["*"], part=part)
    assert merge_parts("data").counters.documents == 1
    assert tokenize_corpus(["."], tokenizer_path, "data", workers=1, include=["*"]).finished


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DepthpipeError, match=r"no text found: expected files that match --include \*\.py"):
        find_files([str(tmp_path)], include=["*.py"])


def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + as_jsonl(["a"]) + b"\xef\xbb\xbf" + as_jsonl(["\ufeffb"]))
    assert read_all(tmp_path)[0] == ["a", "\ufeffb"]


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
    with pytest.raises(DepthpipeError, match=r"a\.txt: compressed, which is read only as \.jsonl\.gz"):
        read_all(tmp_path, documents=documents)
    got, reader = read_all(tmp_path, documents=documents, skip_bad=True)
    assert got == ["json"] and reader.counters.skipped == 1


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
