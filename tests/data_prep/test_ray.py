"""The same job on a local Ray instance gives the same bytes."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import psutil
import pytest

from data_prep.errors import DepthpipeError
from data_prep.job import tokenize_corpus
from data_prep.plan import Options


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ray_processes() -> list[str]:
    names = [process.name() for process in psutil.Process().children(recursive=True)]
    return [name for name in names if name.startswith("ray") or name == "gcs_server"]


def test_ray_makes_the_same_bytes_and_names_what_is_wrong(
    corpus: Path, tokenizer_path: Path, dataset: Path, tmp_path: Path
) -> None:
    options = Options(chunk_tokens=4096)
    progress: list[tuple[int, int, int, float]] = []
    arguments = {"workers": 2, "include": ["*.py"], "options": options, "on_ray": True}
    tokenize_corpus(
        [str(corpus)], tokenizer_path, tmp_path / "data", progress=lambda *done: progress.append(done), **arguments
    )
    assert contents(tmp_path / "data") == contents(dataset)
    assert progress[-1][3] == 1.0
    assert not ray_processes(), "the local instance ends with the job"
    (tmp_path / "bad.jsonl").write_text("broken\n")
    with pytest.raises(DepthpipeError, match=r"bad\.jsonl:1: not valid JSON"):
        tokenize_corpus([str(tmp_path / "bad.jsonl")], tokenizer_path, tmp_path / "out", **arguments)
    assert not ray_processes()


def test_without_ray_the_command_that_installs_it_is_named(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DepthpipeError, match=r"Ray is not installed: pip install ray$"):
        tokenize_corpus([str(corpus / "json")], tokenizer_path, tmp_path, workers=1, include=["*.py"], on_ray=True)
