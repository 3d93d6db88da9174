"""Finds the files of a corpus."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from data_prep.errors import DepthpipeError

Kind = Literal["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".json.gz": "jsonl.gz",  # as C4 and Dolma call theirs
    ".json.zst": "jsonl.zst",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class CorpusFile:
    """One input file. `name` is its path relative to the input it was found under; it identifies the file in a job."""

    path: str
    name: str
    kind: Kind
    size: int
    mtime_ns: int


def find_files(
    inputs: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = (), out: Path | None = None
) -> list[CorpusFile]:
    """Files under `inputs` (files, directories, globs), sorted by name within each input.

    In a directory, `include` patterns select files by name or relative path; without them, the suffixes of `SUFFIXES`
    do. `exclude` patterns drop a file when they match its relative path or any part of it. A file named outright is
    taken whatever its suffix. What is no regular file (a pipe, a socket) is no text, nor is anything under `out`, where
    the result goes. Raises DepthpipeError for an input that is missing or holds nothing to read.
    """
    found: dict[str, CorpusFile] = {}
    for given in inputs:
        paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if not paths:
            raise DepthpipeError(f"{given}: no such file, directory or glob: check the path")
        for path in paths:
            root = os.path.realpath(path)
            for file in _files_under(path, include, exclude, out):
                found.setdefault(os.path.normpath(os.path.join(root, os.path.relpath(file.path, path))), file)
    if not any(file.size for file in found.values()):
        expected = f"files that match --include {' '.join(include)}" if include else f"{', '.join(SUFFIXES)} files"
        remedy = "change the pattern" if include else "name others with --include"
        raise DepthpipeError(f"{' '.join(inputs)}: no text found: expected {expected}: {remedy}")
    return list(found.values())


def _files_under(path: str, include: Sequence[str], exclude: Sequence[str], out: Path | None) -> Iterator[CorpusFile]:
    if not os.path.isdir(path):
        if not (file := _corpus_file(path, os.path.basename(path))):
            raise DepthpipeError(f"{path}: not a regular file, so it cannot be read again: save its text to a file")
        yield file
        return
    for directory, subdirectories, names in os.walk(path):
        relative = os.path.relpath(directory, path)
        subdirectories[:] = sorted(
            name
            for name in subdirectories
            if not _excluded(os.path.join(relative, name), exclude)
            and not (out and name == out.name and out.resolve() == Path(directory, name).resolve())
        )
        for name in sorted(names):
            relative_name = os.path.normpath(os.path.join(relative, name))
            wanted = (
                any(fnmatchcase(name, p) or fnmatchcase(relative_name, p) for p in include)
                if include
                else name.endswith(tuple(SUFFIXES))
            )
            if not wanted or _excluded(relative_name, exclude):
                continue
            if file := _corpus_file(os.path.join(directory, name), relative_name):
                yield file


def _excluded(relative_name: str, exclude: Sequence[str]) -> bool:
    parts = Path(relative_name).parts
    return any(fnmatchcase(relative_name, p) or any(fnmatchcase(part, p) for part in parts) for p in exclude)


def _corpus_file(path: str, name: str) -> CorpusFile | None:
    """None for what is no regular file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DepthpipeError(f"{path}: cannot read ({error.strerror}): remove it or exclude it") from None
    if not stat.S_ISREG(status.st_mode):
        return None
    kind: Kind = next((kind for suffix, kind in SUFFIXES.items() if path.endswith(suffix)), "text")
    return CorpusFile(path, name, kind, status.st_size, status.st_mtime_ns)
