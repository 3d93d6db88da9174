"""Which files of the inputs are read: no more than asked for, and never what the job itself writes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from data_prep.corpus import RESULT_NAMES, find_files
from data_prep.errors import DepthpipeError
from data_prep.job import Report, merge_parts, tokenize_corpus
from data_prep.plan import Options


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


@pytest.mark.parametrize("inputs", [["."], ["*"], ["**/*"], ["*.txt", "tokens*"], "shell"], ids=str)
@pytest.mark.parametrize("link", [False, True])
def test_however_an_input_reaches_the_result_it_is_not_read(
    inputs: list[str] | str, link: bool, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text {name}" * 10)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "job.json.17.partial").write_text("of a killed job")
    out = tmp_path / "tokens"
    if link:
        (tmp_path.parent / "links").mkdir(exist_ok=True)
        out = tmp_path.parent / "links" / tmp_path.name
        out.symlink_to(tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)

    def run(part: tuple[int, int]) -> Report:
        given = sorted(os.listdir()) if inputs == "shell" else inputs
        options = Options(validation_fraction=0.5)
        return tokenize_corpus(given, tokenizer_path, out, workers=1, options=options, include=["*"], part=part)

    run((1, 2))
    assert RESULT_NAMES.issuperset(set(os.listdir(out)) - {"job.json.17.partial"})
    run((2, 2))
    assert run((1, 1)).counters.documents == 3
    assert run((1, 1)).reused
    assert RESULT_NAMES.issuperset(set(os.listdir(out)) - {"job.json.17.partial"})


def test_every_name_in_a_result_is_known(dataset: Path) -> None:
    assert RESULT_NAMES.issuperset(os.listdir(dataset))


@pytest.mark.parametrize(
    "inputs", [["corpus"], ["corp*"], ["other", "corpus"], ["link"], ["corpus/../corpus/"]], ids=str
)
def test_a_result_is_not_mixed_with_its_corpus(
    inputs: list[str], tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("corpus", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    (tmp_path / "link").symlink_to("corpus")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DepthpipeError, match=rf"^{re.escape(inputs[-1].replace('*', 'us'))}: is --out too"):
        tokenize_corpus(inputs, tokenizer_path, "corpus", workers=1)
    assert os.listdir("corpus") == ["a.txt"]


def test_a_corpus_in_a_directory_of_the_result_is_read_and_not_to_be_removed(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    text = tmp_path / "raw" / "a.txt"
    text.parent.mkdir()
    text.write_text("text")
    run = lambda: tokenize_corpus([str(text.parent)], tokenizer_path, tmp_path, workers=1)  # noqa: E731
    assert run().counters.documents == 1
    text.write_text("other text")
    with pytest.raises(DepthpipeError, match=r"changed since .* was begun: restore it, or choose another --out$"):
        run()


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DepthpipeError, match=r"no text found: expected files that match --include \*\.py"):
        find_files([str(tmp_path)], include=["*.py"])
