"""A run's metrics as the monitor and the report hold them: read a piece at a time, kept in bounded memory.

A file of a million lines is not read whole: of all but its end, a few thousand lines at even distances are enough
for a curve. Validation losses are rare and matter one by one, so all of them are found, by a plain byte search.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import statistics
from collections import deque
from pathlib import Path

from data_prep.errors import DepthpipeError
from pipeline.metrics import METRICS_FILE, StepMetrics, parse_line, read_metrics

_READ_WHOLE_BYTES = 4 << 20  # about 12,000 lines, read and parsed in 0.1 s
_SAMPLED_LINES = 2048
_POINTS = 2048  # kept for curves; above twice as many every second one goes
_RECENT = 64  # logged steps that "now" looks at


class RunHistory:
    """`points`: the run from its first step to now, thinned evenly. `recent`: the last logged steps, all of them.
    `validation`: (step, loss) of every validation. All are in step order."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._run_dir = Path(run_dir)
        self._path = self._run_dir / METRICS_FILE
        self._forget()

    def _forget(self) -> None:
        self.points: list[StepMetrics] = []
        self.recent: deque[StepMetrics] = deque(maxlen=_RECENT)
        self.validation: list[tuple[int, float]] = []
        self._offset = 0
        self._inode = 0
        self._stride = 1  # one of this many logged steps goes to points
        self._until_next = 0

    @property
    def last(self) -> StepMetrics | None:
        return self.recent[-1] if self.recent else None

    def points_to_last(self) -> list[StepMetrics]:
        """`points`, and the last step if it is not one of them."""
        if self.last is None or self.last.step == self.points[-1].step:
            return self.points
        return [*self.points, self.last]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric over the run, up to the last step; where it is None there is no point."""
        known = [(point.step, value) for point in self.points_to_last() if (value := getattr(point, name)) is not None]
        return [step for step, _ in known], [value for _, value in known]

    def recent_mean(self, name: str) -> float:
        """Mean over the recent steps, NaN where there is none."""
        values = [value for metrics in self.recent if (value := getattr(metrics, name)) is not None]
        return statistics.fmean(values) if values else math.nan

    def seconds_per_step(self) -> float:
        """Wall time per step of late, validation and checkpoints included, stops between runs not. NaN if unknown."""
        recent = list(self.recent)
        pairs = [(b.time - a.time, b.step - a.step) for a, b in itertools.pairwise(recent)]
        if not pairs:
            return self.last.step_time_s if self.last else math.nan
        usual = statistics.median(seconds / steps for seconds, steps in pairs)
        kept = [(s, n) for s, n in pairs if s / n <= 20 * usual] or pairs
        return sum(s for s, _ in kept) / sum(n for _, n in kept)

    def refresh(self) -> None:
        """Reads what was written since the last call. A file that was cut by a resume is read anew."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._forget()
            self._inode = status.st_ino
            if status.st_size > _READ_WHOLE_BYTES:
                self._sample(status.st_size - _READ_WHOLE_BYTES)
        try:
            metrics, self._offset = read_metrics(self._run_dir, self._offset)
        except DepthpipeError:
            if self._path.stat().st_ino != self._inode:
                return  # cut by a resume at this very moment: the next call starts anew
            raise
        for line in metrics:
            self._add(line)

    def _add(self, metrics: StepMetrics) -> None:
        self.recent.append(metrics)
        if metrics.validation_loss is not None:
            self.validation.append((metrics.step, metrics.validation_loss))
        if self._until_next == 0:
            self.points.append(metrics)
            if len(self.points) > 2 * _POINTS:
                self.points = self.points[::2]
                self._stride *= 2
            self._until_next = self._stride
        self._until_next -= 1

    def _sample(self, end: int) -> None:
        """Takes lines at even distances, and all validations, from the first `end` bytes."""
        with open(self._path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = data.find(b"\n", end) + 1 or len(data)
            start = 0
            sampled = 0
            while start < end:
                stop = data.find(b"\n", start) + 1
                self.points.append(parse_line(self._path, data[start:stop], start))
                sampled += stop - start
                start = data.find(b"\n", max(stop, start + end // _SAMPLED_LINES) - 1) + 1 or end
            found = data.find(b'"validation_loss"', 0, end)
            while found != -1:
                start, stop = data.rfind(b"\n", 0, found) + 1, data.find(b"\n", found) + 1
                line = parse_line(self._path, data[start:stop], start)
                if line.validation_loss is not None:
                    self.validation.append((line.step, line.validation_loss))
                found = data.find(b'"validation_loss"', stop, end)
        self._offset = end
        self._stride = max(1, round(end / sampled))
