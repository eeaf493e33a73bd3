"""The ratios as bars, in SVG.  Pure."""

from __future__ import annotations

from html import escape

from bench.results import Results
from bench.targets import TARGETS

WIDTH, LEFT, RIGHT = 860, 300, 90
BAR, GAP, TOP = 16, 8, 56
SCALE_MAX = 6.0
"""Longer bars are cut; their number stands beside them."""
MET, MISSED, WANTED = "#2f8f5b", "#c0504d", "#333333"


def draw(results: Results) -> str:
    """One bar per target that is a ratio and was measured, with a mark at what is wanted."""
    bars = [(t, reached) for t in TARGETS if t.base and (reached := t.value(results)) is not None]
    height = TOP + len(bars) * (BAR + GAP) + GAP
    unit = (WIDTH - LEFT - RIGHT) / SCALE_MAX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="12" y="22" font-size="15">UKAI against others on the same machine, ratios of medians</text>',
        f'<text x="12" y="40" fill="#666666">{escape(_subtitle(results))}</text>',
        f'<line x1="{LEFT + unit:.1f}" y1="{TOP - 6}" x2="{LEFT + unit:.1f}" y2="{height}" stroke="#bbbbbb"/>',
    ]
    for number, (target, reached) in enumerate(bars):
        y = TOP + number * (BAR + GAP)
        length = min(reached, SCALE_MAX) * unit
        mark = LEFT + min(target.limit, SCALE_MAX) * unit
        colour = MET if target.met(reached) else MISSED
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(target.title)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<line x1="{mark:.1f}" y1="{y - 3}" x2="{mark:.1f}" y2="{y + BAR + 3}" stroke="{WANTED}" '
            'stroke-width="2"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{y + 12}">{reached:.2f}×</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _subtitle(results: Results) -> str:
    about = results.about
    return f"{about.get('date', '')}, {about.get('cores', '?')} cores; the dark mark is what is wanted, grey is equal"
