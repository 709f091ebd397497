"""The plots of the study, as SVG in the colours of the report, light and dark."""

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from study_runs import METHODS, STEPS, TASKS
from study_tables import Line, Lines, contrast, last_value, of_seeds, verdict

STYLE = Path(__file__).resolve().parents[1] / "megatron_tropd" / "report" / "page.css"
COLOURS = ("gray", "teacher", "outlier", "gold", "trusted", "violet")
DRAWN = (
    "OPD",
    "OPD, exact",
    "TrOPD, as published",
    "TrOPD, no guidance",
    "TrOPD, clip",
    "TrOPD, exact",
)
"""Methods with a curve, in the order of ``COLOURS``."""
WIDTH, PANEL, ROW = 760, 168, 19
WORDS = {"better": "var(--good)", "worse": "var(--bad)", "not told apart": "var(--gray)"}


def drawings(lines: Lines) -> dict[str, str]:
    """File name -> SVG of what the lines have."""
    return {"study-differences.svg": differences(lines), "study-curves.svg": curves(lines)}


def differences(lines: Lines) -> str:
    """Every method's difference to OPD at the end, with its interval, a panel for each measure."""
    parts, top = [], 0
    for task in TASKS:
        found = [
            (method, [contrast(lines, task, method, "OPD", value) for value, _ in _measures(task)])
            for method in METHODS
            if method != "OPD"
        ]
        rows = [(method, of) for method, of in found if of[0]]
        if rows:
            parts.append(_text(0, top + 16, f"{task}: difference to OPD", "title"))
            for panel, (_, name) in enumerate(_measures(task)):
                values = [(method, of[panel][1]) for method, of in rows]
                larger = name == "accuracy"
                left = 190 + panel * 308
                parts += _forest(values, name, larger, left, top + 26, names=panel == 0)
            top += 66 + ROW * len(rows)
    return _document(parts, top, "Differences to OPD with 95 % intervals")


def _measures(task: str) -> list[tuple[Callable[[Line], float], str]]:
    if TASKS[task].larger_is_better:
        return [(last_value, "accuracy"), (lambda line: line["reverse_kl"], "reverse KL")]
    return [(last_value, "held-out reverse KL")]


def _forest(
    rows: Sequence[tuple[str, tuple[float, float, float]]],
    name: str,
    larger: bool,
    left: int,
    top: int,
    names: bool,
) -> Iterator[str]:
    width, bottom = 250, top + 12 + ROW * len(rows)
    ticks = _ticks(*_span([value for _, found in rows for value in (*found, 0.0)]))
    place = _scale(ticks[0], ticks[-1], left, left + width)
    for tick in ticks:
        kind = "axis" if tick == 0 else "gridline"
        yield _line(place(tick), top, place(tick), bottom, kind)
        yield _text(place(tick), bottom + 14, f"{tick:+g}" if tick else "0", "middle")
    yield _text(
        left + width, bottom + 28, f"{name}, {'larger' if larger else 'smaller'} is better", "end"
    )
    for at, (method, found) in enumerate(rows):
        y = top + 12 + ROW * at
        colour = WORDS[verdict(found, larger)]
        if names:
            yield _text(left - 14, y + 4, method, "end")
        low, high = place(found[1]), place(found[2])
        yield f'<path d="M{low:.1f} {y}H{high:.1f}" style="stroke:{colour}" stroke-width="2"/>'
        yield f'<circle cx="{place(found[0]):.1f}" cy="{y}" r="3.6" style="fill:{colour}"/>'


def curves(lines: Lines) -> str:
    """Means over the seeds along the way, a row for each task."""
    shown = [m for m in DRAWN if any(of_seeds(lines, task, m) for task in TASKS)]
    parts, top = [_legend(shown)], 24
    for task in TASKS:
        held_out = _curves_of(lines, task, _held_out)
        if not held_out:
            continue
        name = "accuracy" if TASKS[task].larger_is_better else "held-out reverse KL"
        parts.append(_text(0, top + 16, task, "title"))
        parts += _panel(held_out, name, 44, top + 26)
        parts += _panel(
            _curves_of(lines, task, _divergence), "reverse KL of samples", 424, top + 26
        )
        top += PANEL + 66
    return _document(parts, top, "Accuracy and divergence along the way")


Points = list[tuple[float, float]]


def _held_out(line: Line) -> Points:
    return [(step, value) for step, value in line["curve"]]


def _divergence(line: Line) -> Points:
    tenths = line["reverse_kl_curve"]
    return [((at + 0.5) * STEPS / len(tenths), value) for at, value in enumerate(tenths)]


def _curves_of(lines: Lines, task: str, points: Callable[[Line], Points]) -> dict[str, Points]:
    found = {}
    for method in DRAWN:
        if each := [points(line) for line in of_seeds(lines, task, method).values()]:
            found[method] = [
                (at[0][0], statistics.fmean(value for _, value in at))
                for at in zip(*each, strict=True)
            ]
    return found


def _panel(found: dict[str, Points], name: str, left: int, top: int) -> Iterator[str]:
    width, bottom = 316, top + PANEL
    values = [value for points in found.values() for _, value in points]
    ticks = _ticks(*_span(values))
    x, y = _scale(0, STEPS, left, left + width), _scale(ticks[0], ticks[-1], bottom, top)
    for tick in ticks:
        yield _line(left, y(tick), left + width, y(tick), "gridline")
        yield _text(left - 8, y(tick) + 4, f"{tick:g}", "end")
    yield _line(left, bottom, left + width, bottom, "axis")
    for step in range(0, STEPS + 1, STEPS // 5):
        yield _text(x(step), bottom + 15, str(step), "middle")
    yield _text(left + width, bottom + 30, f"{name}, by step", "end")
    for method, points in found.items():
        path = "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value in points)
        yield f'<path d="M{path}" class="curve" style="stroke:{_colour(method)}"/>'


def _legend(methods: Sequence[str]) -> str:
    parts, left = [], 0.0
    for method in methods:
        parts.append(
            f'<rect x="{left:.0f}" y="6" width="14" height="3" style="fill:{_colour(method)}"/>'
        )
        parts.append(_text(left + 20, 12, method, ""))
        left += 42 + 6.2 * len(method)
    return "".join(parts)


def _colour(method: str) -> str:
    return f"var(--{COLOURS[DRAWN.index(method)]})"


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below ``low`` to above ``high``, some five."""
    step = next(
        size * 10.0**power
        for power in range(-4, 4)
        for size in (1, 2, 5)
        if size * 10.0**power * 5 >= high - low
    )
    first, last = int(low // step), -int(-high // step)
    return [round(at * step, 6) for at in range(first, max(last, first + 1) + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _text(x: float, y: float, text: str, kind: str) -> str:
    anchor = f' text-anchor="{kind}"' if kind in ("middle", "end") else ""
    title = ' class="title"' if kind == "title" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{anchor}{title}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _document(parts: Sequence[str], height: int, title: str) -> str:
    light, dark = re.findall(r":root[^{]*\{(.*?)\}", STYLE.read_text(), re.DOTALL)[:2]
    style = (
        f"svg{{{_variables(light)}}}@media (prefers-color-scheme:dark){{svg{{{_variables(dark)}}}}}"
        "text{font:12px system-ui,-apple-system,'Segoe UI','Liberation Sans',sans-serif;"
        "fill:var(--muted)}.title{font-size:14px;font-weight:640;fill:var(--ink)}"
        ".gridline{stroke:var(--line)}.axis{stroke:var(--faint)}"
        ".curve{fill:none;stroke-width:2.1;stroke-linejoin:round}"
    )
    size = f'viewBox="-8 -8 {WIDTH + 16} {height + 16}" width="{WIDTH + 16}"'
    body = "\n".join(
        ["<rect x='-8' y='-8' width='100%' height='100%' style='fill:var(--card)'/>", *parts]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
        f'aria-label="{title}">\n<style>{style}</style>\n{body}\n</svg>\n'
    )


def _variables(block: str) -> str:
    used = (
        r"--(?:card|ink|muted|faint|line|trusted|outlier|teacher|violet|gold|gray|good|bad):[^;]*;"
    )
    return "".join(re.findall(used, block)).replace(" ", "")
