"""Tables enter; PNG files leave. Drawn without a display."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mpo_jax import artifacts


def save(path: epath.PathLike, figure) -> None:
    """Writes a figure as PNG, whole or not at all, and closes it."""
    from matplotlib import pyplot

    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=120, bbox_inches="tight")
    artifacts.write_bytes(path, held.getvalue())
    pyplot.close(figure)


def new(width: float = 6.0, height: float = 3.6) -> tuple[Any, Any]:
    """A figure with one pair of axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.grid(alpha=0.3)
    return figure, axes


def gap_histogram(path: epath.PathLike, gap: np.ndarray, threshold: float, unit: str) -> None:
    """Gaps, with the thresholds that part flipped, hard and easy pairs."""
    figure, axes = new()
    axes.hist(gap, bins=min(60, max(10, len(gap) // 20)), color="#4878a8")
    for place in (-threshold, threshold):
        axes.axvline(place, color="#b04030", linestyle="--")
    top = 1.15 * axes.get_ylim()[1]  # room for the words above the bars
    axes.set_ylim(0, top)
    edge = max(float(np.abs(gap).max()), threshold * 1.2)
    axes.set_xlim(-edge * 1.05, edge * 1.05)
    for place, word in ((-(threshold + edge) / 2, "flipped"), (0, "hard"), ((threshold + edge) / 2, "easy")):
        axes.text(place, top * 0.97, word, ha="center", va="top", bbox={"color": "white", "alpha": 0.7})
    axes.set_xlabel(f"gap: score of chosen − score of rejected, {unit}")
    axes.set_ylabel("pairs")
    save(path, figure)


def easy_share(path: epath.PathLike, gap: np.ndarray, threshold: float, unit: str) -> None:
    """What share of the pairs each threshold would call easy, and flipped."""
    figure, axes = new()
    places = np.linspace(0, max(float(np.abs(gap).max()), threshold), 200)
    axes.plot(places, [(gap >= place).mean() for place in places], label="easy (gap ≥ γ)", color="#4878a8")
    axes.plot(places, [(gap <= -place).mean() for place in places], label="flipped (gap ≤ −γ)", color="#b04030")
    axes.axvline(threshold, color="black", linestyle="--", label=f"γ = {threshold:.3g}")
    axes.set_xlabel(f"threshold γ, {unit}")
    axes.set_ylabel("share of pairs")
    axes.set_ylim(0, 1)
    axes.legend()
    save(path, figure)


def bars(
    path: epath.PathLike,
    labels: Sequence[str],
    shares: Sequence[float],
    counts: Sequence[int],
    xlabel: str,
    ylabel: str,
) -> None:
    """A bar for each label: a share of `counts` things, with its standard error, and a line at chance, 0.5."""
    figure, axes = new()
    errors = [np.sqrt(share * (1 - share) / max(count, 1)) for share, count in zip(shares, counts, strict=True)]
    axes.bar(range(len(labels)), shares, yerr=errors, color="#4878a8", ecolor="#404040", capsize=3, zorder=2)
    axes.axhline(0.5, color="black", linestyle="--", zorder=3)
    long = max(map(len, labels)) > 3
    axes.set_xticks(range(len(labels)), labels, rotation=45 if long else 0, ha="right" if long else "center")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(0, 1.05)
    save(path, figure)
