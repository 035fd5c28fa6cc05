"""Both stages on a real tiny LLaMA in every dtype, whole and as adapters: before the first update the policy is its
reference, so the loss of DPO is ln 2, and in PPO the KL is 0 and the ratio 1. `pytest -s -m slow` prints the table."""

import jax
import numpy as np
import pytest

from mpo_jax import metrics
from mpo_jax.stages import dpo
from mpo_jax.stages.ppo import stage as ppo
from tests.stages.ppo_job import beside, make_job, part, replaced

CASES = [
    pytest.param(dtype, rank, id=f"{dtype}-{'lora' if rank else 'full'}", marks=marks)
    for dtype, rank, marks in (
        ("float32", 0, pytest.mark.slow),
        ("float32", 4, pytest.mark.slow),
        ("mixed", 0, pytest.mark.slow),
        ("mixed", 4, pytest.mark.slow),
        ("bfloat16", 0, ()),
        ("bfloat16", 4, pytest.mark.slow),
    )
]
ROUNDING = 1e-6
"""Of log-probs near 10 in float32: an ulp. Sums over a reply's tokens have more of it."""


def first_step(job, stage):
    job.folder.mkdir()
    with jax.set_mesh(job.mesh):
        stage.run(job)
    return metrics.read(job.folder)[0]


@pytest.mark.parametrize(("dtype", "rank"), CASES)
def test_before_the_first_update_the_policy_is_its_reference(tmp_path, stories, dtype, rank):
    job = make_job(tmp_path, stories, rank=rank, steps=1, inner_epochs=1, minibatches=1, temperature=0.7)
    frozen = "float32" if dtype == "float32" else "bfloat16"
    job = replaced(job, {"model.dtype": dtype, "model.frozen_dtype": frozen, "data.max_buckets": 1})

    start = first_step(job, ppo)
    kl, ratio = max(abs(start[name]) for name in ("kl", "kl_k3", "kl_error")), start["ratio_deviation_first"]

    inputs = dict.fromkeys(("init", "reference"), job.inputs["init"]) | {"pairs": part(job.inputs["prompts"], "all")}
    begun = first_step(beside(job, "dpo", "dpo", "dpo_stage", inputs, batch_size=8, steps=1, pairs="split/all"), dpo)
    loss, of_pairs = begun["loss"] - np.log(2), max(abs(begun["kl_chosen"]), abs(begun["kl_rejected"]))

    print(
        f"{dtype}, rank {rank}: dpo loss - ln 2 {loss:.1e}, KL {of_pairs:.1e}; ppo KL {kl:.1e}, |ratio - 1| {ratio:.1e}"
    )
    assert kl <= 10 * ROUNDING and ratio <= ROUNDING
    assert abs(loss) <= ROUNDING and of_pairs <= 10 * ROUNDING


def test_over_a_base_in_eight_bits_adapters_begin_at_their_reference(tmp_path, stories):
    """Policy and reference share the base, so its rounding is no KL; the sampler draws from it too."""
    job = make_job(tmp_path, stories, rank=4, steps=1, inner_epochs=1, minibatches=1)
    job = replaced(job, {"model.frozen_dtype": "int8", "data.max_buckets": 1})
    start = first_step(job, ppo)
    assert max(abs(start[name]) for name in ("kl", "kl_k3", "kl_error")) <= 10 * ROUNDING
    assert start["ratio_deviation_first"] <= 10 * ROUNDING
    assert start["sampler_scorer_difference"] < 1e-3


@pytest.mark.slow
def test_beside_a_reference_in_eight_bits_a_policy_begins_at_a_small_kl(tmp_path, stories):
    job = make_job(tmp_path, stories, steps=1, inner_epochs=1, minibatches=1)
    start = first_step(replaced(job, {"model.frozen_dtype": "int8", "data.max_buckets": 1}), ppo)
    print(f"int8 reference: k3 {start['kl_token_k3']:.1e} nats a token")
    assert 1e-7 < start["kl_token_k3"] < 1e-2 and start["ratio_deviation_first"] <= ROUNDING
