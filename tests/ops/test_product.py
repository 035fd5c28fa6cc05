"""Small matrices enter the mixed product; values and gradients are held against NumPy on rounded operands."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpo_jax.models import decoder
from mpo_jax.models.config import ModelConfig, compute_dtype
from mpo_jax.ops import product as product_module
from mpo_jax.ops.product import product, products, quantise


def rounded(x) -> np.ndarray:
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def operands(rows: int, inner: int, outer: int, transposed: bool):
    random = np.random.default_rng(rows)
    x = random.normal(size=(rows, inner)).astype(np.float32)
    weight = random.normal(size=(outer, inner) if transposed else (inner, outer)).astype(np.float32)
    return x, weight, random.normal(size=(rows, outer)).astype(np.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(64, 32, 96), (5, 7, 3), (33, 64, 32)])
def test_mixed_product_and_its_gradients_are_float32_sums_of_bfloat16_operands(sizes, transposed):
    x, weight, gradient = operands(*sizes, transposed)
    out, back = jax.vjp(lambda x, w: product(x, w, "bfloat16", transposed=transposed), x, weight)
    of_x, of_weight = back(jnp.asarray(gradient))
    assert out.dtype == of_x.dtype == of_weight.dtype == jnp.float32
    matrix = rounded(weight).T if transposed else rounded(weight)
    expected = rounded(x).T @ rounded(gradient)
    np.testing.assert_allclose(out, rounded(x) @ matrix, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, rounded(gradient) @ matrix.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_weight, expected.T if transposed else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [4, 300], ids=["few rows", "many rows"])
def test_products_of_one_input_are_its_products(rows):
    x, weight, gradient = operands(rows, 8, 10, False)
    parts = [weight[:, :3], weight[:, 3:4], weight[:, 4:]]
    together, back = jax.vjp(lambda x, *w: jnp.concatenate(products(x, w, "bfloat16"), axis=-1), x, *parts)
    alone, back_alone = jax.vjp(lambda x, w: product(x, w, "bfloat16"), x, weight)
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    of_x, *of_parts = back(jnp.asarray(gradient))
    of_x_alone, of_weight = back_alone(jnp.asarray(gradient))
    np.testing.assert_allclose(of_x, of_x_alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.concatenate(of_parts, axis=1), of_weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_elsewhere_it_is_the_plain_product(dtype):
    x, weight, _ = operands(6, 8, 4, False)
    x = jnp.asarray(x, dtype)
    out = product(x[None], weight, dtype)
    assert out.dtype == x.dtype and out.shape == (1, 6, 4)
    np.testing.assert_array_equal(out[0], x @ jnp.asarray(weight, dtype))
    assert product(x, weight, dtype, result=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("transposed", [False, True])
def test_a_transpose_behind_a_mixed_product_runs_on_the_cpu(transposed):
    """jaxlib 0.10.2 folds it into the product, which its runtime then refuses (DotThunk: BF16 x BF16 = F32)."""
    x, weight, _ = operands(64, 32, 96, transposed)

    @jax.jit
    def behind(x, weight):
        out, back = jax.vjp(lambda x, w: product(x, w, "bfloat16", transposed=transposed), x, weight)
        return [found.T * 2 for found in (out, *back(out))]

    for found, like in zip(behind(x, weight), (np.zeros((64, 96)), x, weight), strict=True):
        assert found.shape == like.T.shape and np.isfinite(found).all()


def test_a_model_in_mixed_is_the_model_within_bfloat16():
    """Loss and gradients of a decoder: near the float32 ones, and not the same."""
    exact = ModelConfig("llama", 100, 2, 32, 4, 2, 8, 64, 64, tied_embeddings=True)
    weights = decoder.init(exact, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 100)
    positions = jnp.broadcast_to(jnp.arange(16), (2, 16))

    def loss(config):
        def of(weights):
            hidden = decoder.forward(config, weights, tokens, positions, jnp.ones_like(tokens))
            logps = jax.nn.log_softmax(decoder.logits(config, weights, hidden)[..., :100])
            return -jnp.mean(jnp.take_along_axis(logps, tokens[..., None], axis=-1))

        return jax.jit(jax.value_and_grad(of))(weights)

    (near, grads), (found, mixed) = loss(exact), loss(dataclasses.replace(exact, dtype="mixed"))
    assert 0 < abs(float(near - found)) < 1e-2
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(mixed), strict=True):
        assert b.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) <= 0.03 * jnp.linalg.norm(a) + 1e-6


def test_eight_bits_by_hand():
    weight = jnp.asarray([[1.27, 0.0, -4.0], [-0.635, 0.0, 0.5]])  # two inputs, three outputs
    kept = quantise(weight, [0])
    np.testing.assert_array_equal(kept.values, [[127, 0, -127], [-64, 0, 16]])  # -63.5 goes to the even one
    np.testing.assert_allclose(kept.scale, [[0.01, 0, 4 / 127]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_product_with_eight_bits_is_the_one_with_what_they_mean(stored, dtype):
    if (stored, dtype) == ("bfloat16", "float32"):
        pytest.skip("activations are never narrower than operands")
    x, weight, gradient = operands(33, 64, 32, False)
    x = jnp.asarray(x, stored)
    kept = quantise(jnp.asarray(weight), [0])
    out, back = jax.vjp(lambda x: product(x, kept.reshape(64, -1), dtype), x)
    (of_x,) = back(jnp.asarray(gradient, stored))
    assert out.dtype == of_x.dtype == x.dtype
    meant = np.asarray(kept.values) * np.asarray(kept.scale, np.float64)
    assert np.abs(meant - weight).max() <= np.abs(weight).max() / 254 * 1.001
    rounding = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64), np.asarray(x, np.float64) @ meant, atol=8 * rounding)
    np.testing.assert_allclose(np.asarray(of_x, np.float64), gradient @ meant.T, atol=8 * rounding)


CPUINFO = "processor\t: 0\nflags\t\t: fpu sse avx2 avx512f{}\nbugs\t\t: none\n"


@pytest.mark.parametrize(
    ("told", "flags", "fast"),
    [
        (CPUINFO.format(" avx512_bf16"), "", True),
        (CPUINFO.format(""), "", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", "", False),
        (None, "", False),
        (CPUINFO.format(" avx512_bf16"), "--xla_cpu_max_isa=AVX2 --xla_dump_to=x", False),
        (CPUINFO.format(" avx512_bf16"), "--xla_cpu_max_isa=avx512_vnni", False),
        (CPUINFO.format(" avx512_bf16"), "--xla_cpu_max_isa=AMX", True),
    ],
)
def test_auto_on_a_cpu_goes_by_what_the_processor_and_xla_may(told, flags, fast, tmp_path, monkeypatch):
    """By the kernel's words for processors with and without AVX512-BF16, of another kind, and where there are none."""
    file = tmp_path / "cpuinfo"
    if told is not None:
        file.write_text(told)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(product_module, "_CPUINFO", file)
    product_module.fast_on_this_cpu.cache_clear()
    try:
        assert product_module.fast_on_this_cpu() is fast
        assert compute_dtype("auto", "cpu") == ("mixed" if fast else "float32")
        assert compute_dtype("auto", "tpu") == compute_dtype("mixed", "gpu") == "bfloat16"
        assert compute_dtype("mixed", "cpu") == "mixed" and compute_dtype("float32", "gpu") == "float32"
    finally:
        product_module.fast_on_this_cpu.cache_clear()
