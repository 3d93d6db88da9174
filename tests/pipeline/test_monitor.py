"""The monitor's frames, drawn by rich from real files at several sizes, and the live view in a pseudo-terminal."""

from __future__ import annotations

import argparse
import fcntl
import io
import itertools
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from data_prep.errors import DepthpipeError
from pipeline.curve import Curve, Series, sparkline
from pipeline.history import RunHistory
from pipeline.metrics import MetricsWriter, read_metrics
from pipeline.monitor import Frame, add_commands, monitor, read_config
from tests.pipeline.conftest import METRICS

CONFIG = """
run: {dir: runs/quickstart, seed: 1234}
model: {residual: block, layers_per_block: 2, num_hidden_layers: 8, hidden_size: 256}
data: {train: data/train, sequence_length: 512}
parallel: {pipeline: 2, data: 1, schedule: 1f1b}
train: {steps: 200, global_batch_size: 32, micro_batch_size: 2, precision: fp32}
"""


def make_run(run_dir: Path, steps: int, seconds_ago: float = 1.0, **changes: float | None) -> Path:
    """A run of `steps` steps of 1.25 s, the last one `seconds_ago`; `changes` are in its last step."""
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(CONFIG)
    end = time.time() - seconds_ago
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            metrics = replace(
                METRICS,
                step=step,
                tokens=16384 * step,
                loss=3 + 6 * math.exp(-step / 30),
                time=end - 1.25 * (steps - step),
                validation_loss=3.5 if step % 20 == 0 else None,
            )
            writer.write(replace(metrics, **changes) if step == steps else metrics)
    return run_dir


def frame(run_dir: Path, width: int = 80, height: int = 24) -> str:
    history = RunHistory(run_dir)
    history.refresh()
    console = Console(width=width, height=height, file=io.StringIO())
    started = (run_dir / "config.yaml").stat().st_mtime
    console.print(Frame(run_dir, read_config(run_dir), history, started), height=height)
    return console.file.getvalue()


@pytest.mark.parametrize("steps", [0, 1, 2, 150])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (240, 70), (120, 30), (72, 20), (60, 24), (40, 12), (20, 6)])
def test_a_frame_fills_its_room_and_no_more(tmp_path, steps, width, height):
    lines = frame(make_run(tmp_path / "run", steps), width, height).splitlines()
    assert len(lines) == height
    assert {cell_len(line) for line in lines} == {width}


def test_a_frame_at_80_by_24_shows_it_all(tmp_path):
    text = frame(make_run(tmp_path / "run", 150, loss=3.0421, mfu=0.391, memory_bytes=900 << 20))
    for part in (
        r"step 150 of 200 .*75% in 3m 08s  ETA 1m 01s",
        r"block residuals · 8 layers in blocks of 2 · hidden 256 · sequence 512",
        r"2 stages × 1 replica · 1f1b · 16 micro-batches of 2 · fp32",
        r"● running last step [12]s ago",
        r"loss +3\.0421",
        r"validation +3\.5000",
        r"grad norm +0\.750",
        r"learning rate +3\.00e-03",
        r"tokens/s +13,107",
        r"median +13,107",
        r"per device +6,554",
        r"MFU +39\.1 %",
        r"tokens so far +2\.46M",
        r"step time +1\.25 s",
        r"data wait +0\.4 %",
        r"bubble +5\.9 %",
        r"memory +900 MiB",
        r"step 1 +150 ",
    ):
        assert re.search(part, text), f"{part} is not in\n{text}"
    assert "▲" not in text


def test_states(tmp_path):
    empty = frame(make_run(tmp_path / "empty", 0))
    assert "● starting" in empty and "step 0 of 200" in empty and "no steps yet" in empty
    assert "● finished" in (finished := frame(make_run(tmp_path / "finished", 200, seconds_ago=9e5)))
    assert "ETA" not in finished and "▲" not in finished
    assert "● running last step 20s ago" in frame(make_run(tmp_path / "slow", 150, seconds_ago=20))
    stalled_run = make_run(tmp_path / "stalled", 150, seconds_ago=100)
    (stalled_run / "logs" / "rank-1.log").write_text("step 149\nRuntimeError: Connection reset by peer\n\n")
    stalled = frame(stalled_run)
    assert "● stalled last step 1m 40s ago" in stalled and "ETA" not in stalled
    assert "▲ no step for 1m 40s; rank-1.log: RuntimeError: Connection reset by peer" in stalled


def test_a_pause_shorter_than_ten_logged_steps_is_no_stall(tmp_path):
    run_dir = make_run(tmp_path / "run", 0)
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for step in (50, 100, 150):  # monitor.every: 50, so a line every 62 s
            writer.write(replace(METRICS, step=step, time=time.time() - 300 - 1.25 * (150 - step)))
    assert "● running last step 5m 00s ago" in frame(run_dir)


def test_what_looks_wrong_is_said(tmp_path):
    assert "▲ the loss is not a number at step 150" in frame(make_run(tmp_path / "nan", 150, loss=math.nan))
    assert "▲ data wait is 80% of the step" in frame(make_run(tmp_path / "wait", 1, data_wait_s=1.0))
    assert re.search(r"MFU +- ", frame(make_run(tmp_path / "mfu", 9, mfu=None)))
    late = make_run(tmp_path / "late", 0)
    os.utime(late / "config.yaml", (time.time() - 600,) * 2)
    assert "▲ no step yet after 10m 00s; see " in frame(late)


def test_the_layout_of_a_lopsided_run(tmp_path):
    run_dir = make_run(tmp_path / "run", 5)
    (run_dir / "config.yaml").write_text(CONFIG.replace("data: 1,", "data: 4, split: [5, 3],").replace("fp32", "auto"))
    assert "2 stages of 5 + 3 layers × 4 replicas · 1f1b · 4 micro-batches of 2 " in frame(run_dir)


def test_an_old_configuration_without_our_keys_still_shows(tmp_path):
    run_dir = make_run(tmp_path / "run", 5)
    (run_dir / "config.yaml").write_text("{train: {steps: 10}, model: null}")
    assert "step 5 of 10" in frame(run_dir)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such directory; give the one that run.dir"),
        (lambda path: path.mkdir(), "not a run directory .it has no config.yaml."),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("a: [")), "config.yaml: not YAML"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_bytes(b"\xff\xfe\x00")), "config.yaml: not YAML"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("text")), "not a run's configuration"),
    ],
)
def test_what_is_not_a_run_is_named(tmp_path, make, message):
    make(tmp_path / "thing")
    with pytest.raises(DepthpipeError, match=f"thing.*{message}") as caught:
        monitor(tmp_path / "thing", once=True)
    assert "\n" not in str(caught.value)


def test_the_command_prints_one_frame(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(["monitor", str(make_run(tmp_path / "run", 150)), "--once"])
    assert args.run(args) == 0
    assert "step 150 of 200" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args(["monitor", "--help"])
    assert "example:" in capsys.readouterr().out


def test_it_starts_without_torch_and_deepspeed():
    check = "import sys, pipeline.monitor; sys.exit(bool({'torch', 'deepspeed', 'tensorboard'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def plot(series: list[Series], width: int = 40, height: int = 12) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO())
    console.print(Curve(series, lambda value: f"{value:.1f}"), height=height)
    return console.file.getvalue().splitlines()


def test_a_falling_line_goes_from_the_top_left_to_the_bottom_right():
    lines = plot([Series(range(1, 101), [100.0 - i for i in range(100)], "cyan")])
    ink = [[column for column, character in enumerate(line[7:]) if character != " "] for line in lines[:10]]
    assert ink[0][0] == 0 and ink[9][-1] == 32
    assert all(row[0] >= above[0] for above, row in itertools.pairwise(ink))
    assert lines[0].startswith("100.0 ┤") and lines[9].startswith("  1.0 ┤")
    assert lines[10] == "      └" + "─" * 33
    assert lines[11].split() == ["step", "1", "100"]


def test_what_is_not_a_number_is_a_gap_in_the_steps_and_no_part_of_the_axis():
    lines = plot([Series([1, 2, 3, 4], [1.0, math.nan, math.inf, 2.0], "cyan")])
    assert lines[0].startswith("2.0 ┤") and lines[9].startswith("1.0 ┤")
    assert "no steps yet" in plot([Series([1, 2], [math.nan] * 2, "cyan")])[0]


def test_a_constant_and_a_single_point_are_drawn():
    for values in ([2.0], [2.0] * 50):
        lines = plot([Series(range(len(values)), values, "cyan")])
        assert any(0x2800 < ord(character) <= 0x28FF for line in lines for character in line)


def test_the_first_steps_leave_room_for_the_rest():
    losses = [2.5 + 0.5 * math.exp(-step / 500) + (7 if step < 20 else 0) for step in range(1000)]
    top = float(plot([Series(range(1000), losses, "cyan")])[0].split()[0])
    assert 2.8 < top < 3.2


def test_an_area_starts_at_zero_and_is_full_to_its_value():
    lines = plot([Series(range(1, 101), [50.0] * 50 + [100.0] * 50, "green", "area")])
    assert lines[9].startswith("  0.0 ┤")
    full = [line[7:].count("█") for line in lines[:10]]
    assert full[5:] == [33] * 5
    assert set(full[:5]) <= {16, 17}  # the middle column holds the mean of both


def test_a_validation_stands_at_its_place():
    lines = plot([Series([1, 100], [0.0, 1.0], "cyan"), Series([100], [1.0], "yellow", "marks")])
    assert lines[0].endswith("•")
    assert sum(line.count("•") for line in lines) == 1


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0], 8) == "▄▄"
    assert sparkline([], 8) == sparkline([math.nan], 8) == ""
    assert len(sparkline(range(1000), 10)) == 10


def write_steps(run_dir: Path, steps: range, loss: float = 2.0) -> None:
    with MetricsWriter(run_dir, tensorboard=False, start_step=steps.start - 1) as writer:
        for step in steps:
            writer.write(
                replace(
                    METRICS, step=step, loss=loss, time=float(step), validation_loss=step if step % 1000 == 0 else None
                )
            )


def test_the_history_reads_only_what_is_new(tmp_path):
    write_steps(tmp_path, range(1, 11))
    history = RunHistory(tmp_path)
    history.refresh()
    assert history.curve("step") == (list(range(1, 11)), list(range(1, 11)))
    write_steps(tmp_path, range(11, 15))
    (tmp_path / "metrics.jsonl").write_bytes(b"x" + (tmp_path / "metrics.jsonl").read_bytes()[1:])  # line 1 is damaged
    history.refresh()
    assert history.curve("step")[0] == list(range(1, 15))


@pytest.mark.parametrize("end", [13, 31])  # the file is shorter, or already longer, than it was before the cut
def test_the_history_follows_a_resume(tmp_path, end):
    write_steps(tmp_path, range(1, 21), loss=2.0)
    history = RunHistory(tmp_path)
    history.refresh()
    write_steps(tmp_path, range(11, end), loss=3.0)
    history.refresh()
    assert history.curve("loss") == (list(range(1, end)), [2.0] * 10 + [3.0] * (end - 11))


def test_a_long_history_is_thinned_evenly_and_keeps_all_validations(tmp_path):
    write_steps(tmp_path, range(1, 10_001))
    history = RunHistory(tmp_path)
    history.refresh()
    steps = [point.step for point in history.points]
    assert len(steps) <= 4096
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1
    assert [step for step, _ in history.validation] == list(range(1000, 10_001, 1000))
    assert history.last.step == 10_000 and len(history.recent) == 64


def test_a_huge_file_is_sampled_evenly_and_keeps_all_validations(tmp_path):
    write_steps(tmp_path, range(1, 50_001))
    assert (tmp_path / "metrics.jsonl").stat().st_size > 3 * (4 << 20)
    history = RunHistory(tmp_path)
    history.refresh()
    steps = [point.step for point in history.points]
    assert steps[0] == 1 and len(steps) <= 4096
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert min(gaps) > 0 and max(gaps) <= 2 * 50_000 / 2048
    assert [step for step, _ in history.validation] == list(range(1000, 50_001, 1000))
    assert [metrics.step for metrics in history.recent] == list(range(49_937, 50_001))
    write_steps(tmp_path, range(50_001, 50_011))
    history.refresh()
    assert history.last.step == 50_010


def test_the_pace_counts_validations_but_not_the_time_between_two_runs(tmp_path):
    history = RunHistory(tmp_path)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 41):
            validation = 2.0 if step > 20 else 0.0
            stop = 9000.0 if step > 30 else 0.0
            writer.write(replace(METRICS, step=step, time=step + validation + stop))
    assert math.isnan(history.seconds_per_step())
    history.refresh()
    assert history.seconds_per_step() == pytest.approx((19 + 3 + 9 + 9) / 38, rel=0.01)


TRAIN = """
import sys, time
from dataclasses import replace
from pipeline.metrics import MetricsWriter, StepMetrics
with MetricsWriter(sys.argv[1], tensorboard=False) as writer:
    for step in range(1, 201):
        time.sleep(0.01)
        writer.write(replace(StepMetrics.from_json(sys.argv[2]), step=step, time=time.time()))
"""
MONITOR = "import sys; from pipeline.monitor import monitor; sys.exit(monitor(sys.argv[1], refresh_s=0.1))"


def test_the_live_view_follows_a_training_process_until_it_is_interrupted(tmp_path):
    run_dir = make_run(tmp_path / "run", 0)
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    view = subprocess.Popen(
        [sys.executable, "-c", MONITOR, str(run_dir)], stdout=secondary, env=environment | {"TERM": "xterm"}
    )
    shown = ""

    def watch_until(text: str) -> None:
        nonlocal shown
        deadline = time.monotonic() + 30
        while text not in shown and time.monotonic() < deadline:
            shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(primary, 1 << 16).decode(errors="replace"))

    watch_until("step 0 of 200")
    train = subprocess.Popen([sys.executable, "-c", TRAIN, str(run_dir), METRICS.to_json()])
    watch_until("finished")
    view.send_signal(signal.SIGINT)
    assert train.wait() == 0
    assert view.wait(timeout=10) == 0
    os.close(secondary)
    os.close(primary)
    seen = {int(step) for step in re.findall(r"step (\d+) of 200", shown)}
    assert {0, 200} <= seen and len(seen) > 4
    assert len(read_metrics(run_dir)[0]) == 200
