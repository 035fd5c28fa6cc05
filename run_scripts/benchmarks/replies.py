"""A model and prompts enter; what replies of unlike lengths cost leaves, three ways, alternating in one process.

waiting: a batch decodes to the end of its longest reply, as samplers do that know no better. fewer: what is left of a
batch goes on in ever fewer rows, as a rollout's does. in_turn: waiting prompts take the places of rows that are done,
as stages sample.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax import decoding, metrics, sampling
from mpo_jax.data.loader import Loader
from mpo_jax.models import decoder
from mpo_jax.sampling import SamplingConfig
from mpo_jax.stages import candidates
from mpo_jax.types import Batch
from run_scripts.benchmarks.programs import SAMPLER_ROWS, Case, frozen, random_rows

PROMPTS = 256


def run(case: Case, mesh, runs: int, warm: int = 1) -> dict[str, Any]:
    """Medians over `runs` of each way. best: seconds in turn. ratio, ratio_cpu: waiting over the other ways, wall and
    processor time. decoded: rows times steps, beside those that the replies need."""
    model, rows = case.model(mesh), case.rows or SAMPLER_ROWS
    settings = SamplingConfig(max_new_tokens=case.response, n=case.samples, stop_ids=case.stop_ids())
    count = max(PROMPTS // rows, 1) * rows
    encoded = random_rows(dataclasses.replace(case, rows=count), count, 0)
    several, one = (Loader(encoded, size, form="slots", mesh=mesh, shuffle=False) for size in (count, rows))
    batches = [one.batch(step) for step in range(one.steps_per_epoch)]
    weights = frozen(model, mesh, 0)
    wait = jax.jit(functools.partial(_waiting, model, settings))
    turns = jax.jit(functools.partial(sampling.counted, model, settings, rows=rows))
    fewer = jax.jit(functools.partial(sampling.counted, model, settings))

    def each(draw: Callable) -> list[Any]:
        return [jax.device_get(draw(weights, batch, np.int32(0), np.int32(0))) for batch in batches]

    ways = {
        "waiting": lambda: each(wait),
        "fewer": lambda: each(fewer),
        "in_turn": lambda: [jax.device_get(turns(weights, several.batch(0), np.int32(0), np.int32(0)))],
    }
    metrics.compiles()
    replies, decoded, first = {}, {}, {}
    for name, way in ways.items():
        began = time.perf_counter()
        found = way()
        first[name] = time.perf_counter() - began
        replies[name] = [
            ids.tolist() for rollout, _ in found for row in candidates.reply_tokens(rollout, settings) for ids in row
        ]
        decoded[name] = int(sum(work for _, work in found))
    for _ in range(warm - 1):
        for way in ways.values():
            way()
    compiled = metrics.compiles()
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            began, busy = time.perf_counter(), time.process_time()
            way()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - busy)
    late = metrics.compiles() - compiled
    lens = np.array([len(ids) for ids in replies["waiting"]]).reshape(count, settings.n)
    seconds, busy = ({name: statistics.median(each) for name, each in found.items()} for found in (wall, cpu))
    others = [name for name in ways if name != "waiting"]
    return {
        "best": seconds["in_turn"],
        "tokens_per_second": float(lens.sum() / seconds["in_turn"]),
        "seconds": seconds,
        "cpu_seconds": busy,
        "ratio": {name: seconds["waiting"] / seconds[name] for name in others},
        "ratio_cpu": {name: busy["waiting"] / busy[name] for name in others},
        "decoded": decoded | {"needed": int(np.maximum(lens.max(axis=1) - 1, 0).sum())},
        "mean_tokens": float(lens.mean()),
        "equal_replies": {
            name: float(np.mean([a == b for a, b in zip(replies[name], replies["waiting"], strict=True)]))
            for name in others
        },
        "first_seconds": first,
        "compiles_after_warmup": late,
        "samples": wall,
    }


def _waiting(config, settings: SamplingConfig, weights, prompts: Batch, seed, round_):
    """All rows go on to the end of the longest response, in the caches' four widths."""
    weights = decoding.decode_weights(config, weights)
    layout = decoding.decode_layout(config, weights)
    first, *wider = sampling.cache_widths(settings.max_new_tokens)
    state = decoding.begin(config, settings, weights, prompts, seed, round_, first)
    for width in (first, *wider):
        state = dataclasses.replace(state, cache=decoder.widen(state.cache, width))

        def more(state, width=width):
            return (state.step < width) & jnp.any(decoding.live(state))

        state = decoding.advance(config, settings, layout, state, more)
    drawn = sampling.Drawn(state.drawn, state.logps, state.lengths, state.finished)
    return sampling.rollout(settings, prompts, drawn), state.decoded
