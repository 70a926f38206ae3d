"""Draws a report: items a second against the items of a call, for each system, as an SVG.

    python -m benchmarks.plot REPORT.json PLOT.svg

The same report gives the same bytes. The colours are told apart without colour vision too, lines have their names at
their ends, and a dark page is answered with light ink.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import click
from timetier.jobs.bench_workloads import WORKLOADS

_PANELS = (("reads", "get"), ("durable writes", "put"))
_TITLES = {"timetier": "TimeTier", "redis": "Redis", "etcd": "etcd"}
_WIDTH, _HEIGHT = 900, 400
_LEFT, _TOP, _PANEL_WIDTH, _PANEL_HEIGHT, _GAP = 70, 56, 310, 270, 120
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; font-size: 15px; }
.grid { stroke: #d0d7de; stroke-width: 1; }
.range { stroke-width: 1.5; opacity: 0.55; }
.line { fill: none; stroke-width: 2.5; }
.timetier { stroke: #0969da; } .timetier-dot, .timetier-name { fill: #0969da; }
.redis { stroke: #bc4c00; stroke-dasharray: 7 4; } .redis-dot, .redis-name { fill: #bc4c00; }
.etcd { stroke: #57606a; stroke-dasharray: 2 4; } .etcd-dot, .etcd-name { fill: #57606a; }
.range.redis, .range.etcd { stroke-dasharray: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .grid { stroke: #3d444d; }
  .timetier { stroke: #58a6ff; } .timetier-dot, .timetier-name { fill: #58a6ff; }
  .redis { stroke: #f0883e; } .redis-dot, .redis-name { fill: #f0883e; }
  .etcd { stroke: #a5adb7; } .etcd-dot, .etcd-name { fill: #a5adb7; }
}
"""


class _Panel:
    """One diagram with two logarithmic axes. `top`, `bottom`: powers of ten of the rate."""

    def __init__(self, number: int, batches: list[int], bottom: int, top: int) -> None:
        self.left = _LEFT + number * (_PANEL_WIDTH + _GAP)
        self._batches = batches
        self._bottom, self._top = bottom, top

    def x(self, batch: float) -> float:
        widest = math.log10(max(self._batches)) or 1.0
        return self.left + math.log10(batch) / widest * _PANEL_WIDTH

    def y(self, rate: float) -> float:
        share = (math.log10(rate) - self._bottom) / (self._top - self._bottom)
        return _TOP + (1 - share) * _PANEL_HEIGHT

    def frame(self, title: str) -> list[str]:
        right, bottom = self.left + _PANEL_WIDTH, _TOP + _PANEL_HEIGHT
        made = [f'<text class="title" x="{self.left}" y="{_TOP - 22}">{escape(title)}, items a second</text>']
        for power in range(self._bottom, self._top + 1):
            y = self.y(10.0**power)
            made.append(f'<line class="grid" x1="{self.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            made.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{_rate(power)}</text>')
        for batch in self._batches:
            x = self.x(batch)
            made.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>')
            made.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{batch:,}</text>')
        middle = self.left + _PANEL_WIDTH / 2
        made.append(
            f'<text x="{middle:.1f}" y="{bottom + 42}" text-anchor="middle">items a call, one call at a time</text>'
        )
        return made

    def series(self, system: str, points: list[tuple[int, dict[str, float]]]) -> list[str]:
        places = [(self.x(batch), self.y(rate["median"])) for batch, rate in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        made = [f'<polyline class="line {system}" points="{path}"/>']
        for (x, y), (_, rate) in zip(places, points, strict=True):
            low, high = self.y(rate["min"]), self.y(rate["max"])
            made.append(f'<line class="range {system}" x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}"/>')
            made.append(f'<circle class="{system}-dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        return made


def draw(report: dict[str, Any]) -> str:
    """The SVG of a report of `benchmarks.compare`."""
    found = {title: _points(report, kind) for title, kind in _PANELS}
    rates = [
        rate[which]
        for panel in found.values()
        for points in panel.values()
        for _, rate in points
        for which in ("min", "max")
    ]
    batches = sorted({batch for panel in found.values() for points in panel.values() for batch, _ in points}) or [1]
    bottom = math.floor(math.log10(max(1.0, min(rates, default=1.0))))
    top = max(bottom + 1, math.ceil(math.log10(max(rates, default=10.0))))
    body: list[str] = []
    for number, (title, panel) in enumerate(found.items()):
        diagram = _Panel(number, batches, bottom, top)
        body += diagram.frame(title)
        ends: list[tuple[float, str]] = []
        for system, points in panel.items():
            body += diagram.series(system, points)
            ends.append((diagram.y(points[-1][1]["median"]), system))
        body += _names(diagram, ends)
    about = f"medians of {report['options']['repeats']} slices, with least and most; {report['machine']['cores']} cores"
    body.append(f'<text x="{_LEFT}" y="{_HEIGHT - 10}">{escape(about)}</text>')
    inner = "\n".join(body)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
    label = "<title>Items a second against items a call: " + ", ".join(_TITLES[s] for s in _systems(found)) + "</title>"
    return f"{head}\n{label}\n<style>{_STYLE}</style>\n{inner}\n</svg>\n"


def _points(report: dict[str, Any], kind: str) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """By system: (items a call, rate) of the workloads of that kind with one caller."""
    found: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for system in _TITLES:
        for name, by_system in report["figures"].items():
            workload = WORKLOADS[name]
            if workload.kind == kind and workload.callers == 1 and system in by_system:
                found.setdefault(system, []).append((workload.per_call, by_system[system]["per_s"]))
    return {system: sorted(points, key=lambda point: point[0]) for system, points in found.items()}


def _systems(found: dict[str, dict[str, Any]]) -> list[str]:
    return [system for system in _TITLES if any(system in panel for panel in found.values())]


def _names(diagram: _Panel, ends: list[tuple[float, str]]) -> list[str]:
    """Names of the lines beside their ends, moved apart where they would overlap."""
    made, last = [], -math.inf
    for y, system in sorted(ends):
        last = max(y + 4, last + 16)
        x = diagram.left + _PANEL_WIDTH + 8
        made.append(f'<text class="{system}-name" x="{x}" y="{last:.1f}">{_TITLES[system]}</text>')
    return made


def _rate(power: int) -> str:
    for least, unit in ((9, "G"), (6, "M"), (3, "k")):
        if power >= least:
            return f"{10 ** (power - least)} {unit}"
    return str(10**power)


@click.command(help=__doc__)
@click.argument("report", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("plot", type=click.Path(dir_okay=False, path_type=Path))
def main(report: Path, plot: Path) -> None:
    plot.write_text(draw(json.loads(report.read_text())))


if __name__ == "__main__":
    main()
