"""Line charts as SVG text, for pages that must stand alone: no library, and no script needed to see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 34, 10, 26
_BUCKETS = {"line": 400, "marks": 100, "stack": 400}  # more points than can be told apart help nobody


@dataclass(frozen=True)
class Line:
    """One series: values over steps, in step order; what is not finite is left out. `color` is a CSS class.

    `line`: the mean of what falls on about one pixel, over a band from its least to its greatest value.
    `marks`: a dot for each value, or for the mean of neighbours if there are many.
    `stack`: an area on top of the stacks before it, which have the same steps.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    color: str
    kind: Literal["line", "marks", "stack"] = "line"


@dataclass(frozen=True)
class _Bucket:
    step: int
    mean: float
    low: float
    high: float


class Chart:
    """Lines over one axis of steps. `svg` draws them; `data` is what a script needs to show values under a mouse.

    The value axis has round numbers of `unit` (1024 ** 2 for bytes that read as MiB).
    """

    def __init__(
        self,
        lines: Sequence[Line],
        format_value: Callable[[float], str],
        width: int = 640,
        height: int = 220,
        from_zero: bool = False,
        unit: float = 1.0,
    ) -> None:
        self._lines = [line for line in lines if any(map(math.isfinite, line.values))]
        self._format = format_value
        self._width, self._height = width, height
        self._buckets = [_buckets(line) for line in self._lines]
        self._drawn = _stacked(self._buckets) if any(line.kind == "stack" for line in lines) else self._buckets
        buckets = [bucket for line in self._drawn for bucket in line]
        self._first = min((bucket.step for bucket in buckets), default=0)
        self._last = max((bucket.step for bucket in buckets), default=0)
        low = 0.0 if from_zero else min((bucket.low for bucket in buckets), default=0.0)
        high = max((bucket.high for bucket in buckets), default=1.0)
        self._ticks = [tick * unit for tick in nice_ticks(low / unit, high / unit)]

    def svg(self) -> str:
        if not self._lines:
            return '<p class="empty">nothing logged</p>'
        parts = [f'<svg viewBox="0 0 {self._width} {self._height}" role="img">', *self._axes()]
        # Stacks from the highest to the lowest: each hides the lower part of the one before, and needs only its edge.
        order = sorted(range(len(self._lines)), key=lambda i: -i if self._lines[i].kind == "stack" else i)
        for index in order:
            parts += self._draw(self._lines[index], self._drawn[index])
        parts.append(f'<line class="cursor" y1="{_TOP}" y2="{self._height - _BOTTOM}" visibility="hidden"/></svg>')
        return "\n".join(parts)

    def data(self) -> dict[str, Any]:
        """The x axis in SVG units and steps, and per line its steps and values, written out."""
        lines = [
            {
                "name": line.name,
                "color": line.color,
                "steps": [bucket.step for bucket in buckets],
                "values": [self._format(bucket.mean) for bucket in buckets],
            }
            for line, buckets in zip(self._lines, self._buckets, strict=True)
        ]
        axis = {"left": _LEFT, "right": self._width - _RIGHT, "first": self._first, "last": self._last}
        return {"width": self._width, **axis, "lines": lines}

    def _x(self, step: float) -> float:
        return _LEFT + (step - self._first) / max(1, self._last - self._first) * (self._width - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        low, high = self._ticks[0], self._ticks[-1]
        return _TOP + (high - value) / (high - low) * (self._height - _TOP - _BOTTOM)

    def _points(self, points: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{self._x(step):.1f},{self._y(value):.1f}" for step, value in points)

    def _axes(self) -> list[str]:
        right, bottom = self._width - _RIGHT, self._height - _BOTTOM
        parts = []
        for tick in self._ticks:
            y = self._y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="y" x="{_LEFT - 8}" y="{y + 4:.1f}">{escape(self._format(tick))}</text>')
        steps = nice_ticks(self._first, self._last, about=self._width // 90)
        for step in steps if self._last > self._first else [self._first]:
            if self._first <= step <= self._last and step == round(step):
                parts.append(f'<text class="x" x="{self._x(step):.1f}" y="{bottom + 18}">{step:,.0f}</text>')
        return parts

    def _draw(self, line: Line, buckets: list[_Bucket]) -> list[str]:
        means = [(bucket.step, bucket.mean) for bucket in buckets]
        if line.kind == "marks" or len(buckets) == 1:
            return [
                f'<circle class="{line.color}" cx="{self._x(step):.1f}" cy="{self._y(value):.1f}" r="3"/>'
                for step, value in means
            ]
        if line.kind == "stack":
            floor = [(buckets[-1].step, self._ticks[0]), (buckets[0].step, self._ticks[0])]
            return [f'<polygon class="stack {line.color}" points="{self._points([*means, *floor])}"/>']
        upper = [(bucket.step, bucket.high) for bucket in buckets]
        lower = [(bucket.step, bucket.low) for bucket in reversed(buckets)]
        return [
            f'<polygon class="band {line.color}" points="{self._points([*upper, *lower])}"/>',
            f'<polyline class="{line.color}" points="{self._points(means)}"/>',
        ]


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers at even distances of 1, 2 or 5 times a power of ten, from at most `low` to at least `high`."""
    if high <= low:
        margin = abs(low) * 0.05 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    # A tick is a multiple of the distance, not a sum of distances, so that 0.3 does not read 0.30000000000000004.
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    digits = max(0, -math.floor(math.log10(distance)))
    return [round(index * distance, digits) for index in range(first, last + 1)]


def _buckets(line: Line) -> list[_Bucket]:
    """The finite values, in a limited number of groups of neighbouring steps."""
    known = [(step, value) for step, value in zip(line.steps, line.values, strict=True) if math.isfinite(value)]
    size = max(1, math.ceil(len(known) / _BUCKETS[line.kind]))
    buckets = []
    for start in range(0, len(known), size):
        group = known[start : start + size]
        values = [value for _, value in group]
        # The last bucket stands at the last step, so that a finished run is seen to reach its end.
        step = group[-1][0] if start + size >= len(known) else group[0][0]
        buckets.append(_Bucket(step, sum(values) / len(values), min(values), max(values)))
    return buckets


def _stacked(lines: list[list[_Bucket]]) -> list[list[_Bucket]]:
    """Each line on top of the ones before it."""
    drawn: list[list[_Bucket]] = []
    for buckets in lines:
        below = [bucket.mean for bucket in drawn[-1]] if drawn else [0.0] * len(buckets)
        tops = [base + bucket.mean for base, bucket in zip(below, buckets, strict=True)]
        drawn.append([_Bucket(bucket.step, top, top, top) for bucket, top in zip(buckets, tops, strict=True)])
    return drawn
