"""A piece of work on a GPU enters; the kernels that it spends its time in leave, the longest first.

Names are grouped without their numbers: fusion_12 and fusion_7 of a program stay apart, the launches of one are summed.
"""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def measured(once: Callable[[], Any], most: int = 25) -> dict[str, Any]:
    """seconds: of all kernels. idle: seconds between the first and the last in which none ran. kernels: name, seconds,
    launches."""
    with tempfile.TemporaryDirectory(prefix="trace_") as folder:
        with jax.profiler.trace(folder):
            once()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return summary(jax.profiler.ProfileData.from_file(str(path)), most)


def summary(profile, most: int) -> dict[str, Any]:
    total: dict[str, float] = collections.Counter()
    launches: dict[str, int] = collections.Counter()
    spans = []
    for plane in profile.planes:
        if "/device:GPU" not in plane.name:
            continue
        for stream in plane.lines:
            if not stream.name.startswith("Stream"):
                continue
            for event in stream.events:
                total[_short(event.name)] += event.duration_ns / 1e9
                launches[_short(event.name)] += 1
                spans.append((event.start_ns, event.start_ns + event.duration_ns))
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = (end - min(start for start, _ in spans)) / 1e9 if spans else 0.0
    longest = sorted(total, key=lambda name: -total[name])[:most]
    return {
        "seconds": sum(total.values()),
        "idle": whole - busy / 1e9,
        "kernels": [[name, total[name], launches[name]] for name in longest],
    }


def _short(name: str) -> str:
    return re.sub(r"\s+", " ", name)[:100]
