"""A small model with adapters enters; what they change, what they leave alone, and what merging gives are checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mpo_jax import sharding
from mpo_jax.errors import InputError
from mpo_jax.models import decoder, lora
from mpo_jax.models.config import PROJECTIONS, LoraConfig

ALL = LoraConfig(rank=3, alpha=7.0, targets=PROJECTIONS)
TOKENS = np.arange(3, 27, dtype=np.int32).reshape(2, 12)
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
SEGMENTS = np.repeat([[1, 2]], 6, axis=1).repeat(2, axis=0).astype(np.int32)


def scores(config, weights):
    return decoder.scalar_head(weights, decoder.forward(config, weights, TOKENS, POSITIONS, SEGMENTS))


def loss(trainable, frozen, config):
    return jnp.mean((scores(config, trainable | frozen) - 1) ** 2)


@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_fresh_adapters_change_nothing_then_a_step_does_and_merging_gives_the_same(random_model, name):
    base, weights = random_model(name)
    targets = PROJECTIONS if base.gated_mlp else tuple(name for name in PROJECTIONS if name != "gate")
    config = dataclasses.replace(base, lora=dataclasses.replace(ALL, targets=targets))
    adapted = weights | lora.init(config, jax.random.key(0))
    run = jax.jit(scores, static_argnums=0)
    before = run(base, weights)
    np.testing.assert_array_equal(run(config, adapted), before)

    trainable, frozen = lora.split(adapted)
    assert set(trainable) == {"lora", "head"} and set(frozen) == {"params"}
    gradient = jax.jit(jax.grad(loss), static_argnums=2)(trainable, frozen, config)
    assert float(jnp.abs(gradient["head"]["kernel"]).max()) > 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient["lora"])[0]:
        assert (float(jnp.abs(leaf).max()) > 0) == (path[-1].key == "b"), path  # b is zero, so a gets its turn later

    stepped = jax.tree.map(lambda w, g: w - 0.5 * g / (1e-8 + jnp.abs(g).max()), trainable["lora"], gradient["lora"])
    adapted = frozen | trainable | {"lora": stepped}
    after = run(config, adapted)
    assert float(jnp.abs(after - before).max()) > 1e-2
    merged = lora.merge(config, adapted)
    assert set(merged) == {"params", "head"}
    np.testing.assert_allclose(run(base, merged), after, atol=2e-5)
    assert lora.merge(config, weights) is weights
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), merged["params"], weights["params"])
    for path, differs in jax.tree_util.tree_flatten_with_path(changed)[0]:
        names = [key.key for key in path]
        assert differs == (names[-1] == "kernel" and "layers" in names), names


def test_without_adapters_everything_is_trainable(random_model):
    _, weights = random_model("qwen2")
    trainable, frozen = lora.split(weights)
    assert set(trainable) == {"params", "head"} and frozen == {}


def test_values_are_the_same_on_any_mesh_and_stay_sharded_when_merged(random_model):
    base, weights = random_model("qwen2")
    config = dataclasses.replace(base, lora=LoraConfig(4, 8.0, ("q", "down")))
    mesh = sharding.make_mesh(1, 4, 2)
    whole, spread = lora.init(config, jax.random.key(1)), lora.init(config, jax.random.key(1), mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, spread)
    assert spread["lora"]["layers"]["attn"]["q"]["a"].sharding.spec == PartitionSpec(None, "fsdp", None)
    bound = np.abs(whole["lora"]["layers"]["mlp"]["down"]["a"]).max()
    assert 0.9 < bound * np.sqrt(config.mlp_width) <= 1
    stirred = jax.tree.map(lambda x: x + 0.1, spread)
    placed = jax.device_put(weights, sharding.tree_shardings(weights, mesh))
    merged = lora.merge(config, placed | stirred)
    same = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), merged["params"], placed["params"]
    )
    assert jax.tree.all(same)
    expected = lora.merge(config, weights | jax.tree.map(lambda x: x + 0.1, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged["params"], expected["params"])


def test_bad_targets_are_refused(random_model):
    base, _ = random_model("gpt2")
    config = dataclasses.replace(base, lora=LoraConfig(2, 2.0, ("q", "gate")))
    with pytest.raises(InputError, match=r"lora.targets: \['gate'\]; a gpt2 model has"):
        lora.init(config, jax.random.key(0))
    with pytest.raises(InputError, match=r"lora.targets: \['query'\]"):
        LoraConfig(2, 2.0, ("query",))
    with pytest.raises(InputError, match=r"lora.rank: 0"):
        LoraConfig(0, 2.0, ("q",))
    with pytest.raises(InputError, match=r"model.lora: none is set"):
        lora.init(base, jax.random.key(0))
