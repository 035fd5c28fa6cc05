"""Every train step and sampler of the package enters, with shapes alone; programs for an NVIDIA GPU leave, on a machine
without one. Lowering is all that can be done here: kernels are chosen and built where the card is.
"""

import dataclasses
import re

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from mpo_jax.stages import job as jobs
from mpo_jax.stages import kinds
from tests.planning import case

CALLS = ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")


@pytest.mark.parametrize("attention", ["xla", "cudnn"])
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("sft", "train"),
        ("reward", "train"),
        ("dpo", "train"),
        ("dpo", "reference"),
        ("mpo", "update"),
        ("mpo", "rollout"),
    ],
)
def test_steps_lower_for_cuda(monkeypatch, stage, name, attention):
    """As they compute on a GPU: bfloat16, layers in a loop. JAX asks cuDNN, absent here, for its version."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_000)
    planned = case.job(stage, case.one_cpu(), case.model(), rows=2, prompt=16, response=8, remat="none")
    model = dataclasses.replace(jobs.model(planned), dtype="bfloat16", attention=attention, unroll=False)
    monkeypatch.setattr(jobs, "model", lambda job: model)
    checks = [jax.export.DisabledSafetyCheck.custom_call(call) for call in CALLS]
    with jax.set_mesh(planned.mesh):
        program = kinds.of(planned.settings).programs(planned)[name]
        export = jax.export.export(program.function, platforms=["cuda"], disabled_checks=checks)
        text = export(*program.arguments).mlir_module()
    found = set(re.findall(r"__cudnn\$fmha\w+", text))
    expected = CALLS if name in ("train", "update") else CALLS[:1]
    assert found == (set(expected) if attention == "cudnn" else set())
