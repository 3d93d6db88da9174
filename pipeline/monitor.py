"""`depthpipe monitor RUN_DIR`: a live view of a running or finished run, drawn from its files alone.

It runs beside the training, on any machine that sees the directory, and imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data_prep.errors import DepthpipeError
from pipeline.curve import Curve, Series, sparkline
from pipeline.formatting import format_bytes, format_count, format_duration, format_percent, format_seconds
from pipeline.history import RunHistory

_STATE_STYLE = {"starting": "yellow", "running": "green", "stalled": "red", "finished": "blue"}
_ONCE_HEIGHT = 32
_NUMBERS_HEIGHT = 19


def add_commands(subparsers: Any) -> None:
    """Registers `monitor` on the subparsers of the command line."""
    parser = subparsers.add_parser(
        "monitor",
        help="watch a running or finished run in the terminal",
        description="A live view of a run from its files: loss, tokens per second, MFU, data wait, stages, ETA. "
        "Ctrl-C leaves the view; the run goes on. Without a terminal, one frame is printed.",
        epilog="example:  depthpipe monitor runs/quickstart",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory that run.dir in the configuration names")
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument(
        "--refresh", type=float, default=1.0, metavar="SECONDS", help="time between two looks at the files (default 1)"
    )
    parser.set_defaults(run=lambda args: monitor(args.run_dir, args.once, args.refresh))


def monitor(
    run_dir: str | os.PathLike[str], once: bool = False, refresh_s: float = 1.0, console: Console | None = None
) -> int:
    """Shows the run until Ctrl-C, or prints one frame. Returns the exit code 0.

    Raises DepthpipeError if `run_dir` is not the directory of a run, or a line of its metrics is damaged.
    """
    console = console or Console()
    config = read_config(run_dir)
    started = (Path(run_dir) / "config.yaml").stat().st_mtime
    history = RunHistory(run_dir)
    history.refresh()
    frame = Frame(run_dir, config, history, started)
    if once or not console.is_terminal:
        console.print(frame, height=min(console.height - 1, _ONCE_HEIGHT))
        return 0
    try:
        with Live(frame, console=console, screen=True, auto_refresh=False) as live:
            while True:
                _sleep_unless_resized(console, max(0.1, refresh_s))
                history.refresh()
                frame = Frame(run_dir, config, history, started)
                live.update(frame, refresh=True)
    except KeyboardInterrupt:  # the last picture stays on the ordinary screen
        console.print(frame, height=min(console.height - 1, _ONCE_HEIGHT))
        return 0


def read_config(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The run's resolved configuration. Raises DepthpipeError if the directory is not that of a run."""
    path = Path(run_dir) / "config.yaml"
    if not Path(run_dir).is_dir():
        raise DepthpipeError(f"{run_dir}: no such directory; give the one that run.dir in the configuration names")
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise DepthpipeError(
            f"{run_dir}: not a run directory (it has no config.yaml); give the one that run.dir in the "
            "configuration names"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DepthpipeError(f"{path}: not YAML ({' '.join(str(error).split())}); restore the file") from None
    if not isinstance(config, dict):
        raise DepthpipeError(f"{path}: not a run's configuration; give the directory of a run")
    return config


def _sleep_unless_resized(console: Console, seconds: float) -> None:
    size, end = console.size, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and console.size == size:
        time.sleep(min(0.1, left))


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Times in seconds; NaN where not known yet."""

    state: str  # starting | running | stalled | finished
    step: int
    total_steps: int
    silent_s: float  # since the last step, or since the start if there was none
    elapsed_s: float  # from the first logged step to the last
    eta_s: float

    @classmethod
    def of(cls, config: dict[str, Any], history: RunHistory, started: float, now: float) -> Progress:
        total_steps = int(_get(config, "train", "steps", default=0))
        last = history.last
        if last is None:
            return cls("starting", 0, total_steps, now - started, 0.0, math.nan)
        seconds_per_step = history.seconds_per_step()
        logged_every = last.step - history.recent[-2].step if len(history.recent) > 1 else 1
        silent_s = max(0.0, now - last.time)
        if last.step >= total_steps:
            state = "finished"
        else:
            state = "stalled" if silent_s > max(30.0, 10 * seconds_per_step * logged_every) else "running"
        eta_s = max(0.0, (total_steps - last.step) * seconds_per_step - silent_s) if state == "running" else math.nan
        elapsed_s = last.time - history.points[0].time + history.points[0].step_time_s
        return cls(state, last.step, total_steps, silent_s, elapsed_s, eta_s)


class Frame:
    """One picture of a run, as large as the room it is given. Below 72 columns the curves go under the numbers.

    `started`: when the run began, in seconds since the epoch (the time of its config.yaml).
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], config: dict[str, Any], history: RunHistory, started: float
    ) -> None:
        self._run_dir = Path(run_dir)
        self._config = config
        self._history = history
        self._progress = Progress.of(config, history, started, time.time())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or console.height
        warnings = list(self._warnings())
        body_height = height - 5 - len(warnings)
        body = Layout()
        if width >= 72:
            numbers_width = 44 if width >= 110 else 30
            right = Layout(self._numbers(numbers_width >= 44, body_height), size=numbers_width)
            if body_height >= _NUMBERS_HEIGHT + 5:
                numbers = Layout(right.renderable, size=_NUMBERS_HEIGHT)
                right.split_column(numbers, Layout(self._validations(body_height)))
            body.split_row(self._curves(width - numbers_width, body_height), right)
        else:
            numbers = Layout(self._numbers_in_two_columns(), size=10)
            body.split_column(numbers, Layout(self._loss(), visible=body_height >= 15))
        root = Layout()
        root.split_column(
            Layout(self._header(), size=5),
            body,
            Layout(Group(*warnings), size=len(warnings), visible=bool(warnings)),
        )
        yield from console.render(root, options.update(height=height))

    def _header(self) -> RenderableType:
        progress = self._progress
        style = _STATE_STYLE[progress.state]
        state = Text.assemble((f" ● {progress.state} ", f"bold {style}"))
        if progress.state in ("stalled", "running"):
            state.append(f"last step {format_duration(progress.silent_s)} ago ", "dim")
        elif progress.state == "starting":
            state.append(f"for {format_duration(progress.silent_s)} ", "dim")
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        share = progress.step / progress.total_steps if progress.total_steps else 0.0
        times = Text.assemble(f"{share:.0%}", (" in ", "dim"), format_duration(progress.elapsed_s))
        if progress.state == "running":
            times.append("  ETA ", "dim").append(format_duration(progress.eta_s), "bold")
        bar.add_row(
            Text.assemble("step ", (f"{progress.step:,}", "bold"), f" of {progress.total_steps:,}"),
            ProgressBar(progress.total_steps or 1, progress.step, complete_style=style, finished_style=style),
            times,
        )
        lines: list[RenderableType] = [bar]
        lines += [Text(line, "dim", no_wrap=True, overflow="ellipsis") for line in describe(self._config)]
        title = Text.assemble((f" {self._run_dir} ", "bold"))
        return Panel(Group(*lines), title=title, title_align="left", subtitle=state, subtitle_align="right")

    def _curves(self, width: int, height: int) -> Layout:
        layout = Layout()
        if height < 14:
            layout.update(self._loss())
            return layout
        tokens = self._curve("tokens_per_second", "tokens/s", "green", format_count, "area")
        if width < 76 or height < 22:
            layout.split_column(Layout(self._loss(), ratio=3), Layout(tokens, ratio=2))
            return layout
        lower, last = Layout(ratio=2), Layout(ratio=2, visible=height >= 34)
        lower.split_row(
            Layout(tokens), Layout(self._curve("grad_norm", "grad norm", "magenta", lambda value: f"{value:.2f}"))
        )
        last.split_row(
            Layout(self._curve("data_wait_fraction", "data wait", "yellow", format_percent, "area")),
            Layout(self._curve("lr", "learning rate", "blue", lambda value: f"{value:.2g}", "area")),
        )
        layout.split_column(Layout(self._loss(), ratio=3), lower, last)
        return layout

    def _loss(self) -> RenderableType:
        steps, values = self._history.curve("loss")
        series = [Series(steps, values, "cyan")]
        title = Text.assemble(("loss", "cyan"))
        if self._history.validation:
            validation_steps, losses = zip(*self._history.validation, strict=True)
            series.append(Series(validation_steps, losses, "bold yellow", "marks"))
            title.append("  • validation", "bold yellow")
        return _panel(Curve(series, lambda value: f"{value:.2f}"), title)

    def _curve(
        self,
        name: str,
        title: str,
        style: str,
        format_value: Callable[[float], str],
        kind: Literal["line", "area"] = "line",
    ) -> RenderableType:
        return _panel(Curve([Series(*self._history.curve(name), style, kind)], format_value), title, style)

    def _validations(self, height: int) -> RenderableType:
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for step, loss in reversed(self._history.validation[-height:]):
            table.add_row(f"step {step:,}", f"{loss:.4f}")
        return _panel(table, "validation loss", "yellow")

    def _numbers(self, trends: bool, height: int) -> RenderableType:
        groups = self._number_groups()
        if height >= sum(map(len, groups)) + len(groups) + 1:
            rows = [row for group in groups for row in (*group, None)][:-1]
        else:
            rows = [row for group in groups for row in group]
        return _panel(self._number_table(rows, trends), "now")

    def _numbers_in_two_columns(self) -> RenderableType:
        training, speed, time_and_space = self._number_groups()
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_row(
            self._number_table([*training, *time_and_space][:8], trends=False),
            self._number_table([*speed, *[*training, *time_and_space][8:]], trends=False),
        )
        return _panel(table, "now")

    def _number_table(self, rows: Sequence[tuple[str, str, str | None] | None], trends: bool) -> RenderableType:
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        if trends:
            table.add_column(no_wrap=True, width=10)
        for row in rows:
            if row is None:
                table.add_row()
                continue
            name, value, metric = row
            recent = [y for one in self._history.recent if metric and (y := getattr(one, metric)) is not None]
            trend = Text(sparkline(recent, 10), "green dim")
            table.add_row(name, Text(value, "bold"), *([trend] if trends else []))
        return table

    def _number_groups(self) -> list[list[tuple[str, str, str | None]]]:
        """Name, value, and the metric whose trend stands beside it."""
        history, last = self._history, self._history.last
        if last is None:
            return [[("nothing logged yet", "", None)], [], []]
        rates = [point.tokens_per_second for point in history.points]
        validation = f"{history.validation[-1][1]:.4f}" if history.validation else "-"
        return [
            [
                ("loss", f"{last.loss:.4f}", "loss"),
                ("validation", validation, None),
                ("grad norm", f"{last.grad_norm:.3f}", "grad_norm"),
                ("learning rate", f"{last.lr:.2e}", "lr"),
            ],
            [
                ("tokens/s", format_count(last.tokens_per_second), "tokens_per_second"),
                ("  median", format_count(statistics.median(rates)), None),
                ("  per device", format_count(last.tokens_per_second_per_device), None),
                ("MFU", format_percent(last.mfu), "mfu"),
                ("tokens so far", format_count(last.tokens), None),
            ],
            [
                ("step time", format_seconds(last.step_time_s), "step_time_s"),
                ("data wait", format_percent(history.recent_mean("data_wait_fraction")), "data_wait_fraction"),
                ("bubble", format_percent(history.recent_mean("bubble_fraction")), "bubble_fraction"),
                ("memory", format_bytes(last.memory_bytes), None),
            ],
        ]

    def _warnings(self) -> list[Text]:
        history, progress, texts = self._history, self._progress, []
        if progress.state == "stalled":
            texts.append(f"no step for {format_duration(progress.silent_s)}; {_last_log_line(self._run_dir)}")
        if progress.state == "starting" and progress.silent_s > 120:
            texts.append(f"no step yet after {format_duration(progress.silent_s)}; {_last_log_line(self._run_dir)}")
        lost = next((one for one in history.recent if not math.isfinite(one.loss)), None)
        if lost is not None:
            texts.append(f"the loss is not a number at step {lost.step:,}: lower optimizer.lr or go back a checkpoint")
        wait = history.recent_mean("data_wait_fraction")
        if wait > 0.1:
            texts.append(f"data wait is {wait:.0%} of the step: the disk or the loader is too slow")
        return [Text(f" ▲ {text}", "bold red", no_wrap=True, overflow="ellipsis") for text in texts]


def _panel(content: RenderableType, title: Text | str, style: str = "") -> Panel:
    title = Text(title, style) if isinstance(title, str) else title
    return Panel(content, title=title, title_align="left", border_style="bright_black")


def describe(config: dict[str, Any]) -> tuple[str, str]:
    """Two lines: the model, and how it lies on the devices."""
    residual = _get(config, "model", "residual", default="?")
    blocks = f" in blocks of {_get(config, 'model', 'layers_per_block', default='?')}" if residual == "block" else ""
    model = (
        f"{residual} residuals · {_get(config, 'model', 'num_hidden_layers', default='?')} layers{blocks}"
        f" · hidden {_get(config, 'model', 'hidden_size', default='?')}"
        f" · sequence {_get(config, 'data', 'sequence_length', default='?')}"
    )
    stages = int(_get(config, "parallel", "pipeline", default=1))
    replicas = int(_get(config, "parallel", "data", default=1))
    batch = int(_get(config, "train", "global_batch_size", default=0))
    micro_batch = int(_get(config, "train", "micro_batch_size", default=1))
    split = _get(config, "parallel", "split", default=[])
    layers = f" of {' + '.join(map(str, split))} layers" if split else ""
    precision = _get(config, "train", "precision", default="auto")
    layout = (
        f"{stages} stage{'s' * (stages > 1)}{layers} × {replicas} replica{'s' * (replicas > 1)}"
        f" · {_get(config, 'parallel', 'schedule', default='1f1b')}"
        f" · {batch // (micro_batch * replicas)} micro-batches of {micro_batch}"
    ) + (f" · {precision}" if precision != "auto" else "")
    return model, layout


def _get(config: dict[str, Any], section: str, key: str, default: Any) -> Any:
    """A key of the configuration; runs of other versions may lack it."""
    part = config.get(section)
    return part[key] if isinstance(part, dict) and part.get(key) is not None else default


def _last_log_line(run_dir: Path) -> str:
    """The last thing that any rank said, which is where to look when a run stands still."""
    logs = sorted((run_dir / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in logs:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        if said:
            return f"{path.name}: {said[-1]}"
    return f"see {run_dir / 'logs'}"
