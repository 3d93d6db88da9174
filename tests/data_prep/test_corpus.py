"""Which files of the inputs are read: no more than asked for, and never what the job itself writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.corpus import find_files
from data_prep.errors import DepthpipeError
from data_prep.job import merge_parts, tokenize_corpus


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
