"""The order of the data is a function of (manifest, seed, sequence length), and a position in it is one small dict."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import DepthpipeError
from data_prep.job import tokenize_corpus
from data_prep.manifest import Manifest
from data_prep.order import DatasetOrder, permutation
from data_prep.plan import Options
from data_prep.stream import BatchLoader, DatasetSource, SequenceStream

LENGTH = 128


@pytest.fixture
def stream(dataset: Path) -> SequenceStream:
    return SequenceStream([DatasetSource(str(dataset))], LENGTH, seed=7)


def whole_stream(directory: Path) -> np.ndarray:
    manifest = Manifest.load(directory)
    return np.concatenate([c for i in range(len(manifest.shards)) for c in manifest.open_shard(i).chunks()])


def global_batches(
    stream: SequenceStream,
    ranks: int,
    steps: int,
    position: dict | None = None,
    batch: int = 16,
    prefetch: int | None = None,
) -> tuple[torch.Tensor, dict]:
    """Inputs and labels of `steps` steps, rank after rank; and the position afterwards, equal on all ranks.

    Without `prefetch` the ranks read ahead differently.
    """
    loaders = [
        BatchLoader(
            stream,
            global_batch_size=batch,
            micro_batch_size=2,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            position=position,
            prefetch=rank % 5 if prefetch is None else prefetch,
        )
        for rank in range(ranks)
    ]
    rows = []
    for _ in range(steps):
        for loader in loaders:
            for _ in range(batch // ranks // 2):
                inputs, labels = next(loader)
                assert inputs is not None and labels is not None
                rows.append(torch.cat([inputs, labels[:, -1:]], dim=1))
    positions = [loader.position() for loader in loaders]
    for loader in loaders:
        loader.close()
    assert all(position == positions[0] for position in positions)
    return torch.cat(rows), positions[0]


def test_an_epoch_holds_every_sequence_once(dataset: Path, stream: SequenceStream) -> None:
    (count,) = stream.sequences_per_epoch
    tokens = whole_stream(dataset)
    order = DatasetOrder(stream.manifests[0], LENGTH, seed=7)
    assert count >= 0.998 * len(tokens) / LENGTH
    for epoch in (0, 1):
        starts = order.starts(np.arange(epoch * count, (epoch + 1) * count))
        assert np.diff(np.sort(starts)).min() >= LENGTH and starts.max() + LENGTH < len(tokens)
        for k in range(0, count, 7):
            expected = tokens[starts[k] : starts[k] + LENGTH + 1]
            assert (stream.sequence(epoch * count + k) == expected).all()
    assert any((stream.sequence(k) != stream.sequence(count + k)).any() for k in range(8))


def test_seed_and_sequence_length_decide_the_order(dataset: Path, stream: SequenceStream) -> None:
    same = SequenceStream([DatasetSource(str(dataset))], LENGTH, seed=7)
    other = SequenceStream([DatasetSource(str(dataset))], LENGTH, seed=8)
    assert all((stream.sequence(k) == same.sequence(k)).all() for k in range(20))
    assert any((stream.sequence(k) != other.sequence(k)).any() for k in range(20))


@pytest.mark.parametrize("prefetch", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_order_is_the_same_on_every_number_of_ranks_that_read_ahead(
    stream: SequenceStream, ranks: int, prefetch: int
) -> None:
    together, position = global_batches(stream, ranks, steps=3, prefetch=prefetch)
    expected = np.stack([stream.sequence(k) for k in range(3 * 16)])
    assert (together.numpy() == expected).all()
    assert position == {"version": 1, "samples": 3 * 16, **stream.identity()}


def test_every_step_has_its_position(stream: SequenceStream) -> None:
    loader = BatchLoader(stream, global_batch_size=6, micro_batch_size=3, data_parallel_rank=1, data_parallel_size=2)
    for step in range(5):
        next(loader)
        assert loader.position()["samples"] == 6 * (step + 1)
    loader.close()


def test_resuming_anywhere_on_other_ranks_continues_the_order(stream: SequenceStream, rng: random.Random) -> None:
    uninterrupted, _ = global_batches(stream, 1, steps=12)
    for _ in range(4):
        stop, ranks_before, ranks_after = rng.randrange(1, 11), rng.choice([1, 2, 4]), rng.choice([1, 2, 4, 8])
        first, position = global_batches(stream, ranks_before, stop)
        position = json.loads(json.dumps(position))
        rest, _ = global_batches(stream, ranks_after, 12 - stop, position)
        assert torch.equal(torch.cat([first, rest]), uninterrupted)


def test_resuming_with_another_batch_size_skips_and_repeats_nothing(stream: SequenceStream) -> None:
    uninterrupted, _ = global_batches(stream, 1, steps=4, batch=16)
    first, position = global_batches(stream, 2, steps=2, batch=16)
    rest, _ = global_batches(stream, 1, steps=4, position=position, batch=8)
    assert torch.equal(torch.cat([first, rest]), uninterrupted)


def test_a_position_inside_a_step_counts_whole_steps_only(stream: SequenceStream) -> None:
    loader = BatchLoader(stream, global_batch_size=8, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1)
    for _ in range(6):
        next(loader)
    assert loader.position()["samples"] == 8
    loader.close()


@pytest.mark.parametrize("columns", ["inputs", "labels"])
def test_one_column_alone_is_the_column_of_both(stream: SequenceStream, columns: str) -> None:
    arguments = {"global_batch_size": 4, "micro_batch_size": 4, "data_parallel_rank": 0, "data_parallel_size": 1}
    both, one = BatchLoader(stream, **arguments), BatchLoader(stream, columns=columns, **arguments)
    inputs, labels = next(both)
    only_inputs, only_labels = next(one)
    both.close()
    one.close()
    assert inputs.dtype == torch.int64 and inputs.shape == (4, LENGTH)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    if columns == "inputs":
        assert only_labels is None and torch.equal(only_inputs, inputs)
    else:
        assert only_inputs is None and torch.equal(only_labels, labels)


def test_a_position_of_another_stream_is_refused(dataset: Path, stream: SequenceStream) -> None:
    _, position = global_batches(stream, 1, steps=1)
    for other, key in (
        (SequenceStream([DatasetSource(str(dataset))], LENGTH, seed=8), "run.seed"),
        (SequenceStream([DatasetSource(str(dataset))], 64, seed=7), "data.sequence_length"),
        (SequenceStream([DatasetSource(str(dataset))], LENGTH, seed=7, window_tokens=5000), "window_tokens"),
        (SequenceStream([DatasetSource(str(dataset), 1.0), DatasetSource(str(dataset), 1.0)], LENGTH, 7), "data.train"),
    ):
        with pytest.raises(DepthpipeError, match=key):
            global_batches(other, 1, steps=1, position=position)


def test_sizes_that_do_not_divide_are_refused(stream: SequenceStream) -> None:
    with pytest.raises(ValueError, match="global_batch_size 12"):
        BatchLoader(stream, global_batch_size=12, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=4)


def test_permutations_are_permutations_and_differ_by_key() -> None:
    assert sorted(permutation(1000, 1, 2)) == list(range(1000))
    assert (permutation(1000, 1, 2) != permutation(1000, 2, 1)).any()
    assert permutation(5, 0).tolist() == [2, 0, 3, 1, 4]  # a change here would change every user's data order


def test_wrong_directories_and_damaged_shards_end_in_one_line(
    corpus: Path, tokenizer_path: Path, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(DepthpipeError, match="not a dataset"):
        SequenceStream([DatasetSource(str(tmp_path / "nowhere"))], LENGTH, 0)
    halves = tmp_path / "halves"
    tokenize_corpus(
        [str(corpus)], tokenizer_path, halves, workers=1, include=["*.py"], options=Options(validation_fraction=0.2)
    )
    with pytest.raises(DepthpipeError, match="halves/train"):
        SequenceStream([DatasetSource(str(halves))], LENGTH, 0)
    with pytest.raises(DepthpipeError, match=r"data\.sequence_length"):
        SequenceStream([DatasetSource(str(dataset))], 10**9, 0)
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = copy / Manifest.load(copy).shards[0].file
    shard.write_bytes(shard.read_bytes()[:-512])
    damaged = SequenceStream([DatasetSource(str(copy))], LENGTH, 0)
    loader = BatchLoader(damaged, global_batch_size=64, micro_batch_size=64, data_parallel_rank=0, data_parallel_size=1)
    with pytest.raises(DepthpipeError, match=r"shards/000000\.tar: damaged shard"):
        for _ in range(100):
            next(loader)
    loader.close()
