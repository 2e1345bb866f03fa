"""Charts as inline SVG, tables, and the page they stand on. No scripts, no network; colours are CSS variables of the page.

Horizontal places are percentages and all sizes pixels, so a chart fills its box and its text keeps its size at any width.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Colours told apart by colour-blind readers, then the tints that text stands on; marks also differ by shape.
_LIGHT = ("#0072b2", "#c65100", "#00775a", "#a44a86", "#8a6100", "#4b5fc4", "#5c6670", "#7a3b12")
_DARK = ("#56b4e9", "#f08a45", "#2fc39a", "#e293c4", "#e3c341", "#a3b0ff", "#aab4be", "#d3a27f")
_LIGHT_TINTS = ("#cfe6f7", "#fcdcc4", "#c9efe2", "#f3d9ea", "#f3e7b8", "#dfe3fb", "#e4e8eb", "#ecd9cb")
_DARK_TINTS = ("#12405f", "#5e2c0b", "#0c4435", "#50224a", "#463a08", "#2a3468", "#333b44", "#4a3120")
COLOURS = len(_LIGHT)
_SHAPES = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.5,-3.5h7v7h-7z",
    "M0,-5L5,0L0,5L-5,0z",
    "M0,-5L4.5,3.5h-9z",
    "M0,5L4.5,-3.5h-9z",
    "M-4,-1.5h2.5v-2.5h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5z",
    "M-5,-2h10v4h-10z",
    "M-2,-5h4v10h-4z",
)
_BAR, _ROW = 12, 36
# Where the longest bar ends, so that its number fits behind it; where the first and the last point of a line stand; where columns
# end, so that the axis is beside them.
_LONGEST, _FIRST, _LAST, _ACROSS = 74.0, 10.0, 95.0, 93.0
_TOP, _PLOT, _FOOT = 34, 160, 36


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar with its 95 % interval. note: said in place of a number where there is none."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    colour: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A series of (x, y)."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """A column of parts, from below: (height, colour). tip: what it says when pointed at.  href: where it leads."""

    parts: tuple[tuple[float, int], ...]
    tip: str
    href: str = ""


def escape(text: object) -> str:
    """Text for HTML, quotes included."""
    return html.escape(str(text), quote=True)


def ink(colour: int) -> str:
    """The CSS value of a colour by its number, which may be any."""
    return f"var(--c{colour % COLOURS})"


def number(value: float, digits: int = 2) -> str:
    """A number for people: thousands set apart, no sign on zero."""
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text


def bars(
    title: str, rows: Sequence[Bar], *, unit: str = "", digits: int = 2, reference: float | None = None, scale: float = 0.0
) -> str:
    """Horizontal bars from zero, a label above each, the interval as a whisker. reference: a dashed line, as 1 for speedups.

    scale: the least value that the longest bar stands for, so that several charts can be compared.
    """
    most = max([reference or 0.0, scale, *[row.high or row.value or 0.0 for row in rows]]) or 1.0
    height = _ROW * len(rows) + 4
    parts = []
    if reference is not None:
        x = _percent(reference / most * _LONGEST)
        parts.append(f'<line class="reference" x1="{x}" x2="{x}" y1="0" y2="{height}"/>')
    parts += [_bar(row, _ROW * i, most, unit, digits) for i, row in enumerate(rows)]
    return _svg(title, height, "".join(parts))


def _bar(row: Bar, top: int, most: float, unit: str, digits: int) -> str:
    said = row.note if row.value is None else f"{number(row.value, digits)}{unit}"
    label = f'<text class="label" x="0" y="{top + 13}">{escape(row.label)}</text>'
    middle = top + 18 + _BAR / 2
    if row.value is None:
        return f'{label}<text class="muted" x="0" y="{middle + 4}">{escape(said)}</text>'
    end, whisker, behind = row.value / most * _LONGEST, "", row.value
    if row.low is not None and row.high is not None:
        left, right = (_percent(value / most * _LONGEST) for value in (row.low, row.high))
        said = f"{said} ({number(row.low, digits)} to {number(row.high, digits)})"
        ends = [(left, right, middle, middle), *((x, x, middle - 4, middle + 4) for x in (left, right))]
        whisker = "".join(_ends(kind, *places) for kind in ("under", "whisker") for places in ends)
        behind = max(row.high, row.value)
    value = f"{number(row.value, digits)}{unit}"
    x = _percent(behind / most * _LONGEST)
    return (
        f"<g><title>{escape(f'{row.label}: {said}')}</title>{label}"
        f'<rect x="0" y="{top + 18}" width="{_percent(end)}" height="{_BAR}" rx="2" style="fill:{ink(row.colour)}"/>{whisker}'
        f'<text class="label" x="{x}" dx="6" y="{middle + 4}">{escape(value)}</text></g>'
    )


def _ends(kind: str, x1: str, x2: str, y1: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{y1:g}" y2="{y2:g}"/>'


def stacked(title: str, rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], *, unit: str, digits: int = 1) -> str:
    """Horizontal bars of parts, a label above each and the sum behind it. rows: (label, a value of each name)."""
    most = max((sum(values) for _, values in rows), default=0.0) or 1.0
    parts = []
    for i, (label, values) in enumerate(rows):
        top, at = _ROW * i, 0.0
        parts.append(f'<text class="label" x="0" y="{top + 13}">{escape(label)}</text>')
        for colour, (name, value) in enumerate(zip(names, values, strict=True)):
            width = value / most * _LONGEST
            tip = escape(f"{label}, {name}: {number(value, digits)}{unit}")
            parts.append(
                f'<rect x="{_percent(at)}" y="{top + 18}" width="{_percent(width)}" height="{_BAR}" '
                f'style="fill:{ink(colour)}"><title>{tip}</title></rect>'
            )
            at += width
        total = escape(f"{number(sum(values), digits)}{unit}")
        parts.append(f'<text class="label" x="{_percent(at)}" dx="6" y="{top + 18 + _BAR / 2 + 4}">{total}</text>')
    return legend(names, shapes=False) + _svg(title, _ROW * len(rows) + 4, "".join(parts))


def lines(title: str, series: Sequence[Line], *, x: str, y: str, joined: bool = True, digits: int = 1) -> str:
    """Points, joined by lines or not, over y from zero. Joined points stand at even distances in the order of x, others to scale.

    x, y: what the axes show.
    """
    points = [point for line in series for point in line.points]
    places = _places(sorted({point[0] for point in points}), joined)
    ticks = _ticks(max((point[1] for point in points), default=1.0))
    bottom = _TOP + _PLOT
    parts = [_grid(ticks, bottom), f'<text class="muted" x="0" y="12">{escape(y)}</text>']
    for value, place in _chosen(places, joined):
        parts.append(f'<text class="tick" text-anchor="middle" x="{_percent(place)}" y="{bottom + 15}">{_plain(value)}</text>')
    parts.append(f'<text class="muted" text-anchor="end" x="100%" y="{bottom + 31}">{escape(x)}</text>')
    for line in series:
        at = [(places[px], bottom - py / ticks[-1] * _PLOT) for px, py in line.points]
        stroke = f'style="stroke:{ink(line.colour)}"'
        for (x1, y1), (x2, y2) in pairwise(at):
            ends = f'x1="{_percent(x1)}" y1="{y1:.1f}" x2="{_percent(x2)}" y2="{y2:.1f}"'
            parts.append(f'<line class="joint" {ends} {stroke}/>' if joined else "")
        for (px, py), (left, top) in zip(line.points, at, strict=True):
            tip = f"{line.name}: {_plain(px)} {x}, {number(py, digits)} {y}"
            size = 1.5 if not joined else 0.5 if len(line.points) > 24 else 1
            parts.append(_mark(line.colour, tip, f'x="{_percent(left)}" y="{top:.1f}"', size=size))
    names = [line.name for line in series]
    return legend(names, [line.colour for line in series]) + _svg(title, bottom + _FOOT, "".join(parts))


def columns(title: str, items: Sequence[Column], *, y: str, height: int = 110) -> str:
    """Vertical columns side by side; a box around them scrolls where they do not fit. y: what the axis shows."""
    ticks = _ticks(max((sum(value for value, _ in item.parts) for item in items), default=1.0), count=3)
    bottom, step = _TOP + height, _ACROSS / max(len(items), 1)
    parts = [_grid(ticks, bottom, height, right=True), f'<text class="muted" x="0" y="12">{escape(y)}</text>']
    for i, item in enumerate(items):
        top, rects = float(bottom), []
        for value, colour in item.parts:
            size = value / ticks[-1] * height
            top -= size
            rects.append(
                f'<rect x="{_percent(i * step)}" y="{top:.1f}" width="{_percent(step * 0.82)}" height="{size:.1f}" '
                f'style="fill:{ink(colour)}"/>'
            )
        body = f"<title>{escape(item.tip)}</title>{''.join(rects)}"
        link = f'<a href="{escape(item.href)}" tabindex="-1" data-round="{i + 1}">{body}</a>'
        parts.append(link if item.href else f"<g>{body}</g>")
    chart = _svg(title, bottom + 4, "".join(parts), least=7 * len(items))
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{chart}</div>'


def legend(names: Sequence[str], colours: Sequence[int] | None = None, *, shapes: bool = True) -> str:
    """Which mark or colour is whose."""
    items = []
    for i, name in enumerate(names):
        colour = i if colours is None else colours[i]
        mark = _mark(colour if shapes else -1, "", "", ink_of=colour)
        items.append(
            f'<li><svg class="key" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">{mark}</svg>{escape(name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(title: str, body: str, *, note: str = "", numbers: str = "") -> str:
    """A chart with its title, a sentence, and its numbers as a table that opens on request."""
    said = f"<p>{escape(note)}</p>" if note else ""
    behind = f"<details><summary>The numbers</summary>{numbers}</details>" if numbers else ""
    return f"<figure><figcaption><h3>{escape(title)}</h3>{said}</figcaption>{body}{behind}</figure>"


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]], *, words: Collection[int] = ()) -> str:
    """A table that scrolls inside its own box. words: columns of text, beside the first; all others are numbers."""
    texts = {0, *words}
    kinds = [' class="w"' if i in texts else ' class="n"' for i in range(len(headings))]
    head = "".join(f'<th scope="col"{kind}>{escape(text)}</th>' for text, kind in zip(headings, kinds, strict=True))
    body = []
    for row in rows:
        first, *others = (escape(cell) for cell in row)
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(others, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    label = escape(title)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole HTML page that asks for nothing from outside, and is not allowed to."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_style()}{style}</style></head>\n<body><main>{body}</main>{code}</body></html>\n"
    )


def _svg(title: str, height: float, body: str, *, least: int = 0) -> str:
    wide = f' style="min-width:{least}px"' if least else ""
    return f'<svg class="chart" width="100%" height="{height:g}" role="img" aria-label="{escape(title)}"{wide}>{body}</svg>'


def _mark(shape: int, tip: str, place: str, *, ink_of: int | None = None, size: float = 1) -> str:
    """shape: its number, which is also its colour unless ink_of says otherwise; -1 is a square that fills its box."""
    path = "M-6,-6h12v12h-12z" if shape < 0 else _SHAPES[(shape + shape // COLOURS) % len(_SHAPES)]
    scale = f' transform="scale({size:g})"' if size != 1 else ""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    drawn = f'<path d="{path}"{scale} style="fill:{ink(shape if ink_of is None else ink_of)}">{title}</path>'
    return f'<svg {place} class="mark" width="1" height="1">{drawn}</svg>' if place else drawn


def _grid(ticks: Sequence[float], bottom: int, height: int = _PLOT, *, right: bool = False) -> str:
    """Lines across, with their values above them: on the left, or on the right."""
    parts, place = [], 'x="100%" text-anchor="end"' if right else 'x="0"'
    for tick in ticks:
        y = bottom - tick / ticks[-1] * height
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" {place} y="{y - 3:.1f}">{_plain(tick)}</text>' if tick else "")
    return "".join(parts)


def _ticks(most: float, count: int = 4) -> list[float]:
    """From 0 in round steps to the first at or above `most`."""
    most = most if most > 0 and math.isfinite(most) else 1.0
    rough = most / count
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough * 0.999)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def _places(values: Sequence[float], even: bool) -> dict[float, float]:
    """Percentages across, of ascending values."""
    if len(values) < 2:
        return dict.fromkeys(values, (_FIRST + _LAST) / 2)
    span = _LAST - _FIRST
    if even:
        return {value: _FIRST + span * i / (len(values) - 1) for i, value in enumerate(values)}
    return {value: _FIRST + span * (value - values[0]) / (values[-1] - values[0]) for value in values}


def _chosen(places: dict[float, float], even: bool) -> list[tuple[float, float]]:
    """The values to write under an axis: eight at most, or both ends of one to scale."""
    found = list(places.items())
    if not even:
        return found[:: max(len(found) - 1, 1)]
    return found[:: math.ceil(len(found) / 8) or 1]


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.3g}"


def _percent(value: float) -> str:
    return f"{value:.2f}%"


def _style() -> str:
    def variables(colours: Sequence[str], tints: Sequence[str]) -> str:
        named = [(f"--c{i}", value) for i, value in enumerate(colours)] + [(f"--t{i}", value) for i, value in enumerate(tints)]
        return "".join(f"{name}:{value};" for name, value in named)

    light = "--bg:#fff;--fg:#1b1f24;--muted:#57606a;--line:#d0d7de;--panel:#f6f8fa;--link:#0a58ca;" + variables(
        _LIGHT, _LIGHT_TINTS
    )
    dark = "--bg:#0f1318;--fg:#e6edf3;--muted:#a3adb8;--line:#363e48;--panel:#181e25;--link:#7cb7ff;" + variables(
        _DARK, _DARK_TINTS
    )
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1160px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 8px}
h2{font-size:1.2rem;margin:36px 0 8px;padding-top:12px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:0}
p{margin:4px 0 10px;max-width:75ch}
a{color:var(--link)}
code{font:0.875em ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.muted,figcaption p,caption{color:var(--muted)}
figcaption p,details{font-size:.875rem}
.lead{font-size:1.05rem}
.grid2{display:grid;gap:0 16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));align-items:start}
.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr))}
figure{margin:0 0 16px;padding:14px;border:1px solid var(--line);border-radius:8px;min-width:0}
figcaption{margin-bottom:8px}
.scroll{overflow-x:auto;max-width:100%}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
svg.chart{display:block;overflow:visible}
svg text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--fg)}
svg text.label{paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
svg text.muted,svg text.tick{fill:var(--muted)}
svg text.tick{font-size:11px}
svg .grid{stroke:var(--line);stroke-width:1}
svg .reference{stroke:var(--fg);stroke-width:1;stroke-dasharray:3 3}
svg .under{stroke:var(--bg);stroke-width:4}
svg .whisker{stroke:var(--fg);stroke-width:1.5}
svg .joint{stroke-width:2}
svg .mark{overflow:visible}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:0 0 10px;padding:0;font-size:.8125rem}
.legend li{display:flex;align-items:center;gap:6px}
table{border-collapse:collapse;font-size:.875rem;width:100%}
caption{text-align:left;padding:4px 0}
th,td{padding:4px 12px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
th[scope=row]{font-weight:500;white-space:nowrap}
td.w{min-width:8em}
thead th,thead th.n{white-space:normal;vertical-align:bottom;min-width:5em}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:8px 0;font-size:.9375rem}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer;margin-top:8px;color:var(--link)}
@media(max-width:480px){figure{padding:10px}dl.facts{grid-template-columns:1fr}dl.facts dd{margin-bottom:6px}}
"""
