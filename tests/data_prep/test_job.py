"""A corpus becomes shards that plain tools read, the same bytes whatever the number of workers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.checks import statistics, verify
from data_prep.errors import DepthpipeError
from data_prep.job import tokenize_corpus
from data_prep.manifest import Manifest
from data_prep.plan import Options
from data_prep.tokenizer import Tokenizer


def tree_hash(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a dataset, by relative path (the job's record holds times of inputs, so not of it)."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "job.json"
    }


def documents_of(directory: Path, tokenizer: Tokenizer) -> list[str]:
    manifest = Manifest.load(directory)
    tokens = np.concatenate([c for i in range(len(manifest.shards)) for c in manifest.open_shard(i).chunks()])
    parts = np.split(tokens, np.nonzero(tokens == tokenizer.end_of_document_id)[0] + 1)
    assert len(parts[-1]) == 0, "the last document has no end"
    return [tokenizer.decode(part.tolist()) for part in parts[:-1]]


def test_the_dataset_holds_every_document_exactly(corpus: Path, dataset: Path, tokenizer: Tokenizer) -> None:
    texts = [path.read_bytes().decode() for path in corpus.rglob("*.py")]
    assert Counter(documents_of(dataset, tokenizer)) == Counter(filter(None, texts))
    manifest = Manifest.load(dataset)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert len(manifest.shards) > 1


def test_plain_webdataset_and_plain_tar_read_the_shards(dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    for index, shard in enumerate(manifest.shards):
        path = dataset / shard.file
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
        tokens = np.concatenate([sample["npy"] for sample in samples])
        assert tokens.dtype == np.dtype(manifest.dtype)
        assert (tokens == np.concatenate(list(manifest.open_shard(index).chunks()))).all()
        listing = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
        assert listing.stderr == "" and len(listing.stdout.split()) == len(samples)
        with tarfile.open(path) as archive:
            assert archive.getnames() == listing.stdout.split()


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_makes_the_same_bytes(
    workers: int, corpus: Path, tokenizer_path: Path, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    options = Options(chunk_tokens=4096)
    tokenize_corpus([str(corpus)], tokenizer_path, out, workers=workers, include=["*.py"], options=options)
    assert tree_hash(out) == tree_hash(dataset)


def test_validation_documents_are_apart_and_nothing_is_lost(
    corpus: Path, tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "again").mkdir()
    for path in sorted(corpus.glob("*.py")):  # copies of documents fall on their original's side
        (tmp_path / "again" / path.name).write_bytes(path.read_bytes())
    inputs = [str(corpus), str(tmp_path / "again")]
    out = tmp_path / "data"
    options = Options(validation_fraction=0.2)
    report = tokenize_corpus(inputs, tokenizer_path, out, workers=2, include=["*.py"], options=options)
    assert report.datasets == (out / "train", out / "validation")
    train, validation = (documents_of(half, tokenizer) for half in report.datasets)
    texts = [path.read_bytes().decode() for name in inputs for path in Path(name).rglob("*.py")]
    assert Counter(train + validation) == Counter(filter(None, texts))
    assert not set(train) & set(validation)
    assert 0.1 < len(validation) / len(texts) < 0.3
    assert report.counters.empty_documents == 2


def test_a_finished_job_is_reused_and_a_changed_input_is_named(tokenizer_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "in" / "a.txt"
    text.parent.mkdir()
    text.write_text("some words\n" * 100)
    run = lambda **options: tokenize_corpus(  # noqa: E731
        [str(text.parent)], options.pop("tokenizer", tokenizer_path), tmp_path / "out", workers=1, **options
    )
    first = run()
    before = tree_hash(tmp_path / "out")
    again = run()
    assert (first.reused, again.reused) == (False, True)
    assert again.counters == first.counters
    assert tree_hash(tmp_path / "out") == before
    with pytest.raises(DepthpipeError, match="begun with text_key 'text', now it is 'body'"):
        run(options=Options(text_key="body"))
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_path.read_bytes() + b"\x12\x00")
    with pytest.raises(DepthpipeError, match="begun with another tokenizer"):
        run(tokenizer=other)
    os.utime(text, ns=(1, 1))
    assert run().reused, "a copy of the same content"
    (text.parent / "b.txt").write_text("more")
    with pytest.raises(DepthpipeError, match=r"b\.txt: new since .* was begun: remove it from the inputs, remove"):
        run()
    (text.parent / "b.txt").unlink()
    text.write_text("some wordy\n" * 100)
    with pytest.raises(DepthpipeError, match=r"a\.txt: changed since"):
        run()
    text.write_text("some words\n" * 101)
    with pytest.raises(DepthpipeError, match=r"a\.txt: changed since"):
        run()


def test_of_a_corpus_too_large_for_digests_the_times_decide(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.plan.DIGEST_BYTES", 10_000)
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("some words\n" * 800)
    run = lambda: tokenize_corpus([str(tmp_path / "in")], tokenizer_path, tmp_path / "out", workers=1)  # noqa: E731
    run()
    os.utime(tmp_path / "in" / "a.txt", ns=(1, 1))
    assert run().reused
    os.utime(tmp_path / "in" / "b.txt", ns=(1, 1))
    with pytest.raises(DepthpipeError, match=r"b\.txt: its time has changed since .*: restore it with its time"):
        run()


@pytest.mark.parametrize("inside", [False, True])
def test_a_damaged_record_is_never_trusted(inside: bool, tokenizer_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = (out if inside else tmp_path) / "a.txt"
    text.parent.mkdir(exist_ok=True)
    text.write_text("some words\n" * 100)
    run = lambda: tokenize_corpus([str(text)], tokenizer_path, out, workers=1)  # noqa: E731
    run()
    (out / "shards" / "000000.tar").unlink()
    own = f"remove job.json, manifest.json, shards in {out} and run again"
    with pytest.raises(DepthpipeError, match=f"{own if inside else f'remove {out} and run again'}$"):
        run()
    record = (out / "job.json").read_bytes()
    (out / "job.json").write_bytes(record.replace(b'"tokens": ', b'"tokens": 1'))
    with pytest.raises(DepthpipeError, match=rf"job\.json: damaged or edited record: {own}$"):
        run()
    for name in ("job.json", "manifest.json"):
        (out / name).unlink()
    shutil.rmtree(out / "shards")
    assert not run().reused


def test_verify_finds_nothing_wrong_with_what_was_written(dataset: Path) -> None:
    assert verify(dataset) == []


def test_statistics_agree_with_the_documents(dataset: Path, tokenizer: Tokenizer) -> None:
    result = statistics(dataset, samples=2)
    lengths = [len(tokenizer.encode(text)) for text in documents_of(dataset, tokenizer)]
    assert sum(result.length_histogram.values()) == len(lengths)
    assert result.longest_document == max(lengths)
    assert result.length_histogram[512] == sum(256 <= length < 512 for length in lengths)
    assert len(result.samples) == 2 and all(result.samples)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file, directory or glob"),
        (lambda path: path.mkdir(), "no text found"),
        (lambda path: (path.mkdir(), (path / "a.txt").write_text("")), "no text found: it is empty"),
        (lambda path: path.write_text(""), "no text found: it is empty: name files with text"),
    ],
    ids=["missing", "empty directory", "one empty file", "an empty file by name"],
)
def test_a_missing_or_empty_corpus_is_named(make, message: str, tokenizer_path: Path, tmp_path: Path) -> None:
    make(tmp_path / "in")
    with pytest.raises(DepthpipeError, match=message):
        tokenize_corpus([str(tmp_path / "in")], tokenizer_path, tmp_path / "out", workers=1)


def test_a_directory_with_something_else_in_it_is_left_alone(
    dataset: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(DepthpipeError, match=r"holds manifest\.json"):
        tokenize_corpus([str(tmp_path / "a.txt")], tokenizer_path, tmp_path / "out", workers=1)


def test_tokenizing_imports_no_torch() -> None:
    code = "import sys, data_prep.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
