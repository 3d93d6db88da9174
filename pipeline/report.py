"""`depthpipe report RUN_DIR`: the run's plots and configuration as one HTML page that needs nothing else.

The page can be mailed, archived, opened without a network. The charts are SVG; a short script adds the readout.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from pipeline.chart import Chart, Line
from pipeline.formatting import format_bytes, format_count, format_duration, format_percent, format_seconds
from pipeline.history import RunHistory
from pipeline.monitor import Progress, describe, read_config


def add_commands(subparsers: Any) -> None:
    """Registers `report` on the subparsers of the command line."""
    parser = subparsers.add_parser(
        "report",
        help="write a run's plots and configuration as one HTML page",
        description="One self-contained HTML page: loss, tokens per second, MFU, where a step's time goes, "
        "gradient norm, learning rate, memory, configuration. It works for a running run too.",
        epilog="example:  depthpipe report runs/quickstart --out quickstart.html",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory that run.dir in the configuration names")
    parser.add_argument("--out", metavar="FILE", help="where to write the page (default RUN_DIR/report.html)")
    parser.set_defaults(run=lambda args: report(args.run_dir, args.out))


def report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> int:
    """Writes the page and prints its path. Returns the exit code 0. Raises DepthpipeError if `run_dir` is no run."""
    path = Path(out) if out is not None else Path(run_dir) / "report.html"
    html = render_report(run_dir)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)
    print(path)
    return 0


def render_report(run_dir: str | os.PathLike[str]) -> str:
    """The page. Raises DepthpipeError if `run_dir` is not the directory of a run."""
    config = read_config(run_dir)
    history = RunHistory(run_dir)
    history.refresh()
    config_path = Path(run_dir) / "config.yaml"
    progress = Progress.of(config, history, started=config_path.stat().st_mtime, now=time.time())
    charts = _charts(history)
    data = json.dumps([chart.data() for _, _, chart, _ in charts]).replace("</", "<\\/")
    figures = "\n".join(_figure(*chart) for chart in charts)
    tiles = "\n".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in _summary(progress, history))
    name = escape(str(run_dir))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} - depthpipe</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{name} <span class="{progress.state}">{progress.state}</span></h1>
<p>{"<br>".join(escape(line) for line in describe(config))}</p>
</header>
<section class="tiles">
{tiles}
</section>
<main>
{figures}
</main>
<details open><summary>config.yaml</summary><pre>{escape(config_path.read_text())}</pre></details>
<footer>written by depthpipe, {time.strftime("%Y-%m-%d %H:%M:%S %Z")}</footer>
<script type="application/json" id="data">{data}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _summary(progress: Progress, history: RunHistory) -> list[tuple[str, str]]:
    tiles = [(f"step of {progress.total_steps:,}", f"{progress.step:,}")]
    last = history.last
    if last is None:
        return tiles
    tiles.append(("loss", f"{last.loss:.4f}"))
    if history.validation:
        step, loss = history.validation[-1]
        tiles.append((f"validation loss, step {step:,}", f"{loss:.4f}"))
    rates = [point.tokens_per_second for point in history.points]
    mfus = [point.mfu for point in history.points if point.mfu is not None]
    return [
        *tiles,
        ("tokens per second, median", format_count(statistics.median(rates))),
        ("MFU, median", format_percent(statistics.median(mfus) if mfus else None)),
        ("tokens", format_count(last.tokens)),
        ("time", format_duration(progress.elapsed_s)),
        ("memory, at most", format_bytes(max(point.memory_bytes for point in history.points_to_last()))),
    ]


def _charts(history: RunHistory) -> list[tuple[str, str, Chart, bool]]:
    """Title, unit, chart, and whether it takes the whole width."""

    def single(name: str, format_value: Callable[[float], str], color: str = "a", **options: Any) -> Chart:
        return Chart([Line("", *history.curve(name), color)], format_value, **({"from_zero": True} | options))

    steps, losses = history.curve("loss")
    validation = Line("validation", *_columns(history.validation), "b", "marks")
    loss = Chart([Line("training", steps, losses, "a"), validation], _number, width=1100, height=290)
    charts = [("loss", "nats per token", loss, True)]
    if len(steps) >= 100:  # the first steps of a long run make the rest of its curve flat
        half = len(steps) // 2
        late = [pair for pair in history.validation if pair[0] >= steps[half]]
        late_loss = [
            Line("training", steps[half:], losses[half:], "a"),
            Line("validation", *_columns(late), "b", "marks"),
        ]
        charts.append(("loss, second half", "nats per token", Chart(late_loss, _number), False))
    return [
        *charts,
        ("tokens per second", "all devices", single("tokens_per_second", format_count), False),
        ("MFU", "model FLOP/s over peak", single("mfu", format_percent), False),
        ("where a step's time goes", "mean over stages", _step_time(history), False),
        ("gradient norm", "before clipping", single("grad_norm", _number, "c", from_zero=False), False),
        ("learning rate", "", single("lr", _number, "c"), False),
        ("data wait", "share of the step", single("data_wait_fraction", format_percent, "b"), False),
        ("memory", "fullest device", single("memory_bytes", format_bytes, unit=_byte_unit(history)), False),
    ]


def _step_time(history: RunHistory) -> Chart:
    points = history.points_to_last()
    steps = [point.step for point in points]
    waiting = [point.bubble_fraction * point.step_time_s for point in points]
    data = [point.data_wait_s for point in points]
    computing = [
        max(0.0, point.step_time_s - bubble - wait) for point, bubble, wait in zip(points, waiting, data, strict=True)
    ]
    lines = [
        Line("computing", steps, computing, "a", "stack"),
        Line("waiting for stages", steps, waiting, "d", "stack"),
        Line("waiting for data", steps, data, "b", "stack"),
    ]
    return Chart(lines, format_seconds, from_zero=True)


def _columns(pairs: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [value for _, value in pairs]


def _byte_unit(history: RunHistory) -> float:
    return 1024.0**3 if history.last is not None and history.last.memory_bytes >= 2 * 1024**3 else 1024.0**2


def _number(value: float) -> str:
    return f"{value:.4g}"


def _figure(title: str, unit: str, chart: Chart, wide: bool) -> str:
    keys = [(line["name"], line["color"]) for line in chart.data()["lines"]]
    legend = "".join(
        f'<span class="{"key" if name else "value"} {color}">{escape(name)}<i></i></span>' for name, color in keys
    )
    return (
        f'<figure class="{"wide" if wide else ""}"><figcaption><b>{escape(title)}</b> <small>{escape(unit)}</small>'
        f'<span class="step"></span>{legend}</figcaption>{chart.svg()}</figure>'
    )


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1d2129; --soft: #69707d; --grid: #e6e8ec;
  --a: #2563c9; --b: #d9730d; --c: #8a4fc4; --d: #a9b1bd; --running: #1a8f4a; --stalled: #c92f2f; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --text: #e4e7ec; --soft: #949ba8;
  --grid: #2c3038; --a: #6ea3f2; --b: #f0a04b; --c: #b98be6; --d: #5d6573; --running: #4cc27f; --stalled: #f07070; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 24px; background: var(--page); color: var(--text);
  font: 14px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h1 span { font-size: 13px; font-weight: 600; color: var(--soft); margin-left: 8px; }
h1 .running { color: var(--running); } h1 .stalled { color: var(--stalled); } h1 .finished { color: var(--a); }
header p { margin: 4px 0 16px; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 12px; }
.tiles div, figure, details { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
.tiles div { padding: 10px 14px; color: var(--soft); font-size: 12px; }
.tiles b { display: block; font-size: 19px; color: var(--text); font-variant-numeric: tabular-nums; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 12px; }
figure { margin: 0; padding: 12px 14px 6px; } .wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; min-height: 22px; }
figcaption small, .step, .empty, footer { color: var(--soft); }
.step { margin-left: auto; } .key, .value { font-size: 12px; color: var(--soft); font-variant-numeric: tabular-nums; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px;
  background: var(--color); }
figcaption i { font-style: normal; font-weight: 600; color: var(--text); margin-left: 6px; }
.a { --color: var(--a); } .b { --color: var(--b); } .c { --color: var(--c); } .d { --color: var(--d); }
svg { display: block; width: 100%; height: auto; touch-action: none; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.y { text-anchor: end; } .x { text-anchor: middle; } .grid { stroke: var(--grid); }
polyline { fill: none; stroke: var(--color); stroke-width: 1.6; stroke-linejoin: round; }
.band { fill: var(--color); opacity: 0.18; } .stack { fill: var(--color); }
circle { fill: var(--color); stroke: var(--card); } .cursor { stroke: var(--soft); stroke-dasharray: 3 3; }
details { margin-top: 12px; padding: 12px 16px; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 12px/1.5 ui-monospace, monospace; } footer { margin-top: 12px; font-size: 12px; }
"""

# The step under the mouse, in all charts at once: the values of the points that are nearest to it.
_SCRIPT = """
const charts = JSON.parse(document.getElementById("data").textContent);
const figures = [...document.querySelectorAll("figure")];
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] > step) high = middle; else low = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}
function show(step) {
  figures.forEach((figure, index) => {
    const chart = charts[index], cursor = figure.querySelector(".cursor");
    if (!cursor) return;
    const inside = step !== null && step >= chart.first && step <= chart.last;
    cursor.setAttribute("visibility", inside ? "visible" : "hidden");
    const x = chart.left + (step - chart.first) / Math.max(1, chart.last - chart.first) * (chart.right - chart.left);
    if (inside) { cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); }
    figure.querySelector(".step").textContent = inside ? "step " + Math.round(step).toLocaleString("en") : "";
    figure.querySelectorAll("figcaption i").forEach((value, line) => {
      const { steps, values } = chart.lines[line];
      value.textContent = inside ? values[nearest(steps, step)] : "";
    });
  });
}
figures.forEach((figure, index) => {
  const chart = charts[index], svg = figure.querySelector("svg");
  if (!svg) return;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.width;
    const share = Math.min(1, Math.max(0, (x - chart.left) / (chart.right - chart.left)));
    show(chart.first + share * (chart.last - chart.first));
  });
  svg.addEventListener("pointerleave", () => show(null));
});
"""
