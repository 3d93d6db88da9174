"""Parquet: every row once, whatever the types and row groups; what is damaged is named, and the rest is kept."""

from __future__ import annotations

import itertools
import random
import re
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_prep import plan
from data_prep.corpus import find_files
from data_prep.errors import DepthpipeError
from data_prep.parquet import TextColumn
from data_prep.plan import Options, Plan
from tests.data_prep.formats import read_all, write_parquet


def test_a_damaged_parquet_file_is_named_or_skipped(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    write_parquet(tmp_path / "good.parquet", ["x", "y"])
    with pytest.raises(DepthpipeError, match=r"bad\.parquet: not a readable parquet file"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert got == ["x", "y"] and reader.counters.skipped == 1
    with pytest.raises(DepthpipeError, match=r"good\.parquet: no column 'body': name one of id, text with --text-key"):
        read_all(tmp_path, skip_bad=True, text_key="body")


def test_a_damaged_name_in_the_footer_is_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x"] * 20)
    write_parquet(tmp_path / "b.parquet", ["y"])
    data = bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[data.index(b"text", footer)] = 0xFF  # no UTF-8
    path.write_bytes(data)
    with pytest.raises(DepthpipeError, match=r"a\.parquet: not a readable parquet file \(.*utf-8.*\): mend it"):
        read_all(tmp_path)
    got, reader = read_all(tmp_path, skip_bad=True)
    assert got == ["y"] and reader.counters.skipped == 1


def test_a_missing_library_is_named_as_the_index_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DepthpipeError, match=r"reading parquet needs pyarrow: pip install pyarrow$"):
        TextColumn(str(tmp_path / "a.parquet"), "text")


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
    assert reader.counters.skipped == 1 and "row group 1: damaged" in reader.counters.skipped_examples[0].what


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
    assert len({re.sub(".*: row", "", example.what) for example in reader.counters.skipped_examples}) == 5


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
