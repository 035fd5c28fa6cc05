"""Device scalars enter, a step at a time; `metrics.jsonl`, TensorBoard events and a progress bar leave.

A step's scalars are read when the next step's are handed over, so that the loop never waits for the device. Only
process 0 writes.
"""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

FILE = "metrics.jsonl"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled = [0]


class MetricsWriter:
    """Writes the metrics of one stage into its folder.

    start: the step that the run resumes from: lines of later steps, left by a killed run, are cut away. total: steps of
    the whole run, for the progress bar. wandb: log to Weights & Biases too, where it is installed.
    """

    def __init__(self, folder: epath.PathLike, start: int = 0, total: int | None = None, wandb: bool = False):
        self._folder = epath.Path(folder)
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self.last: tuple[int, dict[str, float]] | None = None
        self._own = jax.process_index() == 0
        self._events = self._wandb = None
        if not self._own:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        cut_to(self._folder, start)
        self._lines = (self._folder / FILE).open("a")
        if "://" not in str(folder):
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._folder / "events"), purge_step=start + 1 if start else None)
        if wandb:
            import wandb as wandb_module

            self._wandb = wandb_module.init(dir=str(self._folder), name=self._folder.name, resume="allow")
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=None if total else True,
            file=sys.stderr,
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Hands over a step's scalars; those handed over before are read and written now."""
        before, self._waiting = self._waiting, (step, dict(values))
        if before is not None:
            self._put(*before)

    def write_now(self, step: int, values: Mapping[str, Any]) -> None:
        """Reads and writes at once, after all handed over before: for evaluations, which have waited anyway."""
        self.flush()
        self._put(step, values, is_step=False)

    def flush(self) -> None:
        """Reads and writes what is still waiting."""
        before, self._waiting = self._waiting, None
        if before is not None:
            self._put(*before)

    def close(self) -> None:
        self.flush()
        if self._own:
            self._lines.close()
            self._bar.close()
            if self._events is not None:
                self._events.close()
            if self._wandb is not None:
                self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        elif self._own:
            self._lines.close()
            self._bar.close()

    def _put(self, step: int, values: Mapping[str, Any], is_step: bool = True) -> None:
        found = {name: float(value) for name, value in jax.device_get(dict(values)).items()}
        if is_step:
            self.last = step, found
        if not self._own:
            return
        # JSON has no NaN: a value that is not finite is written as text.
        shown = {name: value if math.isfinite(value) else str(value) for name, value in found.items()}
        self._lines.write(json.dumps({"step": step} | shown) + "\n")
        self._lines.flush()
        for name, value in found.items():
            if self._events is not None:
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(found, step=step)
        if is_step:
            self._progress(step, found)

    def _progress(self, step: int, found: dict[str, float]) -> None:
        shown: dict[str, str] = {
            name: f"{found[name]:.4f}" for name in ("loss", "accuracy", "padding_efficiency") if name in found
        }
        if "tokens" in found and found.get("seconds"):
            shown["tokens/s"] = f"{found['tokens'] / found['seconds']:,.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)


def cut_to(folder: epath.PathLike, step: int) -> None:
    """Drops the lines of steps after `step`, and a last line that a kill left incomplete."""
    path = epath.Path(folder) / FILE
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if (row := _parse(line)) and row["step"] <= step]
    temporary = path.parent / f".{FILE}.cut"
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)


def read(folder: epath.PathLike) -> list[dict[str, float]]:
    """All complete lines of a stage's metrics, in order."""
    path = epath.Path(folder) / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for line in lines if (row := _parse(line)) is not None]


def curve(folder: epath.PathLike, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, wherever it was written."""
    return [(int(row["step"]), float(row[name])) for row in read(folder) if name in row]


def compiles() -> int:
    """Programs this process has compiled since the first call; a step that adds to it after warm-up is a bug."""
    if not _compiled[1:]:
        _compiled.append(1)
        jax.monitoring.register_event_duration_secs_listener(_count)
    return _compiled[0]


def _count(event: str, duration_secs: float, **_) -> None:
    _compiled[0] += event == _COMPILE_EVENT


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
