"""Numbers enter; pictures leave as SVG that stands in a page itself, in the page's own text colour, light or dark."""

import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mpo_jax.evaluation import plots

_INK = "#010203"  # drawn with, then replaced by the page's text colour
_COLOURS = ("#3b82c4", "#d9772b", "#3f9e62", "#b5519c", "#8a7a2e", "#6d6ad1")
_BOX, _GAP = (128, 46), (52, 18)
"""Width and height of a stage's box, and the space between boxes, pixels."""

Points = Sequence[tuple[float, float]]
_numbers = itertools.count()


def lines(curves: Mapping[str, Points], xlabel: str, ylabel: str, marker: str = "") -> str:
    """A line through each named run of (x, y) points."""
    figure, axes = plots.new(5.2, 3.0)
    for colour, (name, points) in zip(itertools.cycle(_COLOURS), curves.items(), strict=False):
        axes.plot(
            *zip(*points, strict=True), label=name, color=colour, marker=marker or ("o" if len(points) == 1 else "")
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure, f"{ylabel} against {xlabel}: {', '.join(curves)}")


def histogram(gap: np.ndarray, threshold: float) -> str:
    """Reward gaps, and the thresholds that part flipped, hard and easy pairs."""
    figure, axes = plots.new(5.2, 3.0)
    axes.hist(gap, bins=min(60, max(10, len(gap) // 20)), color=_COLOURS[0])
    for place in (-threshold, threshold):
        axes.axvline(place, color=_COLOURS[1], linestyle="--")
    axes.set_xlabel("gap: score of chosen − score of rejected, reward units")
    axes.set_ylabel("pairs")
    return _svg(figure, f"Histogram of {len(gap)} reward gaps with the thresholds ±{threshold:.3g}")


def graph(sources: Mapping[str, Sequence[str]], kinds: Mapping[str, str]) -> str:
    """Stages as boxes, left to right after what they rest on. sources: of each stage, in an order they can run in."""
    depth: dict[str, int] = {}
    for name in sources:
        depth[name] = max((depth[source] + 1 for source in sources[name] if source in depth), default=0)
    columns = [[name for name in sources if depth[name] == level] for level in range(max(depth.values()) + 1)]
    rows = max(map(len, columns))
    width, height = _BOX[0] + _GAP[0], _BOX[1] + _GAP[1]
    place = {
        name: (2 + level * width, 2 + (row + (rows - len(column)) / 2) * height)
        for level, column in enumerate(columns)
        for row, name in enumerate(column)
    }
    total = len(columns) * width - _GAP[0] + 4, rows * height - _GAP[1] + 4
    parts = [
        f'<svg class="graph" viewBox="0 0 {total[0]} {total[1]}" width="{total[0]}" height="{total[1]}" role="img" '
        'aria-label="The stages and what each rests on">'
    ]
    for name, above in sources.items():
        for source in (source for source in above if source in place):
            x0, y0 = place[source][0] + _BOX[0], place[source][1] + _BOX[1] / 2
            x1, y1 = place[name][0], place[name][1] + _BOX[1] / 2
            bend = _GAP[0] * 0.7
            parts.append(f'<path d="M{x0} {y0}C{x0 + bend} {y0} {x1 - bend} {y1} {x1} {y1}"/>')
    for name, (x, y) in place.items():
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_BOX[0]}" height="{_BOX[1]}" rx="8"/>'
            f'<text x="{x + _BOX[0] / 2}" y="{y + 20}">{html.escape(name)}</text>'
            f'<text class="kind" x="{x + _BOX[0] / 2}" y="{y + 36}">{html.escape(kinds[name])}</text>'
        )
    return "".join([*parts, "</svg>"])


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
