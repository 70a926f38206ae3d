"""Draws the curves of a festival as an SVG: rates above, the 99th percentile of latency below."""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _LEFT, _RIGHT = 900, 80, 100
_PANELS = ((50, 250), (360, 120))  # top and height
_LINES = {
    "reads_per_s": ("reads", "#0969da", ""),
    "questions_per_s": ("timelines asked about", "#bc4c00", "7 4"),
    "messages_per_s": ("messages to storage", "#57606a", "2 4"),
}
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #57606a; }
.title { font-weight: 600; font-size: 15px; }
.grid { stroke: #8c959f; stroke-width: 0.5; opacity: 0.6; }
.line { fill: none; stroke-width: 2.2; }
"""


def draw(report: dict[str, Any]) -> str:
    """SVG of a report of `festival.py`."""
    curves: dict[str, list[list[float]]] = report["curves"]
    end_s = max(point[0] for points in curves.values() for point in points)
    height = _PANELS[1][0] + _PANELS[1][1] + 40
    made = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">', f"<style>{_STYLE}</style>"]
    most = max(value for name in _LINES for _, value in curves[name])
    made += _panel(0, "a second", end_s, _nice(most), report)
    for name, (label, colour, dashes) in _LINES.items():
        made += _line(0, curves[name], end_s, _nice(most), colour, dashes, label)
    slowest = max((value for _, value in curves["p99_ms"]), default=1.0)
    made += _panel(1, "99th percentile, ms", end_s, _nice(slowest), report)
    made += _line(1, curves["p99_ms"], end_s, _nice(slowest), "#8250df", "", "p99 of reads")
    return "\n".join([*made, "</svg>"]) + "\n"


def _panel(number: int, title: str, end_s: float, most: float, report: dict[str, Any]) -> list[str]:
    top, height = _PANELS[number]
    right = _WIDTH - _RIGHT
    made = [f'<text class="title" x="{_LEFT}" y="{top - 14}">{escape(title)}</text>']
    for part in range(5):
        y = top + height * (1 - part / 4)
        made.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        made.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{most * part / 4:,.10g}</text>')
    step_s = 10 if end_s > 25 else 5
    for second in range(0, int(end_s) + 1, step_s):
        made.append(f'<text x="{_x(second, end_s):.1f}" y="{top + height + 18}" text-anchor="middle">{second} s</text>')
    at = _x(report["scaled"].get("published_s", report["scaled"]["asked_s"]), end_s)
    made.append(f'<line class="grid" x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{top + height}"/>')
    if number == 0:
        made.append(f'<text x="{at:.1f}" y="{top - 4}" text-anchor="middle">a cache node is added</text>')
    return made


def _line(
    number: int, points: list[list[float]], end_s: float, most: float, colour: str, dashes: str, label: str
) -> list[str]:
    top, height = _PANELS[number]
    places = [(_x(at, end_s), top + height * (1 - value / most)) for at, value in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    made = [f'<polyline class="line" points="{path}" stroke="{colour}"{dashed}/>']
    if places:
        # At the end of the peak, where the curves lie furthest apart.
        highest = max(value for _, value in points)
        at = max(number for number, (_, value) in enumerate(points) if value >= 0.75 * highest)
        x, y = places[at]
        made.append(f'<text x="{x + 42:.1f}" y="{y + 4:.1f}" style="fill: {colour}">{escape(label)}</text>')
    return made


def _x(second: float, end_s: float) -> float:
    return _LEFT + (_WIDTH - _RIGHT - _LEFT) * second / end_s


def _nice(value: float) -> float:
    """The least of 1, 2, 4, 6, 8 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-3)))
    return next(factor * power for factor in (1, 2, 4, 6, 8, 10) if factor * power >= value)
