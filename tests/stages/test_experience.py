"""A tiny random decoder, adapters and made-up rollouts enter; what a rollout becomes is held against closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.models import decoder, lora
from mpo_jax.models.config import LoraConfig, ModelConfig
from mpo_jax.stages.ppo import experience
from mpo_jax.stages.ppo.settings import Rules
from mpo_jax.types import Rollout
from tests.stages import made_rollout

FULL = ModelConfig("llama", 100, 1, 16, 4, 2, 4, 32, 64)
ADAPTED = dataclasses.replace(FULL, lora=LoraConfig(2, 4.0, ("q", "o", "down")))
B, P, N, R = 4, 6, 2, 5
LENS = np.array([[5, 3], [1, 5], [4, 2], [0, 0]])


def made_up() -> Rollout:
    """Prompts of 3 to 6 tokens and responses of LENS; the last row is a filler."""
    return made_rollout.rollout(np.array([0, 3, 1, P]), LENS, P, R)


def noise(tree, seed, size=0.3):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@functools.cache
def weights(model: ModelConfig):
    """base, policy and critic: under LoRA, adapters whose product is not 0."""
    whole = decoder.init(model, jax.random.key(0), head=True)
    head, trunk = {"head": whole.pop("head")}, whole
    if model.lora is None:
        policy = noise(trunk, 1, 0.1)
        return {}, policy, {"params": {k: v for k, v in policy["params"].items() if k != "lm_head"}} | head
    policy = noise(lora.init(model, jax.random.key(2)), 3)
    return trunk, policy, policy | head


def arguments(model: ModelConfig, reference=None, zero_head=False):
    base, policy, critic = weights(model)
    if zero_head:
        critic = critic | {"head": jax.tree.map(jnp.zeros_like, critic["head"])}
    return {"policy": policy, "value": critic}, {"base": base, "reference": reference or policy}


@functools.cache
def first_update(model: ModelConfig, rules: Rules):
    """Jitted: the metrics of a rollout, and those of the loss before its first update."""
    loss = experience.make_loss(model, rules, 0.2, 0.2, 0.01)

    @jax.jit
    def run(params, frozen, rollout, scores):
        made, metrics = experience.make(model, rules, None, params, frozen, rollout, scores, jnp.float32(0.5))
        _, _, sums = loss(params, frozen, made, jax.random.key(0))
        return made, metrics, {name: total / weight for name, (total, weight) in sums.items()}

    return run


CASES = [
    pytest.param(FULL, 1.0, id="full, temperature 1", marks=pytest.mark.slow),
    pytest.param(FULL, 0.7, id="full, temperature 0.7", marks=pytest.mark.slow),
    pytest.param(ADAPTED, 1.0, id="lora, temperature 1", marks=pytest.mark.slow),
    pytest.param(ADAPTED, 0.7, id="lora, temperature 0.7"),
]


@pytest.mark.parametrize(("model", "temperature"), CASES)
def test_before_the_first_update_kl_is_0_and_ratio_1(model, temperature):
    """trl #454, #1340: the reference is the very policy, its adapter included, at the same temperature."""
    run = first_update(model, Rules(temperature=temperature))
    params, frozen = arguments(model)
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(B, N)), jnp.float32)
    made, metrics, before = run(params, frozen, made_up(), scores)
    for name in ("kl", "kl_k3", "kl_token", "kl_error"):
        assert abs(float(metrics[name])) < 1e-5, name
    assert float(before["ratio_deviation"]) < 1e-5
    assert float(before["clip_fraction"]) == 0
    np.testing.assert_allclose(float(before["ratio"]), 1, atol=1e-5)
    # The base without the adapter, or another policy, is another reference.
    fresh = lora.init(model, jax.random.key(2)) if model.lora else weights(model)[1] | noise(weights(model)[1], 5, 0.1)
    _, other, _ = run(params, arguments(model, fresh)[1], made_up(), scores)
    assert float(other["kl_k3"]) > 1e-2
    # Nothing of the filler row, nor behind a response's end.
    assert (np.asarray(made.advantages)[np.arange(R)[None, None] >= LENS[:, :, None]] == 0).all()


@pytest.mark.parametrize("left_out", [(), ("value",), ("sft",)], ids=str)
def test_shapes_are_known_without_tracing(left_out):
    """What a plan and the first compile are told is what JAX says of the functions themselves."""
    params, frozen = arguments(FULL)
    params = {name: tree for name, tree in params.items() if name not in left_out}
    frozen |= {} if "sft" in left_out else {"sft": frozen["reference"]}
    rollout, rules = made_up(), Rules()
    views = jax.eval_shape(functools.partial(experience.look, FULL, rules), params, frozen, rollout)
    assert experience.view_shapes(params, frozen, shapes(rollout)) == views
    raw, coefficient = jnp.zeros((B, N)), jnp.float32(0)
    made, _ = jax.eval_shape(functools.partial(experience.weigh, rules, None), rollout, views, raw, coefficient)
    assert experience.shapes_of(shapes(rollout)) == made


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_fractional_scores_arrive_unrounded():
    """tunix held rewards in an integer buffer: 0.7 became 0. Without KL, critic and discount a token's advantage is its
    response's score."""
    scores = jnp.asarray([[0.7, -0.3], [0.1, 0.25], [1e-3, 2.75], [9.0, 9.0]], jnp.float32)
    rules = Rules(temperature=0.7, lam=1.0, whiten=False, missing_eos_penalty=0.125)
    run = first_update(ADAPTED, rules)
    made, metrics, _ = run(*arguments(ADAPTED, zero_head=True), made_up(), scores)
    wanted = np.where(np.asarray(LENS < R), scores, np.asarray(scores) - 0.125)[:, :, None]
    mask = np.arange(R)[None, None] < LENS[:, :, None]
    np.testing.assert_allclose(np.asarray(made.advantages), np.where(mask, wanted, 0), atol=1e-6)
    np.testing.assert_allclose(np.asarray(made.returns), np.where(mask, wanted, 0), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(made.score), np.asarray(scores))
    np.testing.assert_allclose(float(metrics["score"]), np.asarray(scores)[:3].mean(), rtol=1e-6)
    np.testing.assert_allclose(float(metrics["response_len"]), LENS[:3].mean(), rtol=1e-6)
    np.testing.assert_allclose(float(metrics["finished"]), (LENS[:3] < R).mean(), rtol=1e-6)
    _, metrics, _ = run(*arguments(ADAPTED, zero_head=True), made_up(), scores.at[1, 1].set(jnp.nan))
    assert np.isnan(float(metrics["score"])), "the loop stops at it"


def test_rloo_keeps_its_own_definition_and_ppo_whitens_unless_told_otherwise():
    """Ahmadian et al. 2024: a sample's score less the mean of the prompt's other samples, nothing else."""
    scores = jnp.asarray([[0.5, -0.25], [1.0, 3.0], [2.0, 2.0], [9.0, 9.0]], jnp.float32)
    mask = np.asarray(np.arange(R)[None, None] < LENS[:, :, None])
    params, frozen = arguments(ADAPTED)
    params = {"policy": params["policy"]}  # RLOO has no critic
    found = {}
    for whiten in ("auto", "false", "true"):
        rules = Rules(temperature=0.7, algorithm="rloo", whiten=whiten)
        make = jax.jit(functools.partial(experience.make, ADAPTED, rules, None))
        made, _ = make(params, frozen, made_up(), scores, jnp.float32(0.5))
        found[whiten] = np.asarray(made.advantages)
    wanted = np.where(mask, np.asarray(scores - scores[:, ::-1])[:, :, None], 0)[:3]  # the last row is filler
    np.testing.assert_allclose(found["auto"][:3], wanted, atol=1e-5)
    np.testing.assert_array_equal(found["auto"], found["false"])
    assert np.std(found["true"][:3][mask[:3]]) == pytest.approx(1, abs=1e-3) != np.std(wanted[mask[:3]])
    assert (Rules().whitens, Rules(algorithm="rloo").whitens, Rules(whiten="false").whitens) == (True, False, False)


def test_rules_are_hashable():
    """A jitted function closes over them."""
    assert hash(Rules()) == hash(Rules())


def test_replies_lose_the_pad_tokens_that_they_end_with_and_no_other():
    """By hand: of 3 4 9 5 9 the last goes; a reply of nothing else becomes empty, as those of the filler are."""
    rollout = made_up()
    tokens = np.array(rollout.batch.tokens)
    tokens[0, P : P + 5] = [3, 4, 9, 5, 9]
    tokens[1, P + R : P + 2 * R] = [9, 3, 9, 9, 9]
    tokens[2, P + R : P + R + 2] = 9
    tokens[0, P + R : P + R + 3] = 8
    rollout = dataclasses.replace(rollout, batch=dataclasses.replace(rollout.batch, tokens=jnp.asarray(tokens)))
    kept = np.asarray(experience.without_end(rollout, 9).batch.segments)
    np.testing.assert_array_equal(kept[:, :P], rollout.batch.segments[:, :P])
    assert kept[0, P:].tolist() == [2, 2, 2, 2, 0, 3, 3, 3, 0, 0]
    assert kept[1, P + R :].tolist() == [3, 3, 0, 0, 0]
    assert kept[2, P + R :].tolist() == [0] * R and kept[3, P:].tolist() == [0] * N * R
