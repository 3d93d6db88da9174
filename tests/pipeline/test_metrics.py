"""metrics.jsonl: names that stay, numbers that survive, a file that reads like an uninterrupted run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.errors import DepthpipeError
from pipeline.metrics import MetricsWriter, StepMetrics, known_peak_flops, peak_flops_per_second, read_metrics

METRICS = StepMetrics(
    step=1,
    tokens=16384,
    loss=0.1 + 0.2,
    grad_norm=1 / 3,
    lr=3e-3,
    step_time_s=1.25,
    tokens_per_second=13107.2,
    tokens_per_second_per_device=6553.6,
    mfu=0.38,
    data_wait_s=1e-300,
    bubble_fraction=0.0588,
    memory_bytes=812 << 20,
    time=1795289535.123456,
)


def run_of(steps: range) -> list[StepMetrics]:
    return [
        replace(METRICS, step=step, loss=9 - step / 7, validation_loss=step if step % 5 == 0 else None)
        for step in steps
    ]


def write_run(run_dir: Path, steps: range, tensorboard: bool = False) -> None:
    with MetricsWriter(run_dir, tensorboard, start_step=steps.start - 1) as writer:
        for metrics in run_of(steps):
            writer.write(metrics)


def test_the_names_that_dashboards_read():
    names = "step tokens loss grad_norm lr step_time_s tokens_per_second tokens_per_second_per_device mfu data_wait_s"
    names += " bubble_fraction memory_bytes time skipped_sequences"
    assert list(json.loads(METRICS.to_json())) == names.split()
    validated = replace(METRICS, validation_loss=2.5)
    assert list(json.loads(validated.to_json())) == [*names.split(), "validation_loss"]


def test_numbers_come_back_to_the_last_bit(tmp_path):
    written = [METRICS, replace(METRICS, step=2, mfu=None, validation_loss=math.pi)]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for metrics in written:
            writer.write(metrics)
    read, offset = read_metrics(tmp_path)
    assert read == written
    assert offset == (tmp_path / "metrics.jsonl").stat().st_size


def test_a_loss_that_is_not_a_number_is_valid_json_and_comes_back_as_nan():
    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    line = replace(METRICS, loss=math.nan, grad_norm=math.inf).to_json()
    assert json.loads(line, parse_constant=no_constants)["loss"] is None
    read = StepMetrics.from_json(line)
    assert math.isnan(read.loss) and math.isnan(read.grad_norm)


def test_no_file_yet_is_no_lines(tmp_path):
    assert read_metrics(tmp_path) == ([], 0)


def test_a_torn_last_line_is_left_for_the_next_call(tmp_path):
    first, second = (metrics.to_json() + "\n" for metrics in run_of(range(1, 3)))
    path = tmp_path / "metrics.jsonl"
    path.write_text(first + second[:40])
    read, offset = read_metrics(tmp_path)
    assert [metrics.step for metrics in read] == [1] and offset == len(first)
    path.write_text(first + second)
    read, offset = read_metrics(tmp_path, offset)
    assert [metrics.step for metrics in read] == [2] and offset == len(first + second)


def test_keys_of_newer_versions_are_passed_over():
    record = json.loads(METRICS.to_json()) | {"expert_load": [1, 2], "loss_scale": 8}
    assert StepMetrics.from_json(json.dumps(record)) == METRICS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "Expecting"),
        ("[1]", "not a JSON object"),
        ('{"step": 3}', "no key 'tokens'"),
        (METRICS.to_json().replace("16384", '"many"'), "'tokens' is not a number"),
        (METRICS.to_json().replace('"step": 1', '"step": null'), "'step' is not a whole number"),
        ("\xff", "Expecting"),
    ],
)
def test_a_damaged_line_names_file_and_line(tmp_path, line, reason):
    good = METRICS.to_json() + "\n"
    (tmp_path / "metrics.jsonl").write_text(good * 2 + line + "\n" + good)
    for after_offset in (0, len(good)):
        with pytest.raises(DepthpipeError, match=rf"metrics\.jsonl, line 3: .*{reason}.*remove the line") as caught:
            read_metrics(tmp_path, after_offset)
        assert "\n" not in str(caught.value)


def test_a_resumed_run_reads_like_an_uninterrupted_one(tmp_path):
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    for directory in (interrupted, whole):
        directory.mkdir()
    write_run(whole, range(1, 21))
    write_run(interrupted, range(1, 14))
    with open(interrupted / "metrics.jsonl", "a") as file:
        file.write(METRICS.to_json()[:50])  # torn by the kill
    write_run(interrupted, range(11, 21))  # the last checkpoint was at step 10
    assert (interrupted / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [path.name for path in interrupted.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_goes_even_where_no_step_is_cut(tmp_path):
    write_run(tmp_path, range(1, 4))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 4, "lo')
    MetricsWriter(tmp_path, tensorboard=False, start_step=3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_kill_during_the_cut_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write_run(tmp_path, range(1, 9))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, tensorboard=False, start_step=4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


WRITER = """
import sys
from dataclasses import replace
from pipeline.metrics import MetricsWriter, StepMetrics
metrics = StepMetrics.from_json(sys.argv[2])
with MetricsWriter(sys.argv[1], tensorboard=False) as writer:
    for step in range(1, int(sys.argv[3]) + 1):
        writer.write(replace(metrics, step=step))
"""


def start_writer(run_dir: Path, steps: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(run_dir), METRICS.to_json(), str(steps)])


def test_a_reader_beside_a_writing_process_sees_every_line_once(tmp_path):
    writer = start_writer(tmp_path, 20_000)
    steps: list[int] = []
    reads, offset = 0, 0
    while writer.poll() is None or offset < (tmp_path / "metrics.jsonl").stat().st_size:
        read, offset = read_metrics(tmp_path, offset)
        steps += [metrics.step for metrics in read]
        reads += bool(read)
    assert writer.returncode == 0
    assert steps == list(range(1, 20_001))
    assert reads > 3  # it did read while the other wrote


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    writer = start_writer(tmp_path, 10_000_000)
    while not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").stat().st_size < 200_000:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    read, _ = read_metrics(tmp_path)
    assert [metrics.step for metrics in read] == list(range(1, len(read) + 1))
    write_run(tmp_path, range(501, 511))
    assert [metrics.step for metrics in read_metrics(tmp_path)[0]] == list(range(1, 511))


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    write_run(tmp_path, range(1, 9), tensorboard=True)
    write_run(tmp_path, range(6, 13), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    losses = events.Scalars("training/loss")
    assert [event.step for event in losses] == list(range(1, 13))
    assert [event.value for event in losses] == pytest.approx([metrics.loss for metrics in run_of(range(1, 13))])
    assert losses[0].wall_time == METRICS.time
    assert [(event.step, event.value) for event in events.Scalars("training/validation_loss")] == [(5, 5), (10, 10)]
    assert set(events.Tags()["scalars"]) == {
        *(f"training/{name}" for name in ("loss", "validation_loss", "grad_norm", "lr", "tokens")),
        *(f"performance/{name}" for name in ("step_time_s", "tokens_per_second", "tokens_per_second_per_device")),
        *(f"performance/{name}" for name in ("mfu", "data_wait_s", "bubble_fraction", "memory_bytes")),
        "performance/skipped_sequences",
    }


def test_without_tensorboard_there_is_none(tmp_path):
    write_run(tmp_path, range(1, 3))
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X OAM", 1307.4),
    ],
)
def test_the_peak_of_known_devices(name, teraflops):
    assert known_peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA RTX A4000",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "",
    ],
)
def test_no_peak_is_invented_for_others(name):
    assert known_peak_flops(name) is None


def test_the_peak_of_the_cpu_is_what_a_matmul_reaches():
    peak = peak_flops_per_second("cpu")
    size = 256
    a, b = torch.rand(size, size), torch.rand(size, size)
    fastest = math.inf
    for _ in range(200):
        start = time.perf_counter()
        torch.mm(a, b)
        fastest = min(fastest, time.perf_counter() - start)
    assert 0.5 < peak / (2 * size**3 / fastest) < 2


def test_the_peak_of_the_cpu_holds_on_a_busy_machine():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        undisturbed = peak_flops_per_second("cpu")
        busy = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _ in range(2 * len(os.sched_getaffinity(0)))
        ]
        try:
            time.sleep(0.2)
            disturbed = peak_flops_per_second("cpu")
        finally:
            for process in busy:
                process.kill()
                process.wait()
    finally:
        torch.set_num_threads(threads)
    assert disturbed == pytest.approx(undisturbed, rel=0.25)
