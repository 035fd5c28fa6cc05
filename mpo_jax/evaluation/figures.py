"""Numbers enter; pictures leave as SVG that stands in a page itself, in the page's own text colour, light or dark."""

import html
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from markupsafe import Markup

from mpo_jax.evaluation import plots

_INK = "#010203"  # drawn with, then replaced by the page's text colour
_COLOURS = ("#3b82c4", "#c96a1e", "#379158", "#b5519c", "#8a7a2e", "#6d6ad1", "#d0524e", "#2b8f93")
"""With a contrast of 3 and more to the page's ground, light and dark."""
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Curves that stand in one figure differ in colour, dashes and marker, so that no reader has to tell colours apart."""
_MARKED, _FEW = 8, 3
"""Markers along a curve, about, and the curves whose legend has room inside the axes."""
_BOX, _GAP, _LANE, _LETTER, _LEAST = (128, 46), (52, 18), 8, 8.6, 0.75
"""Width (at least) and height of a stage's box, the space between boxes, the height of an edge that passes by, and a
letter's width, pixels; and the scale below which a graph is scrolled, not made smaller."""

Points = Sequence[tuple[float, float]]
_numbers = itertools.count()


class Drawn(Markup):
    """A figure as SVG, with a caption and the numbers that it shows: a row's cells stand under `columns`."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, svg: str, caption: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Self:
        made = cls(svg)
        made.caption, made.columns, made.rows = caption, tuple(columns), tuple(tuple(row) for row in rows)
        return made


def lines(
    curves: Mapping[str, Points],
    xlabel: str,
    ylabel: str,
    marker: str = "",
    levels: Mapping[str, float] | None = None,
) -> Drawn:
    """A line through each named run of (x, y) points. marker: not empty: each point is marked. levels: values with a
    name, each a horizontal line."""
    from matplotlib import ticker

    figure, axes = plots.new(5.2, 3.0)
    for number, (name, points) in enumerate(curves.items()):
        marked = marker or len(points) == 1 or len(curves) > 1
        axes.plot(
            *zip(*points, strict=True), label=name, markersize=5, **_style(number, bool(marked)),
            markevery=1 if marker else max(1, len(points) // _MARKED),
        )  # fmt: skip
    axes.margins(y=0.12 if levels else 0.05)  # room for the words above a level
    for name, level in (levels or {}).items():
        axes.axhline(level, color=_INK, linestyle=(0, (1, 2)), linewidth=1)
        axes.annotate(
            name, (0.99, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=_INK
        )
    if xlabel == "step":
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(curves) > _FEW:
        axes.legend(frameon=False, labelcolor=_INK, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    elif len(curves) > 1:
        axes.legend(frameon=False, labelcolor=_INK)
    rows = ((name, *point) for name, points in curves.items() for point in points)
    svg = _svg(figure, f"{ylabel} against {xlabel}: {', '.join(curves)}")
    return Drawn.of(svg, ylabel, ("curve", xlabel, ylabel), rows)


def _style(number: int, marked: bool) -> dict[str, Any]:
    """Of the curve with this number among those of a figure."""
    colour = _COLOURS[number % len(_COLOURS)]
    hollow = number >= len(_COLOURS) or number % 2 == 1
    return {
        "color": colour,
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)] if marked else "",
        "markerfacecolor": "none" if hollow else colour,
    }


def shares(
    rows: Sequence[Mapping[str, float]], expected: Points, xlabel: str, ylabel: str, expected_label: str, caption: str
) -> Drawn:
    """Shares with their intervals, and a dashed line of what was expected. rows: of x, share, low, high and pairs."""
    figure, axes = plots.new(5.2, 3.0)
    x, share, low, high = (np.array([row[key] for row in rows]) for key in ("x", "share", "low", "high"))
    reach = np.maximum(0, [share - low, high - share])  # rounding may leave it below
    axes.plot(*zip(*expected, strict=True), color=_COLOURS[1], linestyle="--", label=expected_label)
    axes.errorbar(x, share, yerr=reach, color=_COLOURS[0], marker="o", linestyle="none", capsize=3, label="observed")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, labelcolor=_INK)
    columns = ("x", "share", "low", "high", "pairs")
    svg = _svg(figure, f"{ylabel} against {xlabel}, with 95 % intervals, beside {expected_label}")
    return Drawn.of(svg, caption, columns, ([row[key] for key in columns] for row in rows))


def alone(drawn: Drawn) -> str:
    """A figure as a file of its own: its ink is black, since no page gives it another."""
    named = str.replace(drawn, "<svg ", '<svg color="#1d2430" ', 1)  # Markup's own would escape it
    return f'<?xml version="1.0" encoding="utf-8"?>\n{named}'


def plane(curves: Mapping[str, Sequence[Mapping[str, Any]]], xlabel: str, ylabel: str, joined: bool = True) -> Drawn:
    """Score against KL: a curve through each policy's points, with standard errors. points: "kl", "score", their
    "..._error" where known, and "final", which is drawn larger. joined: whether a line goes through a policy's points.
    """
    figure, axes = plots.new(7.2, 4.4)
    rows = []
    for number, (name, points) in enumerate(curves.items()):
        x, y, wide, high = (
            [point.get(key, 0.0) for point in points] for key in ("kl", "score", "kl_error", "score_error")
        )
        style = _style(number, True) | ({} if joined else {"linestyle": "none"})
        axes.errorbar(x, y, xerr=wide, yerr=high, linewidth=1.4, elinewidth=0.8, markersize=3.5, **style)
        last = [place for place, point in enumerate(points) if point["final"]]
        axes.plot(
            [x[place] for place in last], [y[place] for place in last], label=name, markersize=8,
            **style | {"linestyle": "none"},
        )  # fmt: skip
        rows += [(name, *each) for each in zip(x, wide, y, high, strict=True)]
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, labelcolor=_INK)
    svg = _svg(figure, f"{ylabel} against {xlabel}: {', '.join(curves)}")
    return Drawn.of(svg, f"{ylabel} at equal KL", ("policy", xlabel, "error of KL", ylabel, "error of score"), rows)


def interval(mean: float, low: float, high: float, span: tuple[float, float], null: float) -> str:
    """An interval with its mean on a scale from span[0] to span[1], with a line at `null`, as wide as there is room."""

    def x(value: float) -> float:
        return 100 * (min(max(value, span[0]), span[1]) - span[0]) / (span[1] - span[0])

    return (
        '<svg class="interval" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="null" d="M{x(null):.2f} 0V20"/><path d="M{x(low):.2f} 10H{x(high):.2f}"/>'
        f'<path class="mean" d="M{x(mean):.2f} 10h0"/></svg>'
    )


def histogram(gap: np.ndarray, threshold: float, unit: str = "reward units") -> Drawn:
    """Gaps, and the thresholds that part flipped, hard and easy pairs."""
    figure, axes = plots.new(5.2, 3.0)
    counts, edges, _ = axes.hist(gap, bins=min(60, max(10, len(gap) // 20)), color=_COLOURS[0])
    reach = max(float(np.abs(gap).max()), 1.2 * threshold)
    axes.set_xlim(-1.05 * reach, 1.05 * reach)
    axes.set_ylim(0, 1.15 * max(counts))  # room for the words above the bars
    for place in (-threshold, threshold):
        axes.axvline(place, color=_COLOURS[1], linestyle="--")
    for place, word in ((-(threshold + reach) / 2, "flipped"), (0, "hard"), ((threshold + reach) / 2, "easy")):
        axes.text(place, 1.09 * max(counts), word, ha="center", va="center", color=_INK)
    axes.set_xlabel(f"gap: score of chosen − score of rejected, {unit}")
    axes.set_ylabel("pairs")
    svg = _svg(figure, f"Histogram of {len(gap)} gaps with the thresholds ±{threshold:.3g}")
    return Drawn.of(svg, "gaps", ("from", "to", "pairs"), zip(edges[:-1], edges[1:], counts, strict=True))


def graph(sources: Mapping[str, Sequence[str]], kinds: Mapping[str, str]) -> str:
    """Stages as boxes, left to right after what they rest on. sources: of each stage, in an order they can run in."""
    box = max(_BOX[0], _LETTER * max(map(len, sources), default=0) + 2 * _LANE)
    place, lanes = _layout(sources, box)
    width = max(x for x, _ in place.values()) + box + 2
    height = max([y + _BOX[1] for _, y in place.values()] + list(lanes.values())) + 2
    parts = [
        f'<svg class="graph" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'style="min-width:{_LEAST * width:.0f}px" '
        'aria-label="The stages and their inputs">'
    ]
    for name, above in sources.items():
        for source in (source for source in above if source in place):
            parts.append(f'<path d="{_edge(source, name, place, lanes, box)}"/>')
    for name, (x, y) in place.items():
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{box:g}" height="{_BOX[1]}" rx="8"/>'
            f'<text x="{x + box / 2:g}" y="{y + 20:g}">{html.escape(name)}</text>'
            f'<text class="kind" x="{x + box / 2:g}" y="{y + 36:g}">{html.escape(kinds[name])}</text>'
        )
    return "".join([*parts, "</svg>"])


def _layout(
    sources: Mapping[str, Sequence[str]], box: float
) -> tuple[dict[str, tuple[float, float]], dict[tuple[str, int], float]]:
    """Where each stage's box begins, and the height of the lanes, by source and column, on which edges to later columns
    pass between boxes."""
    depth: dict[str, int] = {}
    last: dict[str, int] = {}
    for name in sources:
        known = [source for source in sources[name] if source in depth]
        depth[name] = max((depth[source] + 1 for source in known), default=0)
        last |= {source: max(last.get(source, 0), depth[name]) for source in known}
    middle: dict[str, float] = {}  # of a stage, or of its lane in the column before
    place, lanes = {}, {}
    for level in range(max(depth.values()) + 1):
        items = [(name, _BOX[1]) for name in sources if depth[name] == level]
        items += [(name, _LANE) for name in sources if depth[name] < level < last.get(name, 0)]

        def beside(item: tuple[str, int]) -> float:
            """The mean height of what an item rests on; a lane goes straight on."""
            above = [item[0]] if item[1] == _LANE else [source for source in sources[item[0]] if source in middle]
            return sum(middle[source] for source in above) / len(above) if above else 0.0

        items.sort(key=beside)
        y = -(sum(size for _, size in items) + _GAP[1] * (len(items) - 1)) / 2
        for name, size in items:
            middle[name] = y + size / 2
            if size == _LANE:
                lanes[name, level] = middle[name]
            else:
                place[name] = (2.0 + level * (box + _GAP[0]), y)
            y += size + _GAP[1]
    top = min([y for _, y in place.values()] + list(lanes.values())) - 2
    return {name: (x, y - top) for name, (x, y) in place.items()}, {key: y - top for key, y in lanes.items()}


def _edge(source: str, target: str, place, lanes, box: float) -> str:
    """An SVG path from one box to another, on the source's lanes through the columns between them."""
    step, bend = box + _GAP[0], _GAP[0] * 0.7
    x, y = place[source][0] + box, place[source][1] + _BOX[1] / 2
    end, height = place[target][0], place[target][1] + _BOX[1] / 2
    parts = [f"M{x:g} {y:g}"]
    while x < end:
        left = x + _GAP[0]
        following = height if left >= end else lanes[source, round((left - 2) / step)]
        parts.append(f"C{x + bend:g} {y:g} {left - bend:g} {following:g} {left:g} {following:g}")
        x, y = left, following
        if left < end:
            x = left + box
            parts.append(f"H{x:g}")
    return "".join(parts)


def _svg(figure, label: str) -> str:
    """The figure without a background; ids are made unique, since many figures stand in one page."""
    from matplotlib import pyplot, rc_context

    for axes in figure.axes:
        axes.tick_params(colors=_INK)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(_INK)
    held = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(held, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    text = held.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    prefix = f"f{next(_numbers)}-"
    text = (
        re.sub(r'\bid="', f'id="{prefix}', text)
        .replace("url(#", f"url(#{prefix}")
        .replace('href="#', f'href="#{prefix}')
    )
    text = text.replace(_INK, "currentColor")
    return text.replace("<svg", f'<svg class="plot" role="img" aria-label="{html.escape(label, quote=True)}"', 1)
