"""The line of `train` on a terminal (a real pseudo-terminal), in a log file, and where nobody listens any more."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

TRAIN = """
import sys, time
from pipeline.metrics import StepMetrics
from pipeline.progress import TrainProgress
steps, seconds = int(sys.argv[1]), float(sys.argv[2])
with TrainProgress(total_steps=steps, start_step=0, tokens_per_step=16384) as progress:
    for step in range(1, steps + 1):
        time.sleep(seconds)
        progress.update(StepMetrics(
            step=step, tokens=16384 * step, loss=9 - step / 100, grad_norm=1.0, lr=1e-3, step_time_s=1.25,
            tokens_per_second=13107.2, tokens_per_second_per_device=6553.6, mfu=0.382, data_wait_s=0.01,
            bubble_fraction=0.0, memory_bytes=1 << 30, time=time.time(), validation_loss=2.5 if step == 10 else None,
            skipped_sequences=3 if step in (12, 14) else 0))
        if step == 15:
            progress.message("checkpoint at step 15")
print("trained", file=sys.stderr)
"""


def command(steps: int, seconds: float) -> list[str]:
    return [sys.executable, "-c", TRAIN, str(steps), str(seconds)]


def environment(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | changes


def run_on_terminal(steps: int, seconds: float, widths: list[int], **changes: str) -> str:
    """What the training writes to a pseudo-terminal that takes one width after the other."""
    primary, secondary = pty.openpty()

    def resize(columns: int) -> None:
        fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    resize(widths[0])
    process = subprocess.Popen(
        command(steps, seconds), stdout=secondary, stderr=subprocess.PIPE, env=environment(TERM="xterm", **changes)
    )
    written = b""
    resizes = list(widths[1:])
    os.set_blocking(primary, False)
    while process.poll() is None:
        if resizes and re.search(rb"step [1-9]", written):  # the width before has been drawn in
            resize(resizes.pop(0))
        try:
            written += os.read(primary, 1 << 16)
        except BlockingIOError:
            time.sleep(0.02)
    with contextlib.suppress(BlockingIOError):
        written += os.read(primary, 1 << 16)
    os.close(primary)
    os.close(secondary)
    assert process.stderr is not None
    assert process.returncode == 0, process.stderr.read().decode()
    return written.decode()


def lines_of(written: str) -> list[str]:
    """Every state of every line, without colours and cursor movements."""
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)) if line.strip()]


def test_a_terminal_shows_one_line_with_all_of_it():
    written = run_on_terminal(30, 0.02, [120])
    last = lines_of(written)[-1]
    for part in ("step 30/30", "loss 8.7000", "13,107 tokens/s", "MFU 38.2 %", "data wait 0.8 %", "ETA 0s", "━"):
        assert part in last
    assert "step 10: validation loss 2.5000" in lines_of(written)
    assert "checkpoint at step 15" in lines_of(written)
    assert "\x1b[2K" in written  # drawn over itself
    assert "\x1b[?25h" in written  # the cursor is back


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [(80, "data wait", "tokens 4"), (60, "ETA", "data wait"), (40, "tokens/s", "ETA"), (24, "loss 8", "tokens/s")],
)
def test_a_narrow_terminal_keeps_what_matters_most(width, there, gone):
    last = lines_of(run_on_terminal(25, 0.01, [width]))[-1]
    assert len(last) <= width
    assert there in last and gone not in last


def test_it_follows_the_terminal_as_it_is_resized():
    lines = lines_of(run_on_terminal(100, 0.02, [120, 40]))
    assert max(map(len, lines)) > 80
    assert len(lines[-1]) <= 40 and "step 100/100" in lines[-1]


@pytest.mark.parametrize("changes", [{}, {"FORCE_COLOR": "1"}])
def test_a_log_file_gets_plain_lines(changes):
    done = subprocess.run(
        command(30, 0.01),
        capture_output=True,
        text=True,
        env=environment(PYTHONIOENCODING="ascii", **changes),
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith(
        "step 1/30 | loss 8.9900 | 13,107 tokens/s | MFU 38.2 % | data wait 0.8 % | tokens 16,384/491,520 | ETA "
    )
    assert lines[1:4] == [
        "step 10: validation loss 2.5000",
        "step 12: damaged sequences are skipped; logs/ names their shards",
        "checkpoint at step 15",
    ]
    assert lines[-1].startswith("step 30/30 | loss 8.7000 | ") and lines[-1].endswith(" | skipped sequences 6")
    assert len(lines) == 5
    assert done.stdout.replace("\n", "").isprintable() and done.stdout.isascii()


def test_a_dumb_terminal_gets_plain_lines_too():
    primary, secondary = pty.openpty()
    subprocess.run(command(5, 0.01), stdout=secondary, env=environment(TERM="dumb"), check=True)
    os.close(secondary)
    assert "\x1b" not in os.read(primary, 1 << 16).decode()
    os.close(primary)


def test_a_reader_that_leaves_does_not_stop_the_training():
    process = subprocess.Popen(command(60, 0.01), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read().decode() == "trained\n"
    assert process.wait() == 0


def test_a_terminal_that_hangs_up_does_not_stop_the_training():
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        command(100, 0.01),
        stdout=secondary,
        stderr=subprocess.PIPE,
        env=environment(TERM="xterm"),
        start_new_session=True,
    )
    os.close(secondary)
    os.read(primary, 1)
    os.close(primary)
    assert process.stderr is not None
    assert process.stderr.read().decode() == "trained\n"
    assert process.wait() == 0


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full"])
def test_a_stdout_that_takes_nothing_does_not_stop_the_training(redirection):
    script = f'exec "$@" {redirection}'
    done = subprocess.run(["bash", "-c", script, "bash", *command(20, 0.01)], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "trained\n")
