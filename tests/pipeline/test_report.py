"""The report: one page that stands alone, whose curves are the run's numbers."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from data_prep.errors import DepthpipeError
from pipeline.chart import Chart, Line, nice_ticks
from pipeline.formatting import format_bytes, format_count, format_duration, format_percent, format_seconds
from pipeline.metrics import MetricsWriter
from pipeline.report import add_commands, render_report, report
from tests.pipeline.conftest import METRICS

STEP = replace(METRICS, data_wait_s=0.25, bubble_fraction=0.2)


def make_run(run_dir: Path, steps: int, **changes: float | None) -> Path:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("train: {steps: 200}  # </script><b>\n")
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            validation = 3.25 if step % 50 == 0 else None
            metrics = replace(STEP, step=step, tokens=16384 * step, loss=9 - step / 100, validation_loss=validation)
            writer.write(replace(metrics, **changes))
    return run_dir


def svgs(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)]


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in element.attrib["points"].split())]


@pytest.mark.parametrize("steps", [0, 1, 2, 150, 3000])
def test_the_page_stands_alone_and_its_parts_are_well_formed(tmp_path, steps):
    html = render_report(make_run(tmp_path / "run", steps))
    assert not re.search(r"https?:|\b(src|href)=|url\(|@import", html)
    assert len(svgs(html)) == (0 if steps == 0 else 9 if steps >= 100 else 8)
    assert html.count("<script") == html.count("</script>") == 2
    assert len(html) < 1_000_000
    charts = json.loads(re.search(r'id="data">(.*?)</script>', html, flags=re.DOTALL)[1])
    assert len(charts) == html.count("<figure")
    for line in (line for chart in charts for line in chart["lines"]):
        assert len(line["steps"]) == len(line["values"]) > 0
        assert line["steps"] == sorted(set(line["steps"])) and line["steps"][-1] in (steps, steps // 50 * 50)


def test_the_page_says_what_the_run_reached(tmp_path):
    html = render_report(make_run(tmp_path / "run", 200))
    for value, name in (
        ("200", "step of 200"),
        ("7.0000", "loss"),
        ("3.2500", "validation loss, step 200"),
        ("13,107", "tokens per second, median"),
        ("38.2 %", "MFU, median"),
        ("3.28M", "tokens"),
        ("812 MiB", "memory, at most"),
    ):
        assert f"<div><b>{value}</b>{name}</div>" in html
    assert '<span class="finished">finished</span>' in html
    assert "# &lt;/script&gt;&lt;b&gt;" in html


def test_a_run_of_nan_and_without_mfu_has_a_page(tmp_path):
    html = render_report(make_run(tmp_path / "run", 3, loss=math.nan, grad_norm=math.inf, mfu=None))
    assert html.count("nothing logged") == 3  # loss (no validation yet), MFU and gradient norm


def test_the_command_writes_the_page_and_prints_its_path(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    run_dir = make_run(tmp_path / "run", 3)
    for options, path in (
        ([], run_dir / "report.html"),
        (["--out", str(tmp_path / "page.html")], tmp_path / "page.html"),
    ):
        args = parser.parse_args(["report", str(run_dir), *options])
        assert args.run(args) == 0
        assert capsys.readouterr().out == f"{path}\n"
        assert path.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(DepthpipeError, match="not a run directory"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_drawn_to_scale():
    chart = Chart([Line("", [0, 50, 100], [0.0, 5.0, 10.0], "a")], str, width=640, height=220)
    (polyline,) = svgs(chart.svg())[0].findall("polyline")
    assert points(polyline) == [(70, 194), (338, 102), (606, 10)]
    labels = {label.text: label for label in svgs(chart.svg())[0].findall("text")}
    assert float(labels["10.0"].attrib["y"]) - 4 == 10
    assert float(labels["100"].attrib["x"]) == 606


def test_many_points_become_means_within_a_band():
    values = [(-1.0) ** step for step in range(4000)]
    values[2005] = 7.0
    chart = Chart([Line("", range(4000), values, "a")], str)
    svg = svgs(chart.svg())[0]
    assert len(points(svg.find("polyline"))) == 400
    (zero,) = (float(text.attrib["y"]) - 4 for text in svg.findall("text") if text.text == "0.0")
    means = [y for _, y in points(svg.find("polyline"))]
    assert means[:200] == [zero] * 200 and means[200] < zero
    assert chart.data()["lines"][0]["values"][200] == "0.8"
    band = [y for _, y in points(svg.find("polygon"))]
    assert min(band) == pytest.approx(10, abs=30) and max(band) > zero  # the spike and the dips are seen


def test_stacks_lie_on_each_other():
    steps = [1, 2, 3]
    lines = [Line("below", steps, [1.0] * 3, "a", "stack"), Line("above", steps, [2.0, 2.0, 4.0], "b", "stack")]
    chart = Chart(lines, str, from_zero=True)
    above, below = svgs(chart.svg())[0].findall("polygon")
    assert [y for _, y in points(above)][:3] == [pytest.approx(194 - 184 * top / 5, abs=0.1) for top in (3, 3, 5)]
    assert [y for _, y in points(below)][:3] == [pytest.approx(194 - 184 / 5, abs=0.1)] * 3
    assert [line["values"] for line in chart.data()["lines"]] == [["1.0"] * 3, ["2.0", "2.0", "4.0"]]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (2.41, 3.17, [2.4, 2.6, 2.8, 3.0, 3.2]),
        (0, 0.003, [0, 0.001, 0.002, 0.003]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (5, 5, [4.7, 4.8, 4.9, 5.0, 5.1, 5.2, 5.3]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_cover_the_values(low, high, ticks):
    found = nice_ticks(low, high)
    assert found == ticks or (low == high and found[0] < low < found[-1])
    assert found[0] <= low and found[-1] >= high


def test_ticks_of_any_range_are_few_and_even():
    for exponent, mantissa in itertools.product(range(-9, 13), (1.0, 1.7, 2.3, 4.9, 9.99)):
        high = mantissa * 10.0**exponent
        ticks = nice_ticks(high / 3, high)
        assert 3 <= len(ticks) <= 8 and ticks[0] <= high / 3 and ticks[-1] >= high * (1 - 1e-9)
        gaps = [b - a for a, b in itertools.pairwise(ticks)]
        assert max(gaps) == pytest.approx(min(gaps))


def test_numbers_as_people_read_them():
    assert [format_duration(s) for s in (0, 9.4, 59.6, 723, 11100, 180000, math.nan)] == [
        *("0s", "9s", "1m 00s", "12m 03s", "3h 05m", "2d 02h", "-")
    ]
    assert [format_seconds(s) for s in (0.0123, 0.9, 1.3, 41.27, math.nan)] == [
        "12 ms",
        "900 ms",
        "1.30 s",
        "41.3 s",
        "-",
    ]
    assert [format_count(n) for n in (0.5, 950, 12345.6, 999_999, 40.4e6, 1.5e9, 2.1e12)] == [
        *("0.5", "950", "12,346", "999,999", "40.4M", "1.5B", "2.1T")
    ]
    assert [format_bytes(n) for n in (0, 512, 812 << 20, 1000 << 20, 41.25 * 2**30)] == [
        *("0 B", "512 B", "812 MiB", "1000 MiB", "41.2 GiB")
    ]
    assert [format_percent(x) for x in (0.382, 0.0, None, math.nan)] == ["38.2 %", "0.0 %", "-", "-"]
