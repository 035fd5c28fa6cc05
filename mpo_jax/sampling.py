"""Takes a model's weights and left-padded prompts; gives a Rollout: n responses to each prompt, in one jitted call in
which no response waits for a longer one.

Rows that are done leave. While prompts wait, they take the places of those rows, a few at a time; when none waits, what
is left goes on in half as many rows, and half again. Letters: B prompts, W of them decoded at a time, N responses to
each, P prompt slots, R response slots (max_new_tokens).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax import decoding, places
from mpo_jax.decoding import Decoding, SamplingConfig, advance, begin, decode_layout, decode_weights
from mpo_jax.models import decoder
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops.masks import FIRST_RESPONSE_SEGMENT
from mpo_jax.types import Batch, PyTree, Rollout, record

_WIDTHS, _SLOTS = 4, 16  # widths of the caches at most, and what they are multiples of: a TPU's bfloat16 rows
_HALVINGS = 2  # of rows, at most; each is one more loop to compile
_PARTS = 8  # in which waiting prompts take places: fewer rows stand empty, and more prefills are small


@record
class Drawn:
    """What is kept of responses. tokens: i32 [B,N,R]; logps: f32 [B,N,R]; lengths: i32 [B,N]; finished: bool [B,N]."""

    tokens: jax.Array
    logps: jax.Array
    lengths: jax.Array
    finished: jax.Array


def sample(
    config: ModelConfig,
    settings: SamplingConfig,
    weights: PyTree,
    prompts: Batch,
    seed: jax.Array | int,
    round: jax.Array | int,
    rows: int | None = None,
) -> Rollout:
    """N responses to each prompt. Pure; to be jitted with `config`, `settings` and `rows` static, once for each P.

    prompts: slot form, left-padded to P columns; rows of weight 0 get empty responses. seed, round: i32 []; with the
    prompt id, the sample index and the position they alone decide every uniform. rows: W, prompts that are decoded at a
    time; None: all. Returns a Rollout whose batch has P + N x R columns: tokens, positions that continue from the
    prompt, segment 2 + n up to and with the stop token, 0 (like token and position) after it. Under a mesh
    (`jax.set_mesh`) weights may be laid out as for training; they are resharded once, before the loop. InputError,
    before anything is computed, where the model can't do this.
    """
    return counted(config, settings, weights, prompts, seed, round, rows)[0]


def counted(config, settings, weights, prompts, seed, round, rows=None) -> tuple[Rollout, jax.Array]:
    """`sample`, and the work of its loops: rows times steps, i32 []."""
    settings.check(config, prompts.tokens.shape[1])
    weights = decode_weights(config, weights)
    layout = decode_layout(config, weights)
    if rows is None or rows >= len(prompts.tokens):
        drawn, work = _together(config, settings, weights, layout, prompts, seed, round)
    else:
        drawn, work = _in_turn(config, settings, weights, layout, prompts, seed, round, rows)
    return rollout(settings, prompts, drawn), work


def cache_widths(slots: int) -> list[int]:
    """How many slots the caches of responses that begin together have, one after the other, up to `slots`.

    A step reads its caches whole, filled or not: in at most four widths it reads three eighths less of them, and the
    loop is compiled once for each.
    """
    size = -(-slots // (_WIDTHS * _SLOTS)) * _SLOTS
    return [*range(size, slots, size), slots]


def row_counts(rows: int) -> list[int]:
    """How many rows of a group are decoded, one after the other, when no prompt waits."""
    counts = [rows]
    while counts[-1] > 1 and len(counts) <= _HALVINGS:
        counts.append(-(-counts[-1] // 2))
    return counts


def trips(slots: int, rows: int, batches: int) -> tuple[int, int]:
    """For a plan: iterations of each loop over tokens, and turns in which waiting prompts take places, of a call that
    answers `batches` times as many prompts as it decodes at a time. All responses are taken to be as long as may be,
    and all loops to run alike. rows: of a group."""
    halved = len(row_counts(rows)) - 1
    if batches == 1:
        return -(-slots // (len(cache_widths(slots)) + halved)), 1
    turns = batches * -(-rows // _part(rows))
    return -(-batches * slots // (turns + halved)), turns


def _part(rows: int) -> int:
    """How many prompts take places at a time, of a group's rows."""
    return max(1, rows // _PARTS)


def _together(config, settings, weights, layout, prompts, seed, round) -> tuple[Drawn, jax.Array]:
    """Responses that all begin at once."""
    groups = places.groups(len(prompts.tokens))
    counts = row_counts(len(prompts.tokens) // groups)
    widths = cache_widths(settings.max_new_tokens)
    state = begin(config, settings, weights, prompts, seed, round, widths[0])

    def until(width: int) -> Callable[[Decoding], jax.Array]:
        return lambda state: (state.step < width) & (_most(state, groups) > _next(counts))

    for width in widths:
        state = dataclasses.replace(state, cache=decoder.widen(state.cache, width))
        state = advance(config, settings, layout, state, until(width))
    return _halved(config, settings, layout, state, counts)


def _in_turn(config, settings, weights, layout, prompts, seed, round, rows) -> tuple[Drawn, jax.Array]:
    """Responses of which `rows` prompts' are decoded at a time, each beginning when there is a place for it.

    Every group of rows has its own queue, of the prompts that lie on its device.
    """
    groups = places.groups(rows, len(prompts.tokens))
    counts = row_counts(rows // groups)
    size, part = rows // groups, _part(rows // groups)
    queue = places.first(prompts.weight > 0, groups)
    count = places.per_group(prompts.weight > 0, groups)
    nowhere, turns = queue.shape[1], jnp.arange(part, dtype=jnp.int32)[None]

    def free(state: Decoding) -> jax.Array:
        return size - places.per_group(decoding.live(state), groups)

    def turn(carry):
        """Some prompts take the places of rows that are done, whose responses are put away; then all go on until there
        is room for as many again, or nearly: a group waits for no other's last row. When none waits any more, until
        few enough are left."""
        state, source, asked, kept = carry
        where = places.first(~decoding.live(state), groups)[:, :part]
        fills = turns < jnp.minimum(free(state), count - asked)[:, None]
        left = places.grouped(places.take(source, where), groups)
        kept = places.put(kept, jnp.where(fills, left, nowhere), _unrolled(*places.take(_rings(state), where)))
        which = jnp.take_along_axis(queue, jnp.minimum(asked[:, None] + turns, nowhere - 1), axis=1)
        new = begin(config, settings, weights, places.take(prompts, which), seed, round, 1, state.step)
        to = jnp.where(fills, where, size)
        state, source = _put(state, to, new), places.put(source, to, places.flat(which))
        asked = asked + jnp.sum(fills, axis=1, dtype=jnp.int32)
        room = jnp.minimum(count - asked, part)

        some_wait = jnp.any(room > 0)

        def more(state: Decoding):
            # One sum over the groups says either: devices have one number to tell each other at a step.
            empty = free(state)
            told = jnp.sum(jnp.where(some_wait, jnp.minimum(empty, room), size - empty > _next(counts)))
            return jnp.where(some_wait, 8 * told < 7 * jnp.sum(room), told > 0)

        return advance(config, settings, layout, state, more), source, asked, kept

    begun = (
        _empty(config, settings, weights, prompts, rows),
        jnp.full(rows, nowhere, jnp.int32),
        jnp.zeros(groups, jnp.int32),
        _nothing(settings, len(prompts.tokens)),
    )
    state, source, _, kept = jax.lax.while_loop(lambda carry: jnp.any(carry[2] < count), turn, begun)
    last, work = _halved(config, settings, layout, state, counts)
    return places.put(kept, places.grouped(source, groups), last), work


def _halved(config, settings, layout, state: Decoding, counts: list[int]) -> tuple[Drawn, jax.Array]:
    """Decodes to the end of every response, in fewer and fewer rows. counts: rows of a group now, and what they are to
    be; of no group do more go on than fit in the next."""
    now, *fewer = counts
    groups = state.done.shape[0] // now
    if not fewer:
        return _unrolled(*_rings(state)), state.decoded
    order = places.first(decoding.live(state), groups)
    some, others = order[:, : fewer[0]], order[:, fewer[0] :]
    small = places.take(state, some)
    small = advance(config, settings, layout, small, lambda state: _most(state, groups) > _next(fewer))
    ended, work = _halved(config, settings, layout, small, fewer)
    before = _unrolled(*places.take(_rings(state), others))

    def back(new: jax.Array, old: jax.Array) -> jax.Array:
        both = jnp.concatenate([places.grouped(new, groups), places.grouped(old, groups)], axis=1)
        return places.take(places.flat(both), jnp.argsort(order, axis=1))

    return jax.tree.map(back, ended, before), work


def _next(counts: list[int]) -> int:
    """With how many rows of a group a loop ends."""
    return counts[1] if counts[1:] else 0


def _most(state: Decoding, groups: int) -> jax.Array:
    """Rows that go on, of the group that has most of them, i32 []."""
    return jnp.max(places.per_group(decoding.live(state), groups))


def _empty(config, settings, weights, prompts: Batch, rows: int) -> Decoding:
    """A state of `rows` rows that nothing is asked of yet, with caches as wide as any response."""
    some = jax.tree.map(lambda x: x[:rows], prompts)
    shapes = jax.eval_shape(lambda: begin(config, settings, weights, some, 0, 0, settings.max_new_tokens))
    state = places.over_rows(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    cache = dataclasses.replace(state.cache, layers=decoding.spread_over_heads(config, state.cache.layers))
    return dataclasses.replace(state, step=state.step + 1, done=jnp.ones_like(state.done), cache=cache)


def _put(state: Decoding, to: jax.Array, new: Decoding) -> Decoding:
    """The state with new rows at some places; their responses' slots need no clearing, being older than the rows."""

    def apart(state: Decoding):
        layers = state.cache.layers
        rest = dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=()))
        return rest, [(layer.prompt_keys, layer.prompt_values) for layer in layers]

    rest, of_prompts = places.put(apart(state), to, apart(new))
    layers = tuple(
        dataclasses.replace(layer, prompt_keys=keys, prompt_values=values)
        for layer, (keys, values) in zip(state.cache.layers, of_prompts, strict=True)
    )
    return dataclasses.replace(rest, cache=dataclasses.replace(rest.cache, layers=layers))


def _rings(state: Decoding) -> tuple[Drawn, jax.Array]:
    """What rows have drawn, as it lies, and where each began."""
    return Drawn(state.drawn, state.logps, state.lengths, state.finished), state.cache.began


def _unrolled(drawn: Drawn, began: jax.Array) -> Drawn:
    """Responses from their first token on."""
    slots = drawn.tokens.shape[2]
    shift = (began % slots)[:, None, None]

    def of(ring: jax.Array) -> jax.Array:
        # By powers of two: the TPU compiler ends itself at a gather along the last axis that it has fused.
        for bit in range((slots - 1).bit_length()):
            ring = jnp.where((shift >> bit) & 1 == 1, jnp.roll(ring, -(1 << bit), axis=2), ring)
        return ring

    return dataclasses.replace(drawn, tokens=of(drawn.tokens), logps=of(drawn.logps))


def _nothing(settings: SamplingConfig, prompts: int) -> Drawn:
    """Empty responses."""
    shape = (prompts, settings.n)
    tokens = jnp.zeros((*shape, settings.max_new_tokens), jnp.int32)
    return places.over_rows(
        Drawn(tokens, tokens.astype(jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    )


def stream(
    config: ModelConfig, settings: SamplingConfig, weights: PyTree, prompts: Batch, seed: int, round: int, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The responses of `sample` as they grow, `chunk` tokens at a time.

    Yields the tokens so far i32 [B,N,R], how many of them are real i32 [B,N], and which responses are done bool [B,N].
    The draws are those of `sample`, stopped in between, with caches of their full width from the start.
    """
    layout, state = _begin(config, settings, weights, prompts, seed, round)
    until = 1
    while True:
        # One copy out of the state, which the next step writes over.
        drawn, lengths, done = jax.device_get((state.drawn, state.lengths, state.done))
        yield drawn, lengths, done
        if done.all():
            return
        until += chunk
        state = _advance(config, settings, layout, state, until)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(config, settings, weights, prompts, seed, round):
    weights = decode_weights(config, weights)
    return decode_layout(config, weights), begin(
        config, settings, weights, prompts, seed, round, settings.max_new_tokens
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _advance(config, settings, layout, state, until):
    return advance(config, settings, layout, state, lambda s: (s.step < until) & jnp.any(decoding.live(s)))


def shapes_of(settings: SamplingConfig, prompts: Batch) -> Rollout:
    """Shapes of what `sample` gives of prompts, or of their shapes. No model is traced for them."""
    drawn = jax.eval_shape(lambda: _nothing(settings, len(prompts.tokens)))
    return jax.eval_shape(functools.partial(rollout, settings), prompts, drawn)


def rollout(settings: SamplingConfig, prompts: Batch, drawn: Drawn) -> Rollout:
    """Responses as slots behind their prompts."""
    rows = len(prompts.tokens)
    slots = jnp.arange(settings.max_new_tokens, dtype=jnp.int32)[None, None]
    real = slots < drawn.lengths[:, :, None]
    segments = FIRST_RESPONSE_SEGMENT + jnp.arange(settings.n, dtype=jnp.int32)[None, :, None]
    positions = (prompts.positions[:, -1] + 1)[:, None, None] + slots

    def behind(prompt: jax.Array, responses: jax.Array) -> jax.Array:
        return jnp.concatenate([prompt, jnp.where(real, responses, 0).reshape(rows, -1)], axis=1)

    batch = dataclasses.replace(
        prompts,
        tokens=behind(prompts.tokens, drawn.tokens),
        positions=behind(prompts.positions, positions),
        segments=behind(prompts.segments, segments),
        window=settings.n * settings.max_new_tokens,
    )
    return Rollout(batch, drawn.logps, drawn.finished)
