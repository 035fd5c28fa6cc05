"""Schedules against closed forms, AdamW against PyTorch, Adafactor against optax, and where the state lies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpo_jax import optim, sharding
from mpo_jax.errors import InputError
from mpo_jax.models import decoder
from mpo_jax.models.config import ModelConfig

MODEL = ModelConfig("gpt2", 300, 2, 32, 4, 4, 8, 64, 64, norm="layer", qkv_bias=True, o_bias=True, mlp_bias=True)


@pytest.mark.parametrize(
    ("kind", "end", "rates"),
    [
        ("constant", 0.0, [1, 2, 3, 4, 4, 4, 4, 4, 4]),
        ("linear", 0.0, [1, 2, 3, 4, 3, 2, 1, 0, 0]),
        ("linear", 0.5, [1, 2, 3, 4, 3.5, 3, 2.5, 2, 2]),
        ("cosine", 0.0, [1, 2, 3, 4, 2 + math.sqrt(2), 2, 2 - math.sqrt(2), 0, 0]),
        ("cosine", 0.5, [1, 2, 3, 4, 3 + math.sqrt(0.5), 3, 3 - math.sqrt(0.5), 2, 2]),
    ],
)
def test_schedules_by_hand(kind, end, rates):
    """Peak 4, 3 steps of warm-up, 7 in all; the last two are steps 7 and 8, after the end."""
    rate = optim.schedule(kind, 4.0, 3, 7, end)
    steps = np.arange(9)
    np.testing.assert_allclose([rate(int(step)) for step in steps], rates, atol=1e-12)
    np.testing.assert_allclose([rate(step) for step in steps], rates, atol=1e-12)
    np.testing.assert_allclose(jax.jit(rate)(jnp.arange(9)), rates, atol=1e-6)
    assert type(rate(2)) is float, "logging a rate may not ask the device"
    assert jax.jit(rate)(jnp.int32(2)).dtype == jnp.float32


def test_no_warmup_begins_at_the_peak():
    assert optim.schedule("cosine", 2.0, 0, 10)(0) == 2.0
    assert optim.schedule("linear", 2.0, 4, 4)(3) == pytest.approx(1.6)  # a run that only warms up


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("step", 1.0, 0, 9), "schedule: 'step'; expected one of constant, linear, cosine"),
        (("linear", 1.0, 10, 9), "warmup: 10 steps; expected 0 to the 9"),
        (("linear", 1.0, -1, 9), "warmup: -1"),
        (("linear", 1.0, 0, 9, 1.5), "end_fraction: 1.5"),
        (("linear", -1.0, 0, 9), "learning_rate: -1.0"),
        (("linear", math.nan, 0, 9), "learning_rate: nan"),
    ],
)
def test_schedule_errors(settings, message):
    with pytest.raises(InputError, match=message):
        optim.schedule(*settings)


def test_optimizer_errors():
    with pytest.raises(InputError, match="moments: 'float16'"):
        optim.make_optimizer(1e-3, moments="float16")
    with pytest.raises(InputError, match=r"clip_norm: 0\.0"):
        optim.make_optimizer(1e-3, clip_norm=0.0)


def parameters(seed: int = 0):
    shapes = {"q": {"kernel": (3, 5), "bias": (5,)}, "norm": {"scale": (4,)}, "embed": {"embedding": (6, 2)}}
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.asarray(generator.normal(size=shape), np.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )


def gradients(step: int):
    """Norms from about 0.5 to 50, so that some steps clip and some don't."""
    return jax.tree.map(lambda x: x * np.float32(0.1 if step % 3 == 0 else 3.0 * step), parameters(100 + step))


def run(optimizer, steps: int, names=("q", "norm", "embed")):
    """Parameters and state after some steps on the named parts of `parameters`."""

    @jax.jit
    def step_fn(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {name: parameters()[name] for name in names}
    state = jax.jit(optimizer.init)(params)
    for step in range(steps):
        grads = gradients(step)
        params, state = step_fn(params, state, {name: grads[name] for name in names})
    return params, state


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_equals_torch(torch, clip, decay):
    rate = optim.schedule("cosine", 0.05, 3, 12, 0.1)
    ours, _ = run(
        optim.make_optimizer(rate, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=decay, clip_norm=clip), steps=12
    )
    leaves, structure = jax.tree.flatten(parameters())
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in leaves]
    decays = jax.tree.leaves(optim.decayed(parameters()))
    groups = [
        {"params": [leaf for leaf, mine in zip(theirs, decays, strict=True) if mine == whether], "weight_decay": d}
        for whether, d in ((True, decay), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-6)
    norms = []
    for step in range(12):
        for leaf, gradient in zip(theirs, jax.tree.leaves(gradients(step)), strict=True):
            leaf.grad = torch.tensor(np.asarray(gradient))
        norms.append(float(optax.tree.norm(gradients(step))))
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(theirs, clip)
            assert float(norm) == pytest.approx(norms[-1], rel=1e-5)
        for group in adamw.param_groups:
            group["lr"] = rate(step)
        adamw.step()
    assert min(norms) < 1 < max(norms), "both cases of clipping must occur"
    found = jax.tree.unflatten(structure, [leaf.detach().numpy() for leaf in theirs])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), ours, found)


def test_every_setting_changes_the_parameters():
    settings = {"beta1": 0.5, "beta2": 0.5, "eps": 0.1, "weight_decay": 0.5, "clip_norm": 0.1, "moments": "factored"}
    base = run(optim.make_optimizer(0.05), 4, ["q"])[0]
    for name, value in settings.items():
        changed = run(optim.make_optimizer(0.05, **{name: value}), 4, ["q"])[0]
        assert not np.allclose(changed["q"]["kernel"], base["q"]["kernel"], atol=1e-5), name


def test_decay_spares_norms_biases_and_embeddings():
    weights = jax.eval_shape(lambda: decoder.init(MODEL, jax.random.key(0), head=True))
    weights |= {"lora": {"layers": {"attn": {"q": {"a": np.ones((2, 32, 4)), "b": np.ones((2, 4, 4, 8))}}}}}
    spared = {sharding.weight_name(path) for path, yes in jax.tree.leaves_with_path(optim.decayed(weights)) if not yes}
    names = {sharding.weight_name(path) for path, _ in jax.tree.leaves_with_path(weights)}
    assert spared == {name for name in names if name.endswith(("scale", "bias", "embedding"))}
    assert {"params/lm_head/kernel", "head/kernel", "lora/layers/attn/q/a", "lora/layers/attn/q/b"} <= names - spared
    still = jax.tree.map(np.zeros_like, parameters())
    optimizer = optim.make_optimizer(0.5, weight_decay=0.5)
    updates, _ = optimizer.update(still, optimizer.init(parameters()), parameters())
    np.testing.assert_allclose(updates["q"]["kernel"], -0.25 * parameters()["q"]["kernel"], rtol=1e-6)
    assert not any(np.any(updates[a][b]) for a, b in (("q", "bias"), ("norm", "scale"), ("embed", "embedding")))


def test_bfloat16_moments_are_stored_so_and_stay_close():
    wide, _ = run(optim.make_optimizer(0.05), 12)
    narrow, state = run(optim.make_optimizer(0.05, moments="bfloat16"), 12)
    assert {leaf.dtype for leaf in jax.tree.leaves(state[1].mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state[1].nu)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.float32)}
    # 12 steps of 0.05; the moment is rounded by up to 2^-9 of itself each.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=12 * 0.05 * 2**-7), narrow, wide)
    assert not np.array_equal(narrow["q"]["kernel"], wide["q"]["kernel"])


def test_factored_equals_optax_adafactor_and_is_small():
    generator = np.random.default_rng(0)
    params = {"kernel": generator.normal(size=(2, 128, 256)).astype(np.float32), "bias": np.ones(256, np.float32)}
    ours = optim.make_optimizer(0.1, moments="factored")
    theirs = optax.adafactor(0.1, multiply_by_parameter_scale=False, clipping_threshold=1.0)
    a, b = ours.init(params), theirs.init(params)
    update = jax.jit(lambda grads, a, b: (ours.update(grads, a, params), theirs.update(grads, b, params)))
    for step in range(3):
        (ua, a), (ub, b) = update(jax.tree.map(lambda x, step=step: np.sin(x * (step + 1)), params), a, b)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), ua, ub)
    size = sum(leaf.size for leaf in jax.tree.leaves(a))
    assert size < sum(leaf.size for leaf in jax.tree.leaves(params)) / 50


def test_factored_first_step_by_hand():
    """Where the squared gradient is an outer product, the factors are exact: the first update is the gradient's sign
    (decay 1 - 1^-0.8 = 0), of root mean square 1, so that nothing is bounded."""
    rows, columns = np.arange(1.0, 129.0).reshape(128, 1), np.arange(-63.5, 64.0).reshape(1, 128)
    params = {"kernel": np.zeros((128, 128), np.float32)}
    optimizer = optim.make_optimizer(0.5, moments="factored")
    updates, _ = jax.jit(optimizer.update)({"kernel": np.float32(rows * columns)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * np.sign(rows * columns), rtol=1e-4)


def test_by_label_gives_each_its_own_rate_and_clip():
    params = {"policy": parameters(0), "value": parameters(1)}
    grads = {"policy": gradients(1), "value": gradients(2)}
    params = {name: {"q": tree["q"]} for name, tree in params.items()}
    grads = {name: {"q": tree["q"]} for name, tree in grads.items()}
    each = {
        "policy": optim.make_optimizer(optim.schedule("linear", 0.01, 2, 9), weight_decay=0.1, clip_norm=1.0),
        "value": optim.make_optimizer(0.3, moments="bfloat16", clip_norm=0.5),
    }
    both = optim.by_label(each)
    state = both.init(params)
    alone = {name: optimizer.init(params[name]) for name, optimizer in each.items()}
    update, updates_alone = jax.jit(both.update), {name: jax.jit(optimizer.update) for name, optimizer in each.items()}
    for _ in range(3):
        updates, state = update(grads, state, params)
        for name in each:
            expected, alone[name] = updates_alone[name](grads[name], alone[name], params[name])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates[name], expected)
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match="no corresponding transformation"):
        both.init({"policy": params["policy"], "critic": params["value"]})


def placed(mesh):
    weights = jax.eval_shape(lambda: decoder.init(MODEL, jax.random.key(0), head=True))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        weights,
        sharding.tree_shardings(weights, mesh),
    )


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "factored"])
def test_moments_lie_as_their_parameters(moments):
    mesh = sharding.make_mesh(2, 2, 2)
    params = {"policy": placed(mesh), "value": placed(mesh)}
    optimizer = optim.by_label(
        {
            "policy": optim.make_optimizer(0.1, weight_decay=0.1, clip_norm=1.0, moments=moments),
            "value": optim.make_optimizer(optim.schedule("linear", 0.1, 2, 9), moments=moments),
        }
    )
    where = optim.state_shardings(optimizer, params, mesh)
    shapes = jax.eval_shape(optimizer.init, params)
    by_name = {sharding.weight_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    moved = 0
    for (path, shape), sharded in zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(where), strict=True):
        name = next((n for n in by_name if f"/{sharding.weight_name(path)}".endswith(f"/{n}")), None)
        if name is not None and shape.shape == by_name[name].shape:
            assert sharded == by_name[name].sharding, name
            moved += sharded.spec != sharding.replicated(mesh).spec
        else:
            assert sharded == sharding.replicated(mesh)
    assert moved > (0 if moments == "factored" else 20)


def test_the_update_leaves_the_state_where_it_lay():
    mesh = sharding.make_mesh(1, 4, 2)
    layers = placed(mesh)["params"]["layers"]
    params = {"params": {"layers": {"mlp": layers["mlp"], "attn_norm": layers["attn_norm"]}}}
    params = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), params)
    optimizer = optim.make_optimizer(0.1, weight_decay=0.1, clip_norm=1.0)
    where = optim.state_shardings(optimizer, params, mesh)
    state = jax.jit(optimizer.init, out_shardings=where)(params)
    updates, after = jax.jit(optimizer.update)(params, state, params)

    def same(x, sharded):
        assert x.sharding.is_equivalent_to(sharded, x.ndim)

    jax.tree.map(same, after, where)
    jax.tree.map(lambda x, p: same(x, p.sharding), updates, params)
