"""What needs an NVIDIA GPU: run by run_scripts/gpu_check.sh, skipped elsewhere."""

import dataclasses

import jax
import numpy as np
import pytest

from mpo_jax import allocator
from mpo_jax.models import attention
from run_scripts.gpu import numbers

pytestmark = pytest.mark.gpu


def test_auto_is_cudnn_on_this_card_and_is_what_runs():
    device = jax.devices()[0]
    model = numbers.tiny("bfloat16", "xla")
    chosen = attention.choose("auto", model, "gpu", 1, attention.compute_capability(device))
    assert chosen.backend == "cudnn", chosen.why
    q = jax.ShapeDtypeStruct((1, 33, model.heads, model.head_dim), "bfloat16")
    k = jax.ShapeDtypeStruct((1, 33, model.kv_heads, model.head_dim), "bfloat16")
    mask = jax.ShapeDtypeStruct((1, 33, 33), "bool")

    def run(q, k, v, mask):
        context = attention.RowContext(None, None, mask[:, 0], mask[:, 0], (mask,))
        return attention.attend_rows(dataclasses.replace(model, attention="cudnn"), q, k, v, np.int32(0), context)

    assert "cudnn" in jax.jit(run).lower(q, k, k, mask).compile().as_text().lower()


def test_rows_of_an_odd_length_and_grouped_heads_equal_the_formula():
    random = np.random.default_rng(0)
    q = random.standard_normal((2, 33, numbers.LONG["heads"], numbers.LONG["head_dim"]), np.float32)
    k, v = (random.standard_normal((2, 33, 2, numbers.LONG["head_dim"]), np.float32) for _ in range(2))
    mask = np.broadcast_to(np.tri(33, dtype=bool), (2, 33, 33))
    where = jax.devices()[0]
    exact, found = (numbers.attended(*how, q, k, v, mask, where) for how in (("float32", "xla"), ("bfloat16", "cudnn")))
    for what, error in numbers.distances(exact, found).items():
        assert error < 0.02, what


def test_the_card_that_this_process_fills_is_told_as_a_sentence(monkeypatch):
    """This process holds some of the card already, so that all of it can't be free."""
    jax.numpy.ones(1).block_until_ready()
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "1.0")
    with pytest.raises(allocator.InputError, match=r"GPU 0 .* are free, and this process would take"):
        allocator.check_card()
