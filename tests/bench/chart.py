"""Bars as SVG: draws panels of horizontal bars, and knows nothing of what they mean."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, Literal

WIDTH: Final = 900
_MARGIN: Final = 28
_GAP: Final = 36
_PANEL: Final = (WIDTH - 2 * _MARGIN - _GAP) / 2
_LABELS: Final = 176
_VALUES: Final = 62
_BARS: Final = _PANEL - _LABELS - _VALUES
_ROW: Final = 23
_BAR: Final = 14
_HEADER: Final = 64
_PANEL_HEADER: Final = 46

Kind = Literal["ours", "other", "limit"]


@dataclass(frozen=True)
class Bar:
    """A bar from 0 to `value`, and a thin line from `low` to `high`."""

    label: str
    value: float
    low: float
    high: float
    kind: Kind = "other"


@dataclass(frozen=True)
class Panel:
    title: str
    note: str
    bars: Sequence[Bar]
    cut: bool = False
    """Whether to cut off bars that are so long that the others would look the same."""


_STYLE: Final = """
  text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #0f172a; }
  .title { font-size: 17px; font-weight: 600; }
  .panel { font-size: 14px; font-weight: 600; }
  .note { font-size: 11.5px; fill: #64748b; }
  .label, .value { font-size: 12px; }
  .value { fill: #475569; font-variant-numeric: tabular-nums; }
  .strong { font-weight: 700; fill: #1d4ed8; }
  .ours { fill: #2563eb; }
  .other { fill: #a8b4c6; }
  .limit { fill: #f1f5f9; stroke: #94a3b8; stroke-dasharray: 3 2; }
  .range { stroke: #334155; stroke-width: 1.25; fill: none; }
  .break { stroke: #ffffff; stroke-width: 2.5; }
  .base { stroke: #cbd5e1; }
"""


def draw(title: str, note: str, panels: Sequence[Panel], show: Callable[[float], str]) -> str:
    """Return an SVG document with two panels in each row. `show` writes a value."""
    parts: list[str] = []
    y = float(_HEADER)
    for start in range(0, len(panels), 2):
        row = panels[start : start + 2]
        for column, panel in enumerate(row):
            parts += _panel(panel, _MARGIN + column * (_PANEL + _GAP), y, show)
        y += _PANEL_HEADER + max(len(panel.bars) for panel in row) * _ROW + 26
    height = y + 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
            f'width="{WIDTH}" height="{height:g}" role="img" aria-labelledby="title note">',
            f"<style>{_STYLE}</style>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="12" '
            'fill="#ffffff" stroke="#e2e8f0"/>',
            _text("title", _MARGIN, 34, title, id="title"),
            _text("note", _MARGIN, 53, note, id="note"),
            *parts,
            "</svg>",
            "",
        ]
    )


def _panel(panel: Panel, x: float, y: float, show: Callable[[float], str]) -> list[str]:
    parts = [_text("panel", x, y + 16, panel.title), _text("note", x, y + 33, panel.note)]
    top = y + _PANEL_HEADER
    scale = _BARS / (_longest(panel) or 1)
    for number, bar in enumerate(panel.bars):
        parts += _bar(bar, x, top + number * _ROW, scale, show)
    base = f"M{x + _LABELS:g} {top - 2:g} v{len(panel.bars) * _ROW:g}"
    return [*parts, f'<path class="base" d="{base}"/>']


def _longest(panel: Panel) -> float:
    """Return the value at the width of the panel. A line far beyond all bars is cut off."""
    if not panel.bars:
        return 0
    longest = max(bar.value for bar in panel.bars)
    if panel.cut:
        longest = min(longest, 3 * statistics.median(bar.value for bar in panel.bars))
    return min(max(bar.high for bar in panel.bars), 1.5 * longest)


def _bar(bar: Bar, x: float, y: float, scale: float, show: Callable[[float], str]) -> list[str]:
    middle = y + _BAR / 2 + 1
    left = x + _LABELS
    length = min(max(bar.value * scale, 1.5), _BARS)
    end = left + max(length, min(bar.high * scale, _BARS))
    strong = " strong" if bar.kind == "ours" else ""
    return [
        _text(f"label{strong}", left - 8, middle + 4, bar.label, **{"text-anchor": "end"}),
        f'<rect class="{bar.kind}" x="{left:.1f}" y="{y + 1:.1f}" width="{length:.1f}" '
        f'height="{_BAR}" rx="2"/>',
        *(_range(bar, left, middle, scale) if bar.value * scale <= _BARS else _break(end, middle)),
        _text(f"value{strong}", end + 6, middle + 4, show(bar.value)),
    ]


def _break(end: float, middle: float) -> list[str]:
    """Return the mark of a bar that is cut off."""
    half = _BAR / 2 + 2
    strokes = " ".join(f"M{end - at:.1f} {middle + half:.1f} l5 {-2 * half:g}" for at in (26, 20))
    return [f'<path class="break" d="{strokes}"/>']


def _range(bar: Bar, left: float, middle: float, scale: float) -> list[str]:
    """Return the thin line with a stop at each end, or without where it is cut off."""
    low, high = left + bar.low * scale, left + min(bar.high * scale, _BARS)
    if high - low < 2:
        return []
    path = f"M{low:.1f} {middle:.1f} H{high:.1f}"
    if bar.low < bar.value:
        path += f" M{low:.1f} {middle - 3:.1f} v6"
    if bar.high * scale <= _BARS:
        path += f" M{high:.1f} {middle - 3:.1f} v6"
    return [f'<path class="range" d="{path}"/>']


def _text(kind: str, x: float, y: float, words: str, **attributes: str) -> str:
    more = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'
