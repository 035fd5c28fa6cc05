"""A run's settings and a platform enter; the dtype of frozen weights and the backend of attention leave."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from mpo_jax import settings
from mpo_jax.errors import InputError
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from tests.planning import case


@pytest.mark.parametrize(
    ("platform", "dtype", "frozen", "expected"),
    [
        ("gpu", "auto", "auto", "bfloat16"),
        ("gpu", "bfloat16", "auto", "bfloat16"),
        ("gpu", "mixed", "auto", "bfloat16"),
        ("gpu", "float32", "auto", "float32"),
        ("gpu", "float32", "bfloat16", "bfloat16"),
        ("cpu", "auto", "auto", "float32"),
        ("cpu", "mixed", "auto", "float32"),
        ("cpu", "bfloat16", "auto", "float32"),
        ("gpu", "auto", "int8", "int8"),
        ("cpu", "float32", "int8", "int8"),
    ],
)
def test_a_frozen_policy_is_kept_as_exactly_as_it_is_computed_with(platform, dtype, frozen, expected):
    """Found on a GPU: with dtype=float32, auto kept the reference in bfloat16, and the first loss was not ln 2."""
    model = SimpleNamespace(dtype=dtype, frozen_dtype=frozen)
    assert jobs.frozen_dtype(SimpleNamespace(platform=platform, config=SimpleNamespace(model=model))) == expected


def test_eight_bits_are_refused_on_several_devices():
    planned = case.job("dpo", case.one_cpu(), case.model())
    narrow = dataclasses.replace(planned, config=settings.replaced(planned.config, {"model.frozen_dtype": "int8"}))
    jobs.check(narrow)
    several = dataclasses.replace(narrow, mesh=jax.make_mesh((1, 2, 1), ("data", "fsdp", "tensor")))
    with pytest.raises(InputError, match=r"^model\.frozen_dtype: int8 is for one device; found 2$"):
        jobs.check(several)


def test_a_gpu_computes_attention_by_cudnn_and_a_cpu_by_xla(monkeypatch):
    planned = case.job("dpo", case.one_cpu(), case.model())
    assert planned.config.model.attention == "auto"
    assert jobs.model(planned).attention == "xla"
    monkeypatch.setattr(Job, "platform", "gpu")
    assert jobs.model(planned).attention == "cudnn"
    by_hand = settings.replaced(planned.config, {"model.attention": "xla"})
    assert jobs.model(dataclasses.replace(planned, config=by_hand)).attention == "xla"
    monkeypatch.undo()
    several = dataclasses.replace(planned, mesh=jax.make_mesh((1, 2, 1), ("data", "fsdp", "tensor")))
    monkeypatch.setattr(Job, "platform", "gpu")
    assert jobs.model(several).attention == "xla"
