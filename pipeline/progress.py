"""The one line that `train` keeps on its console: where the run stands, how fast it goes, when it ends.

On a terminal the line is redrawn in place. Elsewhere (a file, CI, a pipe) plain lines of ASCII come every few seconds.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from pipeline.formatting import format_count, format_duration, format_percent
from pipeline.metrics import StepMetrics

_PLAIN_SECONDS = 10.0
_ETA_STEPS = 50  # the ETA follows the pace of so many updates: neither the first steps nor one hiccup rules it


class TrainProgress:
    """The live line of rank 0, as a context manager. Nothing that happens to the console stops the training.

    `tokens_per_step` is global_batch_size x sequence_length: it says how many tokens the whole run will see.
    """

    def __init__(self, total_steps: int, start_step: int, tokens_per_step: int, console: Console | None = None) -> None:
        self._total_steps = total_steps
        self._total_tokens = total_steps * tokens_per_step
        self._step = start_step
        self._skipped = 0
        self._metrics: StepMetrics | None = None
        self._pace: deque[tuple[float, int]] = deque([(time.monotonic(), start_step)], maxlen=_ETA_STEPS)
        self._last_plain = -math.inf
        self._console = console or Console(file=cast(TextIO, SteadyFile(sys.stdout)), highlight=False)
        self._live: Live | None = None
        # Not console.is_terminal: FORCE_COLOR, which many CI systems set, makes that true for a file.
        if self._console.file.isatty() and not self._console.is_dumb_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=4)

    def __enter__(self) -> TrainProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last state of the line stays on the screen."""
        if self._live is not None:
            self._live.stop()
        elif self._metrics is not None and self._last_plain < self._pace[-1][0]:
            self._print_plain()

    def update(self, metrics: StepMetrics) -> None:
        """A step was logged. Its validation loss, and the first skipped sequences, get lines of their own that stay."""
        self._metrics = metrics
        self._step = metrics.step
        now = time.monotonic()
        self._pace.append((now, metrics.step))
        if metrics.skipped_sequences:
            if not self._skipped:
                self.message(f"step {metrics.step:,}: damaged sequences are skipped; logs/ names their shards")
            self._skipped += metrics.skipped_sequences
        if metrics.validation_loss is not None:
            self.message(f"step {metrics.step:,}: validation loss {metrics.validation_loss:.4f}")
        if self._live is None and now - self._last_plain >= _PLAIN_SECONDS:
            self._print_plain()

    def message(self, text: str) -> None:
        """A line that stays, above the live line."""
        self._console.print(Text(text), soft_wrap=True)

    def _eta_seconds(self) -> float:
        (since, first), (until, last) = self._pace[0], self._pace[-1]
        if last == first:
            return math.nan
        left = (self._total_steps - last) * (until - since) / (last - first)
        return max(0.0, left - (time.monotonic() - until))

    def _print_plain(self) -> None:
        self._last_plain = time.monotonic()
        words = [f"{name} {value}".strip() for name, value, _ in self._parts()]
        self._console.print(Text(" | ".join(words)), soft_wrap=True)

    def _parts(self) -> list[tuple[str, str, int]]:
        """Name, value and rank of each part of the line. Where room is short the highest rank goes first."""
        parts = [("step", f"{self._step:,}/{self._total_steps:,}", 0)]
        metrics = self._metrics
        if metrics is None:
            return [*parts, ("", "starting", 0)]
        parts += [
            ("loss", f"{metrics.loss:.4f}", 0),
            ("", f"{format_count(metrics.tokens_per_second)} tokens/s", 1),
            ("MFU", format_percent(metrics.mfu), 3),
            ("data wait", format_percent(metrics.data_wait_fraction), 4),
            ("tokens", f"{format_count(metrics.tokens)}/{format_count(self._total_tokens)}", 5),
            ("ETA", format_duration(self._eta_seconds()), 2),
        ]
        if self._skipped:
            parts.append(("skipped sequences", format_count(self._skipped), 6))
        return parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The live line: as many parts as fit, and a bar in what is left."""
        parts = self._parts()
        while len(parts) > 1 and _width(parts) > options.max_width:
            parts.remove(max(parts, key=lambda part: part[2]))
        room = options.max_width - _width(parts) - 2
        line = Text(no_wrap=True, overflow="ellipsis", end="")
        for index, (name, value, _) in enumerate(parts):
            line.append("  " if index else "").append(f"{name} " if name else "", "dim").append(value, "bold")
            if index == 0 and room >= 8:
                bar = ProgressBar(self._total_steps, self._step, width=min(room, 40))
                line.append("  ").append_text(_as_text(console, bar, options))
        yield line


def _width(parts: list[tuple[str, str, int]]) -> int:
    return sum(len(f"{name} {value}".strip()) for name, value, _ in parts) + 2 * (len(parts) - 1)


def _as_text(console: Console, bar: ProgressBar, options: ConsoleOptions) -> Text:
    segments = console.render(bar, options.update(width=bar.width or options.max_width))
    return Text.assemble(*((segment.text, segment.style or "") for segment in segments))


class SteadyFile:
    """A text stream that turns mute, instead of raising, when its other end is gone: a closed terminal or pipe
    must not end a training run."""

    def __init__(self, file: TextIO | None) -> None:
        # Python's sys.stdout is None where the process was started with it closed.
        self._file = file or _nowhere()

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except (OSError, ValueError):
            self._mute()
            return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except (OSError, ValueError):
            self._mute()

    def _mute(self) -> None:
        # What is still in the stream's buffer would raise again at exit; so its descriptor leads nowhere from now on.
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            self._file = _nowhere()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _nowhere() -> TextIO:
    return open(os.devnull, "w")
