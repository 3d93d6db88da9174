"""Numbers as people read them, the same in the progress line, the monitor and the report."""

from __future__ import annotations

import math


def format_duration(seconds: float) -> str:
    """`9.4` -> `9s`, `723` -> `12m 03s`, `11100` -> `3h 05m`, `180000` -> `2d 02h`."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    if hours:
        return f"{hour}h {minute:02d}m"
    return f"{minute}m {second:02d}s" if minutes else f"{second}s"


def format_seconds(seconds: float) -> str:
    """A short time: `0.0123` -> `12 ms`, `1.324` -> `1.32 s`, `41.27` -> `41.3 s`."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def format_count(count: float) -> str:
    """Three digits and a unit for what is counted in millions: `950` -> `950`, `40.4e6` -> `40.4M`."""
    if not math.isfinite(count):
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
    return f"{count:,.0f}" if abs(count) >= 100 else f"{count:.3g}"


def format_bytes(size: float) -> str:
    """`851443712` -> `812 MiB`."""
    if not math.isfinite(size):
        return "-"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(size) >= 1024 and power < len(units) - 1:
        size /= 1024
        power += 1
    return f"{size:.0f} {units[power]}" if size >= 100 else f"{size:.3g} {units[power]}"


def format_percent(fraction: float | None) -> str:
    """`0.382` -> `38.2 %`; None (not known) -> `-`."""
    if fraction is None or not math.isfinite(fraction):
        return "-"
    return f"{fraction * 100:.1f} %"
