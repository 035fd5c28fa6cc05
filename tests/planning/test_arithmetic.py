"""Bytes by arithmetic against XLA's own figures for the same step, compiled for this CPU; and how they grow."""

import itertools

import jax
import pytest

from mpo_jax.planning import arithmetic
from mpo_jax.planning import compile as compiler
from tests.planning.case import model, one_cpu, program


def figures(stage: str, name: str, layers: int = 2, **options) -> tuple[int, int]:
    """Peak by XLA and by arithmetic, in bytes."""
    step, job = program(stage, name, model(layers=layers), **options)
    with jax.set_mesh(job.mesh):
        report = compiler.report(step, one_cpu(), job.mesh)
    return report.peak, report.arguments + report.held + arithmetic.temporaries(step.extent, job.mesh)


def reckoned(stage: str, name: str, layers: int = 2, **options) -> int:
    step, job = program(stage, name, model(layers=layers), **options)
    return sum(compiler.memory_held(step)) + arithmetic.temporaries(step.extent, job.mesh)


def test_sft_step_within_a_tenth_of_the_compilers_figure():
    compiled, by_arithmetic = figures("sft", "train")
    assert by_arithmetic == pytest.approx(compiled, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name", "options"),
    [
        ("sft", "train", {"layers": 6}),
        ("sft", "train", {"rows": 16}),
        ("sft", "train", {"prompt": 128}),
        ("sft", "train", {"remat": "none"}),
        ("sft", "train", {"remat": "dots"}),
        ("sft", "train", {"microbatch": 4}),
        ("sft", "train", {"lora": 4}),
        ("reward", "train", {}),
        ("dpo", "train", {}),
        ("dpo", "reference", {}),
        ("mpo", "rollout", {}),
        ("mpo", "experience", {}),
        ("mpo", "update", {}),
    ],
)
def test_every_program_within_a_tenth_of_the_compilers_figure(stage, name, options):
    compiled, by_arithmetic = figures(stage, name, **options)
    assert by_arithmetic == pytest.approx(compiled, rel=0.1)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_grows_linearly_in_layers_and_in_rows(remat):
    by_layers = [reckoned("sft", "train", layers=layers, remat=remat) for layers in (2, 4, 6)]
    by_rows = [reckoned("sft", "train", rows=rows, remat=remat) for rows in (8, 16, 24)]
    for sizes in (by_layers, by_rows):
        first, second = (after - before for before, after in itertools.pairwise(sizes))
        assert first > 0
        assert second == pytest.approx(first, rel=1e-3)


def test_adapters_need_less_than_full_fine_tuning():
    assert reckoned("mpo", "update", lora=4) < 0.7 * reckoned("mpo", "update")
