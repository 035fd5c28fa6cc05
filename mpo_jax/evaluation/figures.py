"""Numbers enter; pictures leave as SVG that stands in a page itself, in the page's own text colour, light or dark."""

import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpo_jax.evaluation import plots

_INK = "#010203"  # drawn with, then replaced by the page's text colour
_COLOURS = ("#3b82c4", "#d9772b", "#3f9e62", "#b5519c", "#8a7a2e", "#6d6ad1")
_DASHES = ("-", "--", ":", "-.")
"""Of lines; a colour that comes again has other dashes."""
_BOX, _GAP, _LANE = (128, 46), (52, 18), 8
"""Width and height of a stage's box, the space between boxes, and the height of an edge that passes by, pixels."""

Points = Sequence[tuple[float, float]]
_numbers = itertools.count()


def lines(curves: Mapping[str, Points], xlabel: str, ylabel: str, marker: str = "") -> str:
    """A line through each named run of (x, y) points."""
    from matplotlib import ticker

    figure, axes = plots.new(5.2, 3.0)
    for (dashes, colour), (name, points) in zip(
        itertools.cycle(itertools.product(_DASHES, _COLOURS)), curves.items(), strict=False
    ):
        shape = marker or ("o" if len(points) == 1 else "")
        hollow = dashes != _DASHES[0]
        axes.plot(
            *zip(*points, strict=True), label=name, color=colour, linestyle=dashes, marker=shape,
            markerfacecolor="none" if hollow else colour,
        )  # fmt: skip
    if xlabel == "step":
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure, f"{ylabel} against {xlabel}: {', '.join(curves)}")


def plane(curves: Mapping[str, Sequence[Mapping[str, Any]]], xlabel: str, ylabel: str, joined: bool = True) -> str:
    """Score against KL: a curve through each policy's points, with standard errors. points: "kl", "score", their
    "..._error" where known, and "final", which is drawn larger. joined: whether a line goes through a policy's points.
    """
    figure, axes = plots.new(7.2, 4.4)
    for (dashes, colour), (name, points) in zip(
        itertools.cycle(itertools.product(_DASHES, _COLOURS)), curves.items(), strict=False
    ):
        x, y = ([point[key] for point in points] for key in ("kl", "score"))
        errors = ([point.get(f"{key}_error", 0.0) for point in points] for key in ("kl", "score"))
        wide, high = errors
        ground = colour if dashes == _DASHES[0] else "none"
        axes.errorbar(
            x, y, xerr=wide, yerr=high, color=colour, linestyle=dashes if joined else "none", linewidth=1.4,
            elinewidth=0.8, marker="o", markersize=3.5, markerfacecolor=ground,
        )  # fmt: skip
        last = [point for point in points if point["final"]]
        axes.plot(
            [point["kl"] for point in last], [point["score"] for point in last], label=name, color=colour,
            linestyle="none", marker="D", markersize=8, markerfacecolor=ground,
        )  # fmt: skip
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure, f"{ylabel} against {xlabel}: {', '.join(curves)}")


def interval(mean: float, low: float, high: float, span: tuple[float, float], null: float) -> str:
    """An interval with its mean on a scale from span[0] to span[1], with a line at `null`, as wide as there is room."""

    def x(value: float) -> float:
        return 100 * (min(max(value, span[0]), span[1]) - span[0]) / (span[1] - span[0])

    return (
        '<svg class="interval" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="null" d="M{x(null):.2f} 0V20"/><path d="M{x(low):.2f} 10H{x(high):.2f}"/>'
        f'<path class="mean" d="M{x(mean):.2f} 10h0"/></svg>'
    )


def histogram(gap: np.ndarray, threshold: float, unit: str = "reward units") -> str:
    """Gaps, and the thresholds that part flipped, hard and easy pairs."""
    figure, axes = plots.new(5.2, 3.0)
    axes.hist(gap, bins=min(60, max(10, len(gap) // 20)), color=_COLOURS[0])
    for place in (-threshold, threshold):
        axes.axvline(place, color=_COLOURS[1], linestyle="--")
    axes.set_xlabel(f"gap: score of chosen − score of rejected, {unit}")
    axes.set_ylabel("pairs")
    return _svg(figure, f"Histogram of {len(gap)} gaps with the thresholds ±{threshold:.3g}")


def graph(sources: Mapping[str, Sequence[str]], kinds: Mapping[str, str]) -> str:
    """Stages as boxes, left to right after what they rest on. sources: of each stage, in an order they can run in."""
    place, lanes = _layout(sources)
    width = max(x for x, _ in place.values()) + _BOX[0] + 2
    height = max([y + _BOX[1] for _, y in place.values()] + list(lanes.values())) + 2
    parts = [
        f'<svg class="graph" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        'aria-label="The stages and what each rests on">'
    ]
    for name, above in sources.items():
        for source in (source for source in above if source in place):
            parts.append(f'<path d="{_edge(source, name, place, lanes)}"/>')
    for name, (x, y) in place.items():
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{_BOX[0]}" height="{_BOX[1]}" rx="8"/>'
            f'<text x="{x + _BOX[0] / 2:g}" y="{y + 20:g}">{html.escape(name)}</text>'
            f'<text class="kind" x="{x + _BOX[0] / 2:g}" y="{y + 36:g}">{html.escape(kinds[name])}</text>'
        )
    return "".join([*parts, "</svg>"])


def _layout(
    sources: Mapping[str, Sequence[str]],
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
                place[name] = (2.0 + level * (_BOX[0] + _GAP[0]), y)
            y += size + _GAP[1]
    top = min([y for _, y in place.values()] + list(lanes.values())) - 2
    return {name: (x, y - top) for name, (x, y) in place.items()}, {key: y - top for key, y in lanes.items()}


def _edge(source: str, target: str, place, lanes) -> str:
    """An SVG path from one box to another, on the source's lanes through the columns between them."""
    step, bend = _BOX[0] + _GAP[0], _GAP[0] * 0.7
    x, y = place[source][0] + _BOX[0], place[source][1] + _BOX[1] / 2
    end, height = place[target][0], place[target][1] + _BOX[1] / 2
    parts = [f"M{x:g} {y:g}"]
    while x < end:
        left = x + _GAP[0]
        following = height if left >= end else lanes[source, round((left - 2) / step)]
        parts.append(f"C{x + bend:g} {y:g} {left - bend:g} {following:g} {left:g} {following:g}")
        x, y = left, following
        if left < end:
            x = left + _BOX[0]
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
