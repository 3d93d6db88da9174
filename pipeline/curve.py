"""Curves in a terminal: lines of braille dots, areas of block characters, between labelled axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

_BRAILLE = 0x2800
_DOT = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bit of the dot at [row][column] of a character
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Series:
    """One metric over a run: values at steps (in step order; NaN leaves a gap), and how to draw it.

    `line` suits what moves, `area` (from zero up) a rate, `marks` what is measured now and then.
    """

    steps: Sequence[int]
    values: Sequence[float]
    style: str
    kind: Literal["line", "area", "marks"] = "line"


class Curve:
    """Draws series over each other, the last on top, into whatever width and height it is given.

    The left axis shows the greatest, middle and least value, the lower one the first and last step. What happened
    before most of the run (a loss that starts at 10 and lives at 3) may leave through the top, so that the
    present has room.
    """

    def __init__(self, series: Sequence[Series], format_value: Callable[[float], str], height: int = 8) -> None:
        self._series = [one for one in series if any(map(math.isfinite, one.values))]
        self._format = format_value
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = max(1, (options.height or self._height) - 2)
        if not self._series:
            yield Segment("no steps yet".center(options.max_width), Style(dim=True))
            return
        first = min(one.steps[0] for one in self._series)
        last = max(one.steps[-1] for one in self._series)
        low, high = _value_range(self._series, first, last)
        if any(one.kind == "area" for one in self._series):
            low = min(low, 0.0)
        labels = {0: self._format(high), rows - 1: self._format(low)}
        if rows >= 5 and rows % 2:
            labels[rows // 2] = self._format((low + high) / 2)
        gutter = max(map(len, labels.values()))
        columns = max(1, options.max_width - gutter - 2)
        cells: dict[tuple[int, int], tuple[str, Style]] = {}
        for one in self._series:
            style = console.get_style(one.style) + Style(dim=one.kind == "area")
            means = partial(_column_means, one.steps, one.values, first, last)
            for place, character in _DRAW[one.kind](means, low, high, columns, rows).items():
                cells[place] = (character, style)
        axis = Style(dim=True)
        for row in range(rows):
            yield Segment(labels.get(row, "").rjust(gutter) + (" ┤" if row in labels else " │"), axis)
            blank = (" ", axis)
            yield from Segment.simplify(Segment(*cells.get((row, column), blank)) for column in range(columns))
            yield Segment.line()
        yield Segment(" " * gutter + " └" + "─" * columns, axis)
        yield Segment.line()
        left, right = f"step {first:,}", f"{last:,}" if last > first else ""
        yield Segment(" " * (gutter + 2) + left + right.rjust(columns - len(left)), axis)


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values, in equal groups, as block characters from ▁ (least) to █ (greatest)."""
    means = [
        mean
        for mean in _column_means(range(len(values)), values, 0, max(1, len(values) - 1), width)
        if mean is not None
    ]
    if not means:
        return ""
    low, high = min(means), max(means)
    return "".join(_BLOCKS[1 + round(7 * (mean - low) / (high - low)) if high > low else 4] for mean in means)


def _value_range(series: Sequence[Series], first: int, last: int) -> tuple[float, float]:
    values: list[float] = []
    for one in series:
        values += [mean for mean in _column_means(one.steps, one.values, first, last, 64) if mean is not None]
    values.sort()
    low, high = values[0], values[-1]
    # The few columns at the top that make the rest flat go; a curve that fills its range stays whole.
    usual = values[math.ceil(len(values) * 0.85) - 1]
    if len(values) >= 20 and high - low > 2 * (usual - low) > 0:
        high = low + 1.25 * (usual - low)
    if high == low:
        margin = abs(low) * 0.05 or 1.0
        low, high = low - margin, high + margin
    return low, high


def _column_means(
    steps: Sequence[int], values: Sequence[float], first: int, last: int, columns: int
) -> list[float | None]:
    """The mean of the values that fall in each of `columns` equal parts of first..last."""
    sums, counts = [0.0] * columns, [0] * columns
    scale = (columns - 1) / max(1, last - first)
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            column = round((step - first) * scale)
            sums[column] += value
            counts[column] += 1
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


_Cells = dict[tuple[int, int], str]
_Means = Callable[[int], list[float | None]]  # the series in so many columns


def _draw_line(means: _Means, low: float, high: float, columns: int, rows: int) -> _Cells:
    scale = (4 * rows - 1) / (high - low)
    points = [(x, round((high - mean) * scale)) for x, mean in enumerate(means(2 * columns)) if mean is not None]
    bits: dict[tuple[int, int], int] = {}
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points, strict=False):
        length = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(length + 1):
            x, y = round(x0 + (x1 - x0) * i / length), round(y0 + (y1 - y0) * i / length)
            if 0 <= y < 4 * rows:
                place = (y // 4, x // 2)
                bits[place] = bits.get(place, 0) | _DOT[y % 4][x % 2]
    return {place: chr(_BRAILLE + dots) for place, dots in bits.items()}


def _draw_area(means: _Means, low: float, high: float, columns: int, rows: int) -> _Cells:
    cells: _Cells = {}
    mean: float | None = None
    for column, value in enumerate(means(columns)):
        mean = mean if value is None else value  # fewer steps than columns: stairs
        eighths = 0 if mean is None else round(8 * rows * (min(mean, high) - low) / (high - low))
        for row in range(rows):
            level = min(8, max(0, eighths - 8 * (rows - 1 - row)))
            if level:
                cells[row, column] = _BLOCKS[level]
    return cells


def _draw_marks(means: _Means, low: float, high: float, columns: int, rows: int) -> _Cells:
    places = max(1, columns // 3)
    scale = (columns - 1) / max(1, places - 1)
    return {
        (round((high - mean) / (high - low) * (rows - 1)), round(place * scale)): "•"
        for place, mean in enumerate(means(places))
        if mean is not None and low <= mean <= high
    }


_DRAW = {"line": _draw_line, "area": _draw_area, "marks": _draw_marks}
