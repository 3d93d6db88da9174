"""Mixtures, remote datasets, damaged shards and document boundaries, all in the one global order."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import logging
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import DepthpipeError
from data_prep.job import tokenize_corpus
from data_prep.manifest import Manifest
from data_prep.mixture import Mixture
from data_prep.order import DatasetOrder
from data_prep.plan import Options
from data_prep.remote import RemoteDataset, load_manifest
from data_prep.sequences import DatasetSource, SequenceStream
from data_prep.shards import DamagedShardError
from data_prep.stream import BatchLoader
from tests.worker_pool import free_port

LENGTH = 64


@pytest.fixture(scope="session")
def many_shards(corpus: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of a dozen shards or more. Tests must not change it."""
    out = tmp_path_factory.mktemp("many") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.plan.MIN_UNIT_BYTES", 100_000)
        options = Options(chunk_tokens=2048)
        tokenize_corpus([str(corpus)], tokenizer_path, out, workers=2, include=["*.py"], options=options)
    assert len(Manifest.load(out).shards) >= 12
    return out


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.order.BLOCK_SEQUENCES", 8)


def one(directory: Path | str, **arguments) -> SequenceStream:
    return SequenceStream([DatasetSource(str(directory))], LENGTH, 3, **arguments)


@pytest.mark.parametrize("weights", [[1.0, 3.0], [0.2, 0.5, 0.3], [1e-3, 1.0], [5.0, 5.0, 1e-2, 7.0]])
def test_mixtures_keep_exact_shares_and_lose_no_place(weights: list[float]) -> None:
    mixture = Mixture([(str(i), weight) for i, weight in enumerate(weights)], seed=1)
    count = 40_000
    sources, places = mixture.assign(np.arange(count))
    for source, weight in enumerate(weights):
        own = places[sources == source]
        assert own.tolist() == list(range(len(own))), "each source is read in its own order, without gaps"
        assert abs(len(own) - count * weight / sum(weights)) < mixture._round_size * 0.1 + 2
    for end in range(mixture._round_size, count, mixture._round_size):
        share = np.bincount(sources[:end], minlength=len(weights)) / end
        assert np.abs(share - np.array(weights) / sum(weights)).max() * end <= 1 + 1e-6 * end
    some = np.array([17, 39_999, 0, 20_000])
    assert (mixture.assign(some)[0] == sources[some]).all() and (mixture.assign(some)[1] == places[some]).all()
    runs = np.diff(np.nonzero(np.diff(sources))[0])
    assert runs.max(initial=0) < 12 * sum(weights) / min(weights), "sources are mixed, not one after the other"


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_named(weight: float, dataset: Path) -> None:
    with pytest.raises(DepthpipeError, match=f"weight {weight}: must be a positive number"):
        SequenceStream([DatasetSource(str(dataset)), DatasetSource(str(dataset), weight)], LENGTH, 0)


def test_a_share_too_small_to_be_exact_is_named(dataset: Path) -> None:
    with pytest.raises(DepthpipeError, match="less than a millionth of the mixture"):
        SequenceStream([DatasetSource(str(dataset)), DatasetSource(str(dataset), 1e-9)], LENGTH, 0)


def test_a_mixture_reads_each_source_in_its_own_order(dataset: Path, many_shards: Path) -> None:
    sources = [DatasetSource(str(dataset), 1.0), DatasetSource(str(many_shards), 2.0)]
    stream = SequenceStream(sources, LENGTH, 3)
    got = stream.read(np.arange(600))
    numbers, _ = Mixture([("a", 1.0), ("b", 2.0)], 3).assign(np.arange(600))
    for number, source in enumerate(sources):
        alone = SequenceStream([source], LENGTH, 3 + number)
        rows = got[numbers == number]
        assert (rows == alone.read(np.arange(len(rows)))).all()
    assert abs(int((numbers == 1).sum()) - 400) < 30


def test_datasets_of_different_tokenizers_do_not_mix(dataset: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_path.read_bytes() + b"\x12\x00")  # the same pieces, another file
    (tmp_path / "a.txt").write_text("some words " * 100)
    tokenize_corpus([str(tmp_path / "a.txt")], other, tmp_path / "out", workers=1)
    with pytest.raises(DepthpipeError, match="made with another tokenizer than"):
        SequenceStream([DatasetSource(str(dataset)), DatasetSource(str(tmp_path / "out"))], LENGTH, 0)


def test_windows_bound_the_shards_that_reading_opens(many_shards: Path, small_blocks: None) -> None:
    manifest = Manifest.load(many_shards)
    order = DatasetOrder(manifest, LENGTH, 3, window_tokens=manifest.tokens // 4)
    stream = one(many_shards, window_tokens=manifest.tokens // 4)
    count = order.sequences_per_epoch
    opened: list[int] = []
    dataset = stream._datasets[0]
    dataset._open = functools.lru_cache(None)(lambda shard: opened.append(shard) or dataset._open_shard(shard))
    resume = count * 9 // 10
    stream.read(np.arange(resume, resume + 200))
    windows = {order.window_of(k) for k in range(resume, resume + 200)}
    allowed = [shard for window in windows for shard in order.shards_of(*window)]
    assert 0 < len(opened) <= len(allowed) <= len(manifest.shards) // 2
    assert set(opened) <= set(allowed)
    everything = [window for window in {order.window_of(k) for k in range(count)}]
    covered = [shard for window in everything for shard in order.shards_of(*window)]
    assert sorted(covered) == list(range(len(manifest.shards)))
    assert order.window_after(*order.window_of(count - 1)) == (1, 0)


def test_windows_shuffle_a_sorted_corpus_nearly_as_well_as_a_full_shuffle(
    tokenizer_path: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus whose first half differs from its second: how much of a batch comes from the first half?"""
    monkeypatch.setattr("data_prep.plan.MIN_UNIT_BYTES", 60_000)
    monkeypatch.setattr("data_prep.plan.MIN_SLICE_BYTES", 1_000)
    lines = [json.dumps({"text": f"{'first' if i < 20_000 else 'second'} {i}"}) + "\n" for i in range(40_000)]
    (tmp_path / "sorted.jsonl").write_text("".join(lines))
    tokenize_corpus([str(tmp_path / "sorted.jsonl")], tokenizer_path, tmp_path / "data", workers=2)
    manifest = Manifest.load(tmp_path / "data")
    first = manifest.load_tokenizer().encode("first")

    def spread(window_tokens: int) -> float:
        stream = one(tmp_path / "data", window_tokens=window_tokens)
        count = stream.sequences_per_epoch[0] // 64 * 64
        tokens = stream.read(np.arange(count)).reshape(count // 64, -1)
        shares = (tokens == first[0]).mean(axis=1)
        return float(shares.std())

    assert len(manifest.shards) > 16
    full, windowed = spread(manifest.tokens), spread(manifest.tokens // 6)
    assert windowed < 1.6 * full


def test_boundaries_number_the_documents_of_a_sequence(many_shards: Path) -> None:
    stream = one(many_shards)
    arguments = {"global_batch_size": 2048, "micro_batch_size": 2048, "data_parallel_rank": 0, "data_parallel_size": 1}
    loader = BatchLoader(stream, document_boundaries=True, **arguments)
    inputs, labels, documents = next(loader)
    loader.close()
    assert documents.shape == inputs.shape and documents.dtype.is_signed and documents.element_size() == 4
    assert int(documents.max()) > 0
    for row, numbers in zip(inputs.tolist(), documents.tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token == stream.end_of_document_id]
        assert numbers == [sum(end < i for end in ends) for i in range(len(row))]
    only = BatchLoader(stream, columns="labels", document_boundaries=True, **arguments)
    none, same_labels, same_documents = next(only)
    only.close()
    assert none is None and (same_labels == labels).all() and (same_documents == documents).all()


def damaged_copy(directory: Path, target: Path, damage: str) -> tuple[Path, int]:
    """A copy with its third shard damaged, and that shard's number."""
    shutil.copytree(directory, target)
    path = target / Manifest.load(target).shards[2].file
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        return target, 2
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "foreign":
        data[:640] = b"\1" * 640
    elif damage == "tokens":
        data[640 : 640 + 4000] = bytes(4000)
    path.write_bytes(data)
    return target, 2


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "tokens"])
def test_a_damaged_shard_is_named_or_skipped_without_moving_the_others(
    damage: str, many_shards: Path, tmp_path: Path, small_blocks: None, caplog: pytest.LogCaptureFixture
) -> None:
    directory, bad = damaged_copy(many_shards, tmp_path / "copy", damage)
    sound = one(many_shards)
    count = sound.sequences_per_epoch[0]
    with pytest.raises(DamagedShardError, match=rf"shards/{bad:06d}\.tar: damaged shard .*: restore it"):
        one(directory).read(np.arange(count))
    stream = one(directory, on_bad_shard="skip")
    with caplog.at_level(logging.WARNING):
        got = np.concatenate([stream.read(np.arange(k, min(k + 50, count))) for k in range(0, count, 50)])
    expected = sound.read(np.arange(count))
    skipped = np.zeros(count, dtype=bool)
    skipped[stream.skipped] = True
    assert 0 < skipped.sum() < count / 4
    assert len(caplog.records) == skipped.sum() == len(stream.skipped)
    assert (got[~skipped] == expected[~skipped]).all()
    starts = sound._datasets[0].order.starts(np.arange(count))
    bounds = sound._datasets[0]._shard_starts
    touches = (starts < bounds[bad + 1]) & (starts + LENGTH >= bounds[bad])
    assert (skipped == touches).all()
    again = one(directory, on_bad_shard="skip")
    assert (again.read(np.arange(count - 1, -1, -1))[::-1] == got).all(), "whoever reads, in whatever order"


def test_local_shards_are_read_against_their_checksums_once_and_again_when_they_change(
    many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(many_shards, tmp_path / "copy")
    read: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: read.append(Path(file.name).name) or real(file, name)
    )
    everything = np.arange(one(copy).sequences_per_epoch[0])
    shards = sorted(path.name for path in (copy / "shards").iterdir())
    for expected in (shards, []):
        one(copy, cache_dir=tmp_path / "cache").read(everything)
        assert sorted(read) == expected
        read.clear()
    path = copy / "shards" / shards[1]
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(2000)
        file.write(bytes(8))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times leaves it
    with pytest.raises(DamagedShardError, match=rf"{shards[1]}: damaged shard \(not the SHA-256 in its manifest\)"):
        one(copy, cache_dir=tmp_path / "cache").read(everything)
    (tmp_path / "file").write_text("no place for notes")
    one(many_shards, cache_dir=tmp_path / "file").read(everything)


def test_a_shard_that_shrinks_under_a_run_is_named(many_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(many_shards, tmp_path / "copy")
    stream = one(tmp_path / "copy")
    stream.read(np.arange(500))
    for path in (tmp_path / "copy" / "shards").iterdir():
        os.truncate(path, 1000)
    with pytest.raises(DamagedShardError, match="it became shorter while it was open"):
        stream.read(np.arange(500))


@pytest.fixture
def server(many_shards: Path):
    """An HTTP server of the dataset, and the list of paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            asked.append(self.path)

    httpd = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(many_shards.parent))
    )
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/{many_shards.name}", asked
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http with curl")
def test_an_http_dataset_is_the_local_one_and_is_fetched_once(server, many_shards: Path, tmp_path: Path) -> None:
    url, asked = server
    stream = one(url, cache_dir=tmp_path)
    assert (stream.read(np.arange(300)) == one(many_shards).read(np.arange(300))).all()
    assert stream.identity() == one(many_shards).identity()
    stream._datasets[0]._remote._queue.join()
    shards = [path for path in asked if path.endswith(".tar")]
    assert sorted(shards) == sorted(set(shards))
    one(url, cache_dir=tmp_path).read(np.arange(300))
    assert len([path for path in asked if path.endswith(".tar")]) == len(shards)
    assert load_manifest(url, tmp_path).load_tokenizer().vocab_size == stream.vocab_size


def test_a_pipe_is_read_and_what_is_damaged_on_the_way_is_refused(many_shards: Path, tmp_path: Path) -> None:
    stream = one(f"pipe:cat {many_shards}", cache_dir=tmp_path / "cache")
    assert (stream.read(np.arange(50)) == one(many_shards).read(np.arange(50))).all()
    directory, _ = damaged_copy(many_shards, tmp_path / "copy", "tokens")
    stream = one(f"pipe:cat {directory}", cache_dir=tmp_path / "other")
    with pytest.raises(DamagedShardError, match=r"000002\.tar: damaged shard \(not the listed SHA-256\)"):
        stream.read(np.arange(stream.sequences_per_epoch[0]))


def test_an_unreachable_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DepthpipeError, match=r"pipe:cat /nowhere/manifest\.json: cannot read"):
        one("pipe:cat /nowhere", cache_dir=tmp_path)


def test_processes_that_open_one_url_at_once_do_not_disturb_each_other(many_shards: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(8, multiprocessing.get_context("fork")) as pool:
        opened = [pool.submit(load_manifest, f"pipe:cat {many_shards}", tmp_path) for _ in range(40)]
        fingerprints = {future.result().fingerprint for future in opened}
    assert fingerprints == {Manifest.load(many_shards).fingerprint}
    assert not list(tmp_path.glob("fetching-*"))


def test_a_url_that_is_gone_is_served_from_what_it_last_held(
    many_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = shutil.copytree(many_shards, tmp_path / "there")
    expected = one(f"pipe:cat {there}", cache_dir=tmp_path / "cache").read(np.arange(300))
    there.rename(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        stream = one(f"pipe:cat {there}", cache_dir=tmp_path / "cache")
    assert "going on with what it last held" in caplog.text
    assert (stream.read(np.arange(300)) == expected).all()


def test_a_cache_that_cannot_be_written_is_named(many_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DepthpipeError, match=r"/file: cannot write the cache .*data\.cache_dir"):
        one(f"pipe:cat {many_shards}", cache_dir=tmp_path / "file")


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http with curl")
def test_what_curl_cannot_read_is_said_in_words(server, tmp_path: Path) -> None:
    url, _ = server
    with pytest.raises(DepthpipeError, match=r"/nothing/manifest\.json: cannot read \(the server does not give it\)"):
        one(f"{url}/nothing", cache_dir=tmp_path)
    with pytest.raises(DepthpipeError, match=r"manifest\.json: cannot read \(connection refused\)"):
        one(f"http://127.0.0.1:{free_port()}", cache_dir=tmp_path)


def test_the_cache_keeps_to_its_limit(many_shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(many_shards)
    limit = sum(sorted(shard.bytes for shard in manifest.shards)[-4:])
    remote = RemoteDataset(f"pipe:cat {many_shards}", tmp_path, cache_bytes=limit)
    for shard in [*range(len(manifest.shards)), 0]:
        remote.fetch(shard)
        kept = list((remote.manifest.directory / "shards").glob("*.tar"))
        assert sum(path.stat().st_size for path in kept) <= limit
        assert remote.manifest.directory / manifest.shards[shard].file in kept
