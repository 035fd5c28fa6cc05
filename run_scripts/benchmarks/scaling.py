"""A shape and a dtype enter; a table and a plot leave of how time and memory grow, beside the expected law.

Each point is a fresh process, so that memory is its own. The law counts multiply-adds (products with weights, and
attention over all columns of a row) and is anchored at an axis's first point.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_scripts.benchmarks.programs import PAIRS, SAMPLER_ROWS, SHAPES, VOCABULARY, Case

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Axis:
    """What grows: a step, the flag, its values, and the law of its time."""

    what: str
    flag: str
    values: tuple[int, ...]
    law: Callable[[Case], float]
    expected: str


def train_work(case: Case) -> float:
    """Multiply-adds of a DPO step: three passes of the policy and one of the reference, over P + 2R tokens a pair."""
    width, layers, _, mlp = SHAPES[case.shape]
    layers = case.layers or layers
    tokens = case.prompt + 2 * case.response
    trunk = tokens * layers * (4 * width**2 + 3 * width * mlp + 2 * tokens * width)
    return 4.0 * (case.rows or PAIRS) * (trunk + 2 * case.response * width * VOCABULARY)


def sample_work(case: Case) -> float:
    """Multiply-adds of sampling: the prompt once, each reply's tokens over the prompt and its own slots."""
    width, layers, _, mlp = SHAPES[case.shape]
    layers = case.layers or layers
    weights = layers * (4 * width**2 + 3 * width * mlp)
    prompt = case.prompt * (weights + 2 * layers * case.prompt * width)
    step = weights + width * VOCABULARY + 2 * layers * (case.prompt + case.response) * width
    return float((case.rows or SAMPLER_ROWS) * (prompt + case.samples * case.response * step))


AXES = (
    Axis("dpo", "layers", (2, 4, 8), train_work, "a constant (the output matrix) and a line"),
    Axis("dpo", "prompt", (32, 128, 512), train_work, "a line, bent up by attention; P counts once a pair"),
    Axis("dpo", "response", (32, 64, 128, 256), train_work, "a line, bent up by attention"),
    Axis("sample", "samples", (1, 2, 4), sample_work, "a line in N after one prefill"),
    Axis("dpo", "devices", (1, 2, 4), train_work, "flat: virtual devices share the cores"),
)


def run(shape: str, dtype: str, runs: int, target: Path) -> list[dict[str, Any]]:
    """Measures every point, writes `target`.json, .md and .png, and returns the rows."""
    rows: list[dict[str, Any]] = []
    for axis in AXES:
        anchor: dict[str, Any] | None = None
        for value in axis.values:
            found = _point(axis, value, shape, dtype, runs)
            case = _case(axis, value, shape, dtype)
            memory = max(found["temporaries_MiB"].values())
            anchor = anchor or {"seconds": found["best"], "work": axis.law(case)}
            rows.append(
                {
                    "what": axis.what,
                    "axis": axis.flag,
                    "value": value,
                    "seconds": found["best"],
                    "expected_seconds": anchor["seconds"] * axis.law(case) / anchor["work"],
                    "peak_rss_MiB": found["peak_rss_MiB"],
                    "temporaries_MiB": memory,
                    "law": axis.expected,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    target.with_suffix(".md").write_text(table(rows))
    plot(rows, target.with_suffix(".png"))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = "| work | grows | to | seconds | by the law | peak MiB | temporaries MiB |\n| --- " + "| ---: " * 6 + "|\n"
    lines = (
        f"| {row['what']} | {row['axis']} | {row['value']} | {row['seconds']:.3g} | {row['expected_seconds']:.3g} "
        f"| {row['peak_rss_MiB']:.0f} | {row['temporaries_MiB']:.0f} |\n"
        for row in rows
    )
    return head + "".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each axis: seconds measured and by the law, temporaries on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(3.4 * len(AXES), 3.2), layout="constrained")
    for axis, panel in zip(AXES, panels, strict=True):
        own = [row for row in rows if (row["what"], row["axis"]) == (axis.what, axis.flag)]
        values = [row["value"] for row in own]
        panel.plot(values, [row["seconds"] for row in own], "o-", color="#1f6fb4", label="measured")
        panel.plot(values, [row["expected_seconds"] for row in own], "--", color="#1f6fb4", alpha=0.5, label="law")
        panel.set(title=f"{axis.what}: {axis.flag}", xlabel=axis.flag, xticks=values)
        panel.set_ylim(bottom=0)
        memory = panel.twinx()
        memory.plot(values, [row["temporaries_MiB"] for row in own], "s:", color="#c0504d", label="temporaries")
        memory.set_ylim(bottom=0)
        memory.tick_params(axis="y", colors="#c0504d")
        if panel is panels[0]:
            panel.set_ylabel("seconds")
            handles = panel.get_legend_handles_labels()[0] + memory.get_legend_handles_labels()[0]
            panel.legend(handles, ["measured", "law", "temporaries"], fontsize=8, loc="lower right")
        if panel is panels[-1]:
            memory.set_ylabel("MiB", color="#c0504d")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _case(axis: Axis, value: int, shape: str, dtype: str) -> Case:
    case = Case(shape=shape, dtype=dtype)
    return case if axis.flag == "devices" else dataclasses.replace(case, **{axis.flag: value})


def _point(axis: Axis, value: int, shape: str, dtype: str, runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "run_scripts" / "bench.py"), f"--what={axis.what}", f"--shape={shape}"]
        command += [f"--dtype={dtype}", f"--runs={runs}", f"--{axis.flag}={value}", f"--json={result}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {axis.what} with {axis.flag}={value}: {done.stderr[-500:]}")
        return json.loads(result.read_text())
