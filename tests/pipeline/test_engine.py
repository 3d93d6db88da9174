"""The pipeline computes the model: bit for bit, at every cut."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.engine_cases import (
    MODEL,
    disagreement,
    gradients_before_step,
    gradients_of_plain_model,
    losses_around_checkpoint,
    losses_of_steps,
    make_config,
    resume_error,
    skipped_sequences,
    validation_losses,
    with_fault,
)
from tests.worker_pool import WorkerPool

MODELS = {
    "block": MODEL,
    "full": dataclasses.replace(MODEL, residual="full"),
    "standard": dataclasses.replace(MODEL, residual="standard"),
}
TIED = dataclasses.replace(MODEL, tie_word_embeddings=True)


def gather(results: list[tuple[float, dict[str, torch.Tensor], int]]) -> tuple[float, dict[str, torch.Tensor]]:
    losses = {loss for loss, _, _ in results}
    assert len(losses) == 1
    return losses.pop(), {name: grad for _, found, _ in results for name, grad in found.items()}


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)]
    assert not different


@pytest.mark.parametrize("residual", MODELS)
def test_gradients_are_bit_identical_at_every_cut(workers: WorkerPool, residual: str) -> None:
    model = MODELS[residual]
    loss, expected = workers.run(1, gradients_of_plain_model, make_config(model))[0]
    for split in ([4], [2, 2], [1, 3], [1, 2, 1], [1, 1, 1, 1]):
        config = make_config(model, pipeline=len(split), split=split)
        cut_loss, found = gather(workers.run(len(split), gradients_before_step, config))
        assert cut_loss == loss
        assert_equal_gradients(found, expected)


@pytest.mark.parametrize("run_ahead", [2, 3])
def test_running_ahead_moves_no_bit(workers: WorkerPool, run_ahead: int) -> None:
    loss, expected = workers.run(1, gradients_of_plain_model, make_config())[0]
    for ranks in (2, 4):
        config = make_config(pipeline=ranks, run_ahead=run_ahead)
        cut_loss, found = gather(workers.run(ranks, gradients_before_step, config))
        assert cut_loss == loss
        assert_equal_gradients(found, expected)


@pytest.mark.parametrize("residual", ["block", "full"])
@pytest.mark.parametrize("split", [[3, 1], [1, 1, 1, 1]])
def test_dualpipev_computes_the_same_bits(workers: WorkerPool, residual: str, split: list[int]) -> None:
    model = MODELS[residual]
    loss, expected = workers.run(1, gradients_of_plain_model, make_config(model))[0]
    ranks = len(split) // 2
    config = make_config(model, pipeline=ranks, split=split, schedule="dualpipev")
    cut_loss, found = gather(workers.run(ranks, gradients_before_step, config))
    assert cut_loss == loss
    assert_equal_gradients(found, expected)


def test_tied_embeddings_have_the_same_gradient_at_every_cut(workers: WorkerPool) -> None:
    model = dataclasses.replace(MODEL, tie_word_embeddings=True)
    loss, expected = gather(workers.run(1, gradients_before_step, make_config(model)))
    assert torch.equal(expected["0.weight"], expected["5.weight"])
    plain_loss, plain = workers.run(1, gradients_of_plain_model, make_config(model))[0]
    assert loss == plain_loss
    # One weight's gradient against the sum of two: the same numbers, added in another order.
    torch.testing.assert_close(expected["0.weight"], plain["0.weight"], rtol=1e-5, atol=1e-7)
    for ranks, changes in ((2, {}), (4, {}), (2, {"schedule": "dualpipev"})):
        cut_loss, found = gather(
            workers.run(ranks, gradients_before_step, make_config(model, pipeline=ranks, **changes))
        )
        assert cut_loss == loss
        assert_equal_gradients(found, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_norms_of_50_steps_are_bit_identical(workers: WorkerPool, tied: bool) -> None:
    model = dataclasses.replace(MODEL, tie_word_embeddings=tied)
    expected = workers.run(1, losses_of_steps, make_config(model), 50)[0]
    assert expected[-1][0] < expected[0][0] - 0.5
    for pipeline in (2, 4):
        for rank_results in workers.run(pipeline, losses_of_steps, make_config(model, pipeline=pipeline), 50):
            assert rank_results == expected


@pytest.mark.parametrize("residual", MODELS)
def test_activation_checkpointing_moves_no_bit(workers: WorkerPool, residual: str) -> None:
    model = MODELS[residual]
    loss, expected = workers.run(1, gradients_of_plain_model, make_config(model))[0]
    for ranks, schedule in ((1, "1f1b"), (3, "1f1b"), (2, "dualpipev")):
        config = make_config(model, pipeline=ranks, schedule=schedule, activation_checkpointing="layer")
        cut_loss, found = gather(workers.run(ranks, gradients_before_step, config))
        assert cut_loss == loss
        assert_equal_gradients(found, expected)


def test_validation_loss_does_not_depend_on_the_cut_and_disturbs_nothing(workers: WorkerPool) -> None:
    expected = workers.run(1, validation_losses, make_config())[0]
    assert expected[0] > expected[-1]
    assert [expected[1], expected[3]] == [loss for loss, _ in workers.run(1, losses_of_steps, make_config(), 2)[0]]
    for ranks, schedule in ((2, "1f1b"), (4, "1f1b"), (2, "dualpipev")):
        for found in workers.run(ranks, validation_losses, make_config(pipeline=ranks, schedule=schedule)):
            assert found == expected


def test_data_parallel_with_zero_1_agrees_to_summation_order(workers: WorkerPool) -> None:
    # Twice the sequences in each step as two replicas of the same micro-batches: gradients are summed over the
    # replicas by an all-reduce instead of one after the other, and Adam magnifies the difference. 20 steps stay within:
    relative = 1e-4
    expected = workers.run(1, losses_of_steps, make_config(micro_batches=12, lr=1e-3), 20)[0]
    for found in workers.run(4, losses_of_steps, make_config(pipeline=2, data=2, lr=1e-3), 20):
        assert found[0] == pytest.approx(expected[0], rel=1e-6)  # loss and norm before any update
        for (loss, _), (expected_loss, _) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=relative)


def test_bf16_trains_alike_at_every_cut(workers: WorkerPool) -> None:
    config = make_config(precision="bf16", lr=1e-3)
    expected = [loss for loss, _ in workers.run(1, losses_of_steps, config, 10)[0]]
    assert expected[-1] < expected[0] - 0.1
    for ranks, schedule in ((3, "1f1b"), (2, "dualpipev")):
        config = make_config(precision="bf16", lr=1e-3, pipeline=ranks, schedule=schedule)
        found = [loss for loss, _ in workers.run(ranks, losses_of_steps, config, 10)[0]]
        # The same bits until clipping: DeepSpeed's norm of bf16 gradients is summed stage by stage.
        assert found[0] == expected[0]
        assert found == pytest.approx(expected, rel=1e-3)
    config = make_config(precision="bf16", lr=1e-3, pipeline=2, data=2, micro_batches=3)
    found = [loss for loss, _ in workers.run(4, losses_of_steps, config, 10)[0]]
    assert found == pytest.approx(expected, rel=5e-3)  # bf16 has three significant digits


@pytest.mark.parametrize("residual", MODELS)
def test_every_hop_sends_its_tensors_and_nothing_more(workers: WorkerPool, residual: str) -> None:
    model = MODELS[residual]
    config = make_config(model, pipeline=4)
    sent = [sent for _, _, sent in workers.run(4, gradients_before_step, config)]
    tensor = 2 * 16 * model.hidden_size * 4  # micro_batch x sequence x hidden x itemsize
    hops = [config.micro_batches * model.num_sources(layer) * tensor for layer in (1, 2, 3)]
    # Stage s sends activations over hop s and gradients back over hop s - 1.
    assert sent == [hops[0], hops[0] + hops[1], hops[1] + hops[2], hops[2]]


def test_200_sources_in_4_stages(workers: WorkerPool) -> None:
    model = dataclasses.replace(MODEL, residual="full", num_hidden_layers=100)
    assert model.num_sources(100) == 201
    loss, expected = workers.run(1, gradients_of_plain_model, make_config(model, micro_batches=2))[0]
    config = make_config(model, pipeline=4, micro_batches=2)
    cut_loss, found = gather(workers.run(4, gradients_before_step, config))
    assert cut_loss == loss
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("dropped", "source 0 is missing"),
        ("shape", "source 0 is (2, 15, 32)"),
        ("dtype", "torch.float64"),
        ("count", "1 tensors where the hop carries 2"),
    ],
)
def test_a_fault_at_a_hop_is_loud_and_named(workers: WorkerPool, fault: str, named: str) -> None:
    first, second = workers.run(2, with_fault, make_config(pipeline=2), fault)
    assert second.startswith("TransportError: gradients to stage 0, micro-batch 0") and named in second
    assert first != "nothing"  # the neighbour does not go on with what it has


def test_document_boundaries_reach_every_stage(workers: WorkerPool) -> None:
    config = make_config(document_attention=True)
    loss, expected = workers.run(1, gradients_of_plain_model, config)[0]
    assert loss != workers.run(1, gradients_of_plain_model, make_config())[0][0]
    for ranks, changes in (
        (1, {}),
        (4, {}),
        (2, {"schedule": "dualpipev"}),
        (3, {"activation_checkpointing": "layer"}),
    ):
        config = make_config(document_attention=True, pipeline=ranks, **changes)
        cut_loss, found = gather(workers.run(ranks, gradients_before_step, config))
        assert cut_loss == loss
        assert_equal_gradients(found, expected)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {"pipeline": 2, "schedule": "dualpipev"}),
        (2, {"pipeline": 2, "precision": "bf16"}),
        (4, {"pipeline": 2, "data": 2}),
        (4, {"pipeline": 2, "data": 2, "precision": "bf16", "schedule": "dualpipev"}),
    ],
    ids=["dualpipev", "bf16", "zero-1", "all"],
)
def test_another_engine_resumes_to_the_same_bits(
    workers: WorkerPool, tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    config = make_config(TIED, **changes)
    expected = workers.run(ranks, losses_around_checkpoint, config, tmp_path, False)
    assert workers.run(ranks, losses_around_checkpoint, config, tmp_path, True) == expected


@pytest.mark.parametrize(
    "resumed",
    [{"pipeline": 1}, {"pipeline": 4}, {"pipeline": 3, "split": [2, 1, 1]}, {"pipeline": 2, "schedule": "dualpipev"}],
    ids=["1 stage", "4 stages", "another split", "dualpipev"],
)
def test_a_run_resumes_on_another_cut_to_the_same_bits(
    workers: WorkerPool, tmp_path: Path, resumed: dict[str, Any]
) -> None:
    (expected, _) = workers.run(2, losses_around_checkpoint, make_config(TIED, pipeline=2), tmp_path, False)
    config = make_config(TIED, **resumed)
    for losses in workers.run(config.parallel.world_size, losses_around_checkpoint, config, tmp_path, True):
        assert losses == expected


@pytest.mark.parametrize(
    ("written", "resumed"),
    [
        ({"pipeline": 2}, {"pipeline": 2, "data": 2}),
        ({"pipeline": 1, "data": 4}, {"pipeline": 2}),
        ({"pipeline": 2, "data": 2}, {"pipeline": 1, "data": 3}),
        ({"pipeline": 2, "data": 2, "precision": "bf16"}, {"pipeline": 3, "precision": "bf16"}),
        ({"pipeline": 2, "precision": "bf16"}, {"pipeline": 1, "data": 4, "precision": "bf16"}),
        ({"pipeline": 2, "precision": "bf16"}, {"pipeline": 2, "precision": "fp32"}),
    ],
    ids=["1 to 2 replicas", "4 to 1", "2 to 3", "bf16, 2 to 1", "bf16, 1 to 4", "bf16 to fp32"],
)
def test_a_run_resumes_on_another_number_of_replicas(
    workers: WorkerPool, tmp_path: Path, written: dict[str, Any], resumed: dict[str, Any]
) -> None:
    """Replicas sum gradients in another order, and bf16 rounds; so these losses agree within a bound."""
    results = []
    for changes, resume in ((written, False), (resumed, True)):
        # The same 24 sequences a step on any number of replicas.
        config = make_config(TIED, micro_batches=12 // changes.get("data", 1), **changes)
        results.append(workers.run(config.parallel.world_size, losses_around_checkpoint, config, tmp_path, resume)[0])
    bound = 1e-3 if "precision" in written else 1e-5
    assert results[1] == pytest.approx(results[0], rel=bound)


def test_a_flipped_byte_of_a_checkpoint_is_named_on_every_rank(workers: WorkerPool, tmp_path: Path) -> None:
    config = make_config(pipeline=2)
    workers.run(2, losses_around_checkpoint, config, tmp_path, False)
    assert workers.run(2, resume_error, config, tmp_path) == ["nothing"] * 2
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        path = tmp_path / "checkpoints" / "step-00000002" / name
        sound = path.read_bytes()
        path.write_bytes(sound[:-2000] + bytes([sound[-2000] ^ 1]) + sound[-1999:])
        for message in workers.run(2, resume_error, config, tmp_path):
            assert message.startswith(f"{path}: is damaged") and "remove" in message
        path.write_bytes(sound)


def test_ranks_with_run_directories_of_their_own_are_named(workers: WorkerPool, tmp_path: Path) -> None:
    directories = [tmp_path / "first", tmp_path / "first", tmp_path / "second"]
    for directory in directories:
        directory.mkdir(exist_ok=True)
    for message in workers.run(3, disagreement, make_config(pipeline=3), directories, "run directory"):
        assert message.startswith("run.dir: ") and "is not the same directory on rank 2 as on rank 0" in message
    assert not list((tmp_path / "first").iterdir())
    alike = workers.run(3, disagreement, make_config(pipeline=3), [tmp_path] * 3, "run directory")
    assert alike == ["nothing"] * 3


def test_ranks_that_read_other_datasets_are_named(workers: WorkerPool, dataset: Path) -> None:
    halves = [dataset / "train", dataset / "validation"]
    for message in workers.run(2, disagreement, make_config(pipeline=2), halves, "dataset"):
        assert message.startswith("data: rank 1 and rank 0 do not read the same datasets")
    assert workers.run(2, disagreement, make_config(pipeline=2), [halves[0]] * 2, "dataset") == ["nothing"] * 2


def test_stages_that_skip_different_sequences_are_found(workers: WorkerPool, dataset: Path, tmp_path: Path) -> None:
    """Inputs come from the first stage's copy of the data and labels from the last one's."""
    sound, damaged = dataset / "train", shutil.copytree(dataset / "train", tmp_path / "damaged")
    shard = damaged / "shards" / "000000.tar"
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(b"\xff" * (shard.stat().st_size // 4))
    config = make_config(dataclasses.replace(MODEL, vocab_size=512), pipeline=2)
    assert workers.run(2, skipped_sequences, config, [sound, sound]) == [[0] * 4] * 2
    (alike, _) = workers.run(2, skipped_sequences, config, [damaged, damaged])
    assert len(alike) == 4 and sum(alike) > 0
    for answer in workers.run(2, skipped_sequences, config, [sound, damaged]):
        assert "rank 1 and rank 0 could not read different sequences" in answer
