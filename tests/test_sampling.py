"""Takes the sampler with a real small model; gives proof that its log-probabilities, uniforms, stops and shapes are
what they claim, alone or in a batch, on one device or eight."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mpo_jax import decoding, sample, sampling, sharding
from mpo_jax.data.prompts import prompt_batch
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.models import decoder, hf
from mpo_jax.models.config import ModelConfig, from_folder
from mpo_jax.ops import masks
from mpo_jax.sample import replies
from mpo_jax.sampling import SamplingConfig

BOS, EOS = 1, 2
WHO = ("a little girl", "a big dog", "an old man", "two red birds", "a boy who had a very small boat", "Tim")
WHERE = ("in the park", "by the sea", "at home", "far away in a wood where nobody had ever been before")
OPENINGS = (
    "Once upon a time there was {} {}",
    "{} {}",
    "One day, {} saw a cat {}. The cat",
    "Mom said that {} was {}, but",
)
PROMPTS = [opening.format(who, where) for where in WHERE for who in WHO for opening in OPENINGS][:64]


@pytest.fixture(scope="module")
def config(stories) -> ModelConfig:
    return from_folder(stories).for_mesh(sharding.make_mesh(2, 2, 2))


@pytest.fixture(scope="module")
def weights(stories, config):
    return hf.import_weights(stories, config)


@pytest.fixture(scope="module")
def tokenizer(stories):
    return load_tokenizer(stories)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(config, settings, weights, prompts, seed, round):
    return sampling.sample(config, settings, weights, prompts, seed, round)


def responses(rollout, n):
    """tokens, segments and positions of the response slots, i32 [B,N,R]."""
    rows, _, slots = rollout.logps.shape
    cut = (getattr(rollout.batch, name)[:, -n * slots :] for name in ("tokens", "segments", "positions"))
    return tuple(np.asarray(x).reshape(rows, n, slots) for x in cut)


def take(prompts, rows):
    return jax.tree.map(lambda x: x[rows], prompts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def teacher_forced(config, settings, weights, batch):
    """What every response slot was to be drawn from, f32 [B,N,R,V], from one forward over the rollout's rows."""
    hidden = decoder.forward(config, weights, batch.tokens, batch.positions, batch.segments)
    _, source, _ = masks.response_columns(batch.segments, batch.window)
    logits = decoder.logits(config, weights, jnp.take_along_axis(hidden, source[:, :, None], axis=1))
    logits = logits.reshape(len(batch.tokens), settings.n, settings.max_new_tokens, -1)
    steps = jnp.arange(settings.max_new_tokens)
    return jax.vmap(functools.partial(decoding.distribution, settings), in_axes=(2, 0), out_axes=2)(logits, steps)


# Log-probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        SamplingConfig(max_new_tokens=24, n=3, stop_ids=(EOS, 426)),
        SamplingConfig(temperature=0.7, max_new_tokens=24, stop_ids=(EOS, 426)),
        pytest.param(
            SamplingConfig(temperature=0.7, top_k=20, max_new_tokens=16, n=2, stop_ids=(EOS,)), marks=pytest.mark.slow
        ),
        SamplingConfig(top_k=30, top_p=0.9, max_new_tokens=16, n=2, stop_ids=(EOS,)),
        SamplingConfig(temperature=1.3, top_p=0.8, min_new_tokens=12, max_new_tokens=16, n=2, stop_ids=(BOS, EOS, 426)),
    ],
    ids=["temperature 1", "temperature 0.7", "top_k", "top_k and top_p", "top_p and min_new_tokens"],
)
def test_logps_equal_teacher_forced_ones(config, weights, tokenizer, settings):
    prompts = prompt_batch(PROMPTS[:8], tokenizer)
    rollout = run(config, settings, weights, prompts, 0, 0)
    tokens, segments, _ = responses(rollout, settings.n)
    allowed = np.asarray(teacher_forced(config, settings, weights, rollout.batch), np.float64)
    drawn = np.take_along_axis(allowed, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    expected = np.log(drawn / allowed.sum(axis=-1), where=segments > 0, out=np.zeros(drawn.shape))
    np.testing.assert_allclose(rollout.logps, expected, atol=1e-4)
    stops = np.isin(tokens, settings.stop_ids) & (segments > 0)
    assert not stops[:, :, : settings.min_new_tokens].any()
    np.testing.assert_array_equal(stops.any(axis=-1), rollout.finished)


def test_sampled_frequencies_are_the_models(config, weights, tokenizer):
    prompts = prompt_batch([PROMPTS[0]] * 64, tokenizer)
    prompts = dataclasses.replace(prompts, prompt_id=jnp.arange(64, dtype=jnp.int32))
    settings = SamplingConfig(max_new_tokens=2, n=32)
    drawn = np.concatenate([responses(run(config, settings, weights, prompts, 0, r), 32)[0] for r in range(3)])
    pairs = drawn.reshape(-1, 2)

    @jax.jit
    def after(ids, last):
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        hidden = decoder.forward(config, weights, ids, positions, jnp.ones_like(ids))
        return jax.nn.softmax(decoder.logits(config, weights, hidden[0, last]))

    def expected(prefix):
        room = prompts.tokens.shape[1] + 1 - len(prefix)  # a later token changes nothing
        return np.asarray(after(jnp.asarray([prefix + [0] * room], jnp.int32), len(prefix) - 1), np.float64)

    def check(tokens, p):
        """Chi-square over the tokens expected at least 5 times; all others are one class."""
        counts = np.bincount(tokens, minlength=len(p))
        often = p * len(tokens) >= 5
        counts = np.append(counts[often], counts[~often].sum())
        p = np.append(p[often], p[~often].sum())
        chi_square = np.sum((counts - len(tokens) * p) ** 2 / (len(tokens) * p))
        assert abs(chi_square - (len(p) - 1)) < 4 * np.sqrt(2 * (len(p) - 1))

    prompt = np.asarray(prompts.tokens[0]).tolist()
    check(pairs[:, 0], expected(prompt))
    common = int(np.bincount(pairs[:, 0]).argmax())
    check(pairs[pairs[:, 0] == common, 1], expected([*prompt, common]))


def test_greedy_text_equals_transformers(config, weights, tokenizer, stories, torch):
    from transformers import AutoModelForCausalLM

    prompts = prompt_batch(PROMPTS, tokenizer)
    settings = SamplingConfig(temperature=0, max_new_tokens=48, stop_ids=(EOS,))
    rollout = run(config, settings, weights, prompts, 0, 0)
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor(np.asarray(prompts.tokens), dtype=torch.long),
            attention_mask=torch.tensor(np.asarray(prompts.segments), dtype=torch.long),
            do_sample=False,
            max_new_tokens=48,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    theirs = tokenizer.batch_decode(output[:, prompts.tokens.shape[1] :], skip_special_tokens=True)
    tokens, segments, _ = responses(rollout, 1)
    ours = [
        tokenizer.decode(row[real > 0], skip_special_tokens=True)
        for row, real in zip(tokens[:, 0], segments[:, 0], strict=True)
    ]
    assert ours == theirs
    np.testing.assert_array_equal(rollout.logps, 0)


# Randomness -----------------------------------------------------------------------------------------------------------


def first_differences(a, b):
    """(row, sample, step) of the first token in which two runs' responses i32 [B,N,R] differ."""
    differ = a != b
    return [(row, n, int(differ[row, n].argmax())) for row, n in np.argwhere(differ.any(axis=-1))]


def assert_same_draws(config, settings, weights, prompts, one, other):
    """At least 99 % of completions equal; wherever two part, the uniform lies at a boundary of the distribution."""
    tokens, (others, _, _) = responses(one, settings.n)[0], responses(other, settings.n)
    parted = first_differences(tokens, others)
    assert len(parted) <= 0.01 * tokens.shape[0] * settings.n
    chances = teacher_forced(config, settings, weights, one.batch)
    keys = decoding.response_keys(0, 0, prompts.prompt_id, settings.n)
    for row, n, step in parted:
        position = prompts.positions[row, -1] + 1 + step
        uniform = float(decoding.uniforms(keys[row, n], position))
        p = np.asarray(chances[row, n, step], np.float64)
        assert np.abs(np.cumsum(p) / p.sum() - uniform).min() < 1e-5


SAME = SamplingConfig(temperature=0.9, max_new_tokens=32, n=2, stop_ids=(EOS, 426))


def test_uniforms_depend_on_what_they_may_alone():
    ids, positions = jnp.asarray([5, 9, 5], jnp.int32), jnp.asarray([[7, 7], [7, 7], [7, 8]], jnp.int32)
    all_of = np.asarray(decoding.uniforms(decoding.response_keys(3, 4, ids, 2), positions))
    alone = np.asarray(decoding.uniforms(decoding.response_keys(3, 4, ids[1:2], 2), positions[1:2]))
    np.testing.assert_array_equal(all_of[1:2], alone)
    assert all_of[0, 0] == all_of[2, 0]  # same prompt, sample and position
    changed = [
        decoding.uniforms(decoding.response_keys(seed, round, ids, 2), positions) for seed, round in ((3, 5), (4, 4))
    ]
    values = [*all_of[:2].ravel(), all_of[2, 1], *np.ravel(changed[0])[:4], *np.ravel(changed[1])[:4]]
    assert len({float(value) for value in values}) == len(values)


def test_draws_equal_alone_in_a_batch_and_in_another_bucket(config, weights, tokenizer):
    prompts = prompt_batch(PROMPTS, tokenizer)
    together = run(config, SAME, weights, prompts, 0, 0)
    wider = prompt_batch(PROMPTS, tokenizer, length=prompts.tokens.shape[1] + 24)
    assert_same_draws(config, SAME, weights, prompts, together, run(config, SAME, weights, wider, 0, 0))
    alone = [run(config, SAME, weights, take(prompts, slice(i, i + 1)), 0, 0) for i in range(64)]
    alone = jax.tree.map(lambda *rows: jnp.concatenate(rows), *alone)
    assert_same_draws(config, SAME, weights, prompts, together, alone)


def test_draws_equal_on_one_and_eight_devices(config, weights, tokenizer):
    prompts = prompt_batch(PROMPTS, tokenizer)
    one = run(config, SAME, weights, prompts, 0, 0)
    for sizes in ((2, 2, 2), (8, 1, 1)):
        mesh = sharding.make_mesh(*sizes)
        placed = jax.device_put(weights, sharding.tree_shardings(weights, mesh))
        with jax.set_mesh(mesh):
            eight = run(config, SAME, placed, jax.device_put(prompts, sharding.batch_sharding(mesh)), 0, 0)
        assert len(eight.logps.sharding.device_set) == 8
        assert_same_draws(config, SAME, weights, prompts, one, jax.device_get(eight))


def test_another_round_or_seed_gives_other_completions(config, weights, tokenizer):
    prompts = prompt_batch(PROMPTS[:8], tokenizer)
    settings = SamplingConfig(max_new_tokens=16, n=4)
    base, again, round1, seed1 = (
        responses(run(config, settings, weights, prompts, *which), 4)[0] for which in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    np.testing.assert_array_equal(base, again)
    for other in (round1, seed1):
        assert (base != other).any(axis=-1).all()
    assert all(len(np.unique(samples, axis=0)) == 4 for samples in base), "samples of one prompt differ"


# Form and stops -------------------------------------------------------------------------------------------------------


def test_rollout_is_in_slot_form(config, weights, tokenizer):
    prompts = prompt_batch(PROMPTS[:6], tokenizer)
    prompts = dataclasses.replace(prompts, weight=jnp.asarray([1, 1, 1, 1, 1, 0], jnp.float32))
    settings = SamplingConfig(max_new_tokens=20, n=3, stop_ids=(EOS, 426))
    rollout = run(config, settings, weights, prompts, 0, 0)
    tokens, segments, positions = responses(rollout, 3)
    slots = prompts.tokens.shape[1]
    assert rollout.batch.window == 60 and rollout.batch.tokens.shape == (6, slots + 60)
    for name in ("tokens", "segments", "positions"):
        np.testing.assert_array_equal(getattr(rollout.batch, name)[:, :slots], getattr(prompts, name))
    assert (segments[5] == 0).all() and not rollout.finished[5].any()
    assert rollout.finished[:5].any() and not rollout.finished[:5].all(), "the case should show both"
    for row in range(5):
        for n in range(3):
            length = int((segments[row, n] > 0).sum())
            assert (segments[row, n, :length] == 2 + n).all() and (segments[row, n, length:] == 0).all()
            first = int(prompts.positions[row, -1]) + 1
            np.testing.assert_array_equal(positions[row, n, :length], np.arange(first, first + length))
            is_stop = np.isin(tokens[row, n, :length], settings.stop_ids)
            assert not is_stop[:-1].any() and is_stop[-1] == rollout.finished[row, n]
            assert rollout.finished[row, n] or length == 20
            assert (tokens[row, n, length:] == 0).all() and (np.asarray(rollout.logps)[row, n, length:] == 0).all()
            assert (np.asarray(rollout.logps)[row, n, :length] < 0).all()


def test_shapes_are_known_without_tracing(config, weights, tokenizer):
    settings = SamplingConfig(max_new_tokens=7, n=2, stop_ids=(2,))
    prompts = prompt_batch(PROMPTS[:4], tokenizer)
    drawn = jax.eval_shape(functools.partial(sampling.sample, config, settings), weights, prompts, 0, 0)
    assert sampling.shapes_of(settings, prompts) == drawn


def test_pad_equal_to_a_stop_id_changes_nothing(config, weights, tokenizer):
    prompts = prompt_batch(PROMPTS[:8], tokenizer)
    padded_with_eos = dataclasses.replace(prompts, tokens=jnp.where(prompts.segments == 0, EOS, prompts.tokens))
    settings = SamplingConfig(max_new_tokens=16, stop_ids=(EOS, 0))
    a, b = (responses(run(config, settings, weights, x, 0, 0), 1) for x in (prompts, padded_with_eos))
    np.testing.assert_array_equal(a[0], b[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_state(config, settings, weights, prompts):
    """Responses that begin together and wait for the longest, in caches of one width."""
    weights = decoding.decode_weights(config, weights)
    layout = decoding.decode_layout(config, weights)
    state = decoding.begin(config, settings, weights, prompts, 0, 0, settings.max_new_tokens)
    return decoding.advance(config, settings, layout, state, lambda state: jnp.any(decoding.live(state)))


def test_the_loop_ends_when_every_response_is_done(config, weights, tokenizer):
    prompts = prompt_batch(PROMPTS[:8], tokenizer)
    prompts = dataclasses.replace(prompts, weight=prompts.weight.at[3].set(0))  # a filler row holds nothing up
    everything_but_one = tuple(range(1, config.vocab_size))
    settings = SamplingConfig(temperature=0, min_new_tokens=9, max_new_tokens=256, stop_ids=everything_but_one)
    state = run_state(config, settings, weights, prompts)
    assert int(state.step) == 10
    np.testing.assert_array_equal(state.lengths[:, 0], [10, 10, 10, 0, 10, 10, 10, 10])
    assert int(run_state(config, SamplingConfig(max_new_tokens=12), weights, prompts).step) == 12


@pytest.mark.parametrize("slots", [1, 15, 16, 17, 40, 64, 65, 100, 1000])
def test_caches_widen_in_few_steps_up_to_all_slots(slots):
    widths = sampling.cache_widths(slots)
    assert widths[-1] == slots and len(widths) <= 4
    assert all(width % 16 == 0 for width in widths[:-1])
    steps = np.diff([0, *widths])
    assert (steps > 0).all() and (steps == steps[0])[:-1].all() and steps[-1] <= steps[0]


def test_what_is_drawn_does_not_depend_on_the_width_of_the_caches(config, weights, tokenizer):
    prompts = prompt_batch(PROMPTS[:8], tokenizer)
    settings = SamplingConfig(max_new_tokens=40, n=2, stop_ids=(EOS,))
    assert len(sampling.cache_widths(40)) == 3
    grown, whole = run(config, settings, weights, prompts, 0, 0), run_state(config, settings, weights, prompts)
    np.testing.assert_array_equal(responses(grown, 2)[0], whole.drawn)
    np.testing.assert_allclose(grown.logps, whole.logps, atol=2e-5)
    np.testing.assert_array_equal(grown.finished, whole.finished)
    assert int(whole.lengths.max()) == 40, "some response fills every width"


def test_a_stop_token_may_be_the_first_or_the_last(config, weights, tokenizer):
    prompts = prompt_batch(PROMPTS[:4], tokenizer)
    settings = SamplingConfig(max_new_tokens=1, stop_ids=tuple(range(config.vocab_size)))
    rollout = run(config, settings, weights, prompts, 0, 0)
    assert rollout.finished.all() and (responses(rollout, 1)[1] == 2).all()
    late = SamplingConfig(
        max_new_tokens=3, min_new_tokens=2, stop_ids=tuple(range(3, config.vocab_size)), temperature=0
    )
    rollout = run(config, late, weights, prompts, 0, 0)
    assert rollout.finished.all() and (responses(rollout, 1)[1] == 2).all()


# Compiled form --------------------------------------------------------------------------------------------------------


def test_nothing_is_compiled_after_warm_up(config, weights, tokenizer):
    traced = []

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def counted(config, settings, weights, prompts, seed, round):
        traced.append(prompts.tokens.shape)
        return sampling.sample(config, settings, weights, prompts, seed, round)

    settings = SamplingConfig(max_new_tokens=4, n=2, stop_ids=(EOS,))
    lengths = {text: int(prompt_batch([text], tokenizer).tokens.shape[1]) for text in PROMPTS}
    buckets = sorted({int(np.quantile(list(lengths.values()), share)) for share in (0.3, 0.6, 1)})
    by_bucket = {bucket: [text for text in PROMPTS if lengths[text] <= bucket] for bucket in buckets}
    assert len(buckets) == 3 and all(len(texts) >= 8 for texts in by_bucket.values())
    random = np.random.default_rng(0)
    for step in range(20 + len(buckets)):
        bucket = buckets[step % len(buckets)]
        texts = list(random.choice(by_bucket[bucket], 8, replace=False))
        counted(config, settings, weights, prompt_batch(texts, tokenizer, length=bucket), 0, step)
        if step == len(buckets) - 1:
            warm = len(traced)
    assert len(traced) == warm == len(buckets)


def loop_bodies(hlo):
    """The text of every computation that a while loop of a compiled module runs."""
    found = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", hlo)
    by_name = {re.match(r"(?:ENTRY )?%?([\w.\-]+)", text).group(1): text for text in found if text.strip()}
    names, reached = set(re.findall(r"body=%?([\w.\-]+)", hlo)), set()
    while names:
        name = names.pop()
        reached.add(name)
        calls = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", by_name[name])
        names |= set(calls) - reached
    return "\n".join(by_name[name] for name in reached)


def gathered_elements(text):
    """The number of elements of every all-gather's result."""
    shapes = re.findall(r"= \(?(?:f32|bf16)\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]


def test_the_loop_gathers_no_weight(config, weights, tokenizer):
    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put(weights, sharding.tree_shardings(weights, mesh))
    prompts = jax.device_put(prompt_batch(PROMPTS[:8], tokenizer), sharding.batch_sharding(mesh))
    settings = SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=8, stop_ids=(EOS,))
    with jax.set_mesh(mesh):
        hlo = run.lower(config, settings, placed, prompts, 0, 0).compile().as_text()
    kernels = [x for x in jax.tree.leaves(weights["params"]) if x.ndim > 2]
    smallest = min(x[0].size for x in kernels) // mesh.shape["tensor"]
    assert max(gathered_elements(hlo)) >= smallest, "fsdp is gathered before the loop"
    inside = gathered_elements(loop_bodies(hlo))
    # Neither a weight nor the local rows' probabilities [2, V].
    assert max(inside, default=0) < min(smallest, 2 * config.padded_vocab), inside


def test_decoding_cuts_weights_over_the_tensor_axis_alone(config, weights):
    mesh = sharding.make_mesh(2, 2, 2)
    specs = sharding.map_weights(lambda name, x: decoding.decode_spec(name, x.shape, mesh), weights)
    assert tuple(specs["params"]["layers"]["attn"]["q"]["kernel"]) == (None, None, "tensor", None)
    used = {axis for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)) for axis in spec}
    assert used == {None, "tensor"}


# Settings and command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0, "n": 2}, "greedy"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"n": 0}, "n: 0"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(InputError, match=message) as error:
        SamplingConfig(**fields)
    assert "\n" not in str(error.value)


def test_settings_that_the_model_cannot_do(config, weights, tokenizer):
    prompts = prompt_batch(PROMPTS[:1], tokenizer)
    for fields, message in (
        ({"stop_ids": (512,)}, "outside the vocabulary"),
        ({"stop_ids": (-1,)}, "outside the vocabulary"),
        ({"max_new_tokens": 512}, "context of 512"),
        ({"min_new_tokens": 1, "stop_ids": range(512)}, "every token is a stop id"),
    ):
        with pytest.raises(InputError, match=message):
            run(config, SamplingConfig(**fields), weights, prompts, 0, 0)


@pytest.mark.parametrize("n", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_streamed_replies_are_those_of_one_call(config, weights, tokenizer, n):
    settings = SamplingConfig(temperature=0.8, max_new_tokens=40, n=n, stop_ids=(EOS,))
    pieces = list(replies(config, settings, weights, tokenizer, PROMPTS[0], seed=5))
    prompts = prompt_batch(PROMPTS[:1], tokenizer)
    tokens, segments, _ = responses(run(config, settings, weights, prompts, 5, 0), n)
    prompt = prompts.tokens[0].tolist()
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    for index in range(n):
        own = [piece for piece in pieces if piece[0] == index]
        whole = tokenizer.decode(prompt + tokens[0, index][segments[0, index] > 0].tolist(), skip_special_tokens=True)
        assert start + "".join(text for _, text, _ in own) == whole
        assert [ended for *_, ended in own] == [False] * (len(own) - 1) + [True]
        assert len(own) > 3, "text comes in pieces"


def test_spoken_replies(stories, capfd):
    def spoken(prompt, seed=0, **settings):
        sample.speak(str(stories), prompt, SamplingConfig(**settings), seed)
        return capfd.readouterr().out

    greedy = spoken("Once upon a time", temperature=0.0, max_new_tokens=16)
    assert greedy.startswith(", there was") and greedy.endswith("\n") and greedy.count("\n") == 1
    several = spoken("Once upon a time", n=3, temperature=0.7, max_new_tokens=8, seed=1)
    assert {line[:4] for line in several.splitlines()} == {"[0] ", "[1] ", "[2] "}
    with pytest.raises(InputError, match="context of 512"):
        spoken("a", max_new_tokens=512)
    with pytest.raises(InputError, match="greedy"):
        spoken("a", n=2, temperature=0.0)


def test_a_conversation_goes_through_the_chat_template(tmp_path, stories, capfd, monkeypatch):
    """What the model reads is what transformers' template makes of all turns so far."""
    folder = tmp_path / "chat"
    shutil.copytree(stories, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    read = []
    real = sample.prompt_batch

    def noted(prompts, tokenizer):
        read.append(prompts[0])
        return real(prompts, tokenizer)

    monkeypatch.setattr(sample, "prompt_batch", noted)
    how = SamplingConfig(temperature=0.0, max_new_tokens=4)
    sample.speak(str(folder), iter(["Hello", "Bye"]), how, 0, system="Be kind.")
    first = capfd.readouterr().out.split("\n")[0].strip()
    turns = [("system", "Be kind."), ("user", "Hello"), ("assistant", first), ("user", "Bye")]
    tokenizer = load_tokenizer(str(folder))
    for count, record in ((2, read[0]), (4, read[1])):
        messages = [{"role": role, "content": text} for role, text in turns[:count]]
        assert record.prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    sample.speak(str(folder), "Hello", how, 0, raw=True)
    assert read[2] == "Hello"
    with pytest.raises(InputError, match="--system"):
        sample.speak(str(stories), "Hello", how, 0, system="Be kind.")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--n=2"], "--n=2"), (["--prompt="], "--prompt is missing"), (["--prompt=a", "--model=nowhere"], "nowhere")],
)
def test_command_line_refuses_in_one_line(stories, flags, message):
    command = [sys.executable, "-m", "mpo_jax.sample", f"--model={stories}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, ""),
        ({"temperature": 0.7, "top_p": 1.0}, ""),
        ({"temperature": 0.0}, "temperature 0"),
        ({"top_k": 5}, "top_k 5"),
        ({"top_p": 0.5, "min_new_tokens": 2}, "top_p 0.5, min_new_tokens 2"),
    ],
)
def test_what_truncates_is_told(settings, told):
    assert SamplingConfig(**settings).truncation == told
