"""Finds the files of a corpus."""

from __future__ import annotations

import glob
import hashlib
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
# What a job writes to its --out, and the record of a tokenizer trained there; beside them, files in .partial.
RESULT_NAMES = frozenset(
    {
        "unfinished",
        "job.json",
        "manifest.json",
        "tokenizer.model",
        "tokenizer.model.json",
        "shards",
        "train",
        "validation",
    }
)


@dataclass(frozen=True)
class CorpusFile:
    """One input file. `name` is its path relative to the input it was found under; it identifies the file in a job."""

    path: str
    name: str
    kind: Kind
    size: int
    mtime_ns: int


def content_digest(file: CorpusFile) -> str:
    """SHA-256 of the content of `file`. Raises DepthpipeError."""
    try:
        with open(file.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DepthpipeError(f"{file.path}: cannot read ({error.strerror}): remove it or exclude it") from None


def find_files(
    inputs: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = (), out: Path | None = None
) -> list[CorpusFile]:
    """Files under `inputs` (files, directories, globs), sorted by name within each input.

    In a directory, `include` patterns select files by name or relative path; without them, the suffixes of `SUFFIXES`
    do. `exclude` patterns drop a file when they match its relative path or any part of it. A file named outright is
    taken whatever its suffix. What is no regular file (a pipe, a socket) is no text, nor is what a job writes to `out`,
    however an input reaches it. Raises DepthpipeError for an input that is missing or holds nothing to read, and for
    one that is `out` itself.
    """
    paths = [path for given in inputs for path in _matches(given)]
    real_out = os.path.realpath(out) if out else None
    found: dict[str, CorpusFile] = {}
    for path in paths:
        root = os.path.realpath(path)
        files = list(_files_under(path, root, include, exclude, real_out))
        # A `*` that stands for the corpus may find the result beside it, but not the corpus in its place.
        if root == real_out and (files or len(paths) == 1):
            raise DepthpipeError(f"{path}: is --out too, where the result would mix with it: choose another --out")
        for file in files:
            found.setdefault(os.path.normpath(os.path.join(root, os.path.relpath(file.path, path))), file)
    if found and not any(file.size for file in found.values()):
        are = "it is empty" if len(found) == 1 else f"all {len(found)} files there are empty"
        raise DepthpipeError(f"{' '.join(inputs)}: no text found: {are}: name files with text")
    if not found:
        expected = f"files that match --include {' '.join(include)}" if include else f"{', '.join(SUFFIXES)} files"
        remedy = "change the pattern" if include else "name others with --include"
        raise DepthpipeError(f"{' '.join(inputs)}: no text found: expected {expected}: {remedy}")
    return list(found.values())


def _matches(given: str) -> list[str]:
    paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    if not paths:
        raise DepthpipeError(f"{given}: no such file, directory or glob: check the path")
    return paths


def _is_result(path: str, out: str | None) -> bool:
    """Whether a job with its result in `out` writes `path`. Both are real paths."""
    if not out or not path.startswith(parent := os.path.join(out, "")):
        return False
    name = path[len(parent) :].split(os.sep, 1)[0]
    return name in RESULT_NAMES or name.endswith(".partial")


def _files_under(
    path: str, root: str, include: Sequence[str], exclude: Sequence[str], out: str | None
) -> Iterator[CorpusFile]:
    """`root` and `out` are real paths, `root` that of `path`."""
    if _is_result(root, out):
        return
    if not os.path.isdir(path):
        if not (file := _corpus_file(path, os.path.basename(path))):
            raise DepthpipeError(f"{path}: not a regular file, so it cannot be read again: save its text to a file")
        yield file
        return
    for directory, subdirectories, names in os.walk(path):
        relative = os.path.relpath(directory, path)
        real_directory = os.path.normpath(os.path.join(root, relative))
        subdirectories[:] = sorted(
            name
            for name in subdirectories
            if not _excluded(os.path.join(relative, name), exclude)
            and not _is_result(os.path.join(real_directory, name), out)
        )
        for name in sorted(names):
            relative_name = os.path.normpath(os.path.join(relative, name))
            wanted = (
                any(fnmatchcase(name, p) or fnmatchcase(relative_name, p) for p in include)
                if include
                else name.endswith(tuple(SUFFIXES))
            )
            if not wanted or _excluded(relative_name, exclude) or _is_result(os.path.join(real_directory, name), out):
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
