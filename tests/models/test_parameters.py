"""Frozen copies in bfloat16 of every family, whole and as adapters, in every compute dtype: they compute what the
trained copies compute, so that KL is 0 and the ratio 1 before the first update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax import sampling, scoring
from mpo_jax.models import decoder, lora, parameters
from mpo_jax.models.config import DTYPES, LoraConfig
from mpo_jax.ops.product import Int8
from mpo_jax.types import Batch

FAMILIES = ("llama", "llama_linear", "qwen2", "qwen3", "gemma2", "gpt_neox", "gpt2")


def batch(rows=3, length=24) -> Batch:
    tokens = np.random.default_rng(0).integers(3, 96, (rows, length)).astype(np.int32)
    columns = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    segments = np.where(columns < 8, 1, 2).astype(np.int32)
    ids, weight = np.arange(rows, dtype=np.int32), np.ones(rows, np.float32)
    return Batch(tokens, columns, segments, ids, ids, weight, window=16)


def trained(random_model, name, dtype, rank):
    """Float32 weights as training holds them, in every leaf of which bfloat16 would lose something."""
    config, weights = random_model(name, dtype=dtype)
    if rank:
        config = dataclasses.replace(config, lora=LoraConfig(rank, 8.0, ("q", "o", "down")))
        weights = weights | lora.init(config, jax.random.key(0))
    flat, tree = jax.tree.flatten(weights)
    noise = np.random.default_rng(1)
    return config, jax.tree.unflatten(tree, [x + 0.05 * noise.standard_normal(x.shape, np.float32) for x in flat])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "rank"), [("llama_linear", 3), ("qwen3", 0), ("gemma2", 0), ("gpt_neox", 3), ("gpt2", 0)]
)
def test_a_frozen_copy_computes_what_the_trained_one_computes(random_model, name, dtype, rank):
    config, weights = trained(random_model, name, dtype, rank)
    frozen = parameters.frozen_copy(config, weights, "bfloat16")
    rows = batch()

    @jax.jit
    def computed(weights, rows):
        logps = scoring.response_logps(config, weights, rows, entropy=True)
        return logps.logps, logps.entropy, scoring.response_scores(config, weights, rows, 1)

    # Not bit for bit: arguments of other dtypes make another program, whose float32 sums may run in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), computed(weights, rows), computed(frozen, rows)
    )
    layouts = (jax.jit(sampling.decode_layout, static_argnums=0)(config, tree) for tree in (weights, frozen))
    jax.tree.map(np.testing.assert_array_equal, *layouts)
    if dtype == "bfloat16":  # and rounding all of it is not the same
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
        assert np.abs(np.asarray(computed(rounded, rows)[2] - computed(weights, rows)[2])).max() > 1e-4


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "rank"),
    [("llama", 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("gemma2", 0), ("gpt2", 3)))],
)
def test_the_program_of_gradients_computes_what_the_forward_program_computes(random_model, name, rank, dtype, remat):
    """What the backward pass keeps must not change the forward pass: of attention it once kept the normalisers, XLA
    then divided in another order, and bfloat16 made 0.1 nats a token of it: no ratio of 1 before the first update.
    """
    config, weights = trained(random_model, name, dtype, rank)
    config = dataclasses.replace(config, remat=remat)
    frozen = parameters.frozen_copy(config, weights, "float32" if dtype == "float32" else "bfloat16")
    learned = {"lora": weights["lora"]} if rank else {"params": weights["params"]}

    def logps(weights):
        return scoring.response_logps(config, weights, batch(length=72)).logps

    def loss(learned):
        found = logps(frozen | learned)
        return jnp.sum(found), found

    expected = jax.jit(logps)(frozen)
    (_, found), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(learned)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)  # an ulp of the log-probs themselves


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_is_read_narrow_is_kept_narrow(random_model, name):
    for dtype, wide in (("float32", {"all"}), ("mixed", {"embedding", "bias", "norms"}), ("bfloat16", {"norms"})):
        config, weights = trained(random_model, name, dtype, 3)
        flat = jax.tree_util.tree_flatten_with_path(parameters.frozen_copy(config, weights, "bfloat16"))[0]
        for path, leaf in flat:
            *_, parent, own = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            kinds = {"all", own} | ({"norms"} if parent.endswith("norm") or parent == "head" else set())
            assert leaf.dtype == (jnp.float32 if kinds & wide else jnp.bfloat16), (dtype, path)
    config, weights = trained(random_model, name, "bfloat16", 3)
    kept = parameters.frozen_copy(config, weights, "float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(np.float32)}


def test_what_a_plan_counts_is_what_a_run_keeps(random_model):
    config, weights = trained(random_model, "gpt2", "bfloat16", 3)
    shapes = parameters.frozen_copy(config, jax.eval_shape(lambda: weights), "bfloat16")
    kept = parameters.frozen_copy(config, weights, "bfloat16")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_in_eight_bits_computes_what_its_values_mean(random_model, name):
    config, weights = trained(random_model, name, "float32", 3)
    kept = parameters.frozen_copy(config, weights, "int8")
    shapes = parameters.frozen_copy(config, jax.eval_shape(lambda: weights), "int8")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), kept)
    narrow = [leaf for leaf in jax.tree.leaves(kept) if leaf.dtype == jnp.int8]
    kernels = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(weights["params"]["layers"])
                  if jax.tree_util.keystr(path).endswith("'kernel']"))  # fmt: skip
    assert sum(leaf.nbytes for leaf in narrow) == kernels, "a byte for each weight of a projection"

    def is_eight(leaf):
        return isinstance(leaf, Int8)

    meant = jax.tree.map(lambda x: x.values * x.scale if is_eight(x) else x, kept, is_leaf=is_eight)
    logps = jax.jit(lambda weights: scoring.response_logps(config, weights, batch()).logps)
    np.testing.assert_allclose(logps(kept), logps(meant), atol=1e-5)
    assert 1e-4 < np.abs(np.asarray(logps(kept) - logps(weights))).max() < 0.3


def test_a_sampler_reads_norms_as_the_scorer_does(random_model):
    config, weights = trained(random_model, "gemma2", "bfloat16", 0)
    cast = decoder.cast_weights(config, weights)
    assert cast["params"]["final_norm"]["scale"].dtype == jnp.float32
    assert cast["params"]["layers"]["attn"]["q"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("name", "rank"), [("qwen3", 3), ("gpt2", 0)])
def test_log_probs_in_bfloat16_do_not_rest_on_which_casts_the_compiler_keeps(random_model, name, rank):
    config, weights = trained(random_model, name, "bfloat16", rank)
    found = []
    for excess in (True, False):
        options = {"xla_allow_excess_precision": excess}
        run = jax.jit(lambda w, rows: scoring.response_logps(config, w, rows).logps, compiler_options=options)
        found.append(np.asarray(run(weights, batch())))
    np.testing.assert_array_equal(*found)
