"""The plan's command line: what it prints and writes, what it proposes, and what it says to names that can't be."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from mpo_jax import settings
from mpo_jax.errors import InputError
from mpo_jax.models import attention, presets
from mpo_jax.models.config import ModelConfig
from mpo_jax.planning import chips, estimate, proposal, report, stages
from mpo_jax.planning import compile as compiler
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.known import Known
from mpo_jax.stages import kinds
from tests.planning import case


@pytest.fixture
def small(monkeypatch):
    """The base model of `case.config`, small."""
    monkeypatch.setattr(presets, "find", lambda path: case.model())


def gpu(memory: int) -> chips.Topology:
    chip = dataclasses.replace(chips.GPUS[80], memory=memory)
    return chips.Topology("gpu:80GB", chip, tuple(jax.devices("cpu")[:1]), compiled=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e:3x5", "no slice '3x5' of v5e; expected v5e: and one of 1x1, 2x2, 2x4, 4x4, 4x8"),
        ("v4:4x8", "no slice '4x8' of v4; expected v4: and one of 2x2x1"),
        ("v9:2x2", "unknown 'v9:2x2'; did you mean 'v3:2x2'\\? expected v3: 2x2 4x4"),
        ("gpu:81GB", "expected gpu:16GB, gpu:24GB, gpu:40GB, gpu:48GB, gpu:80GB"),
        ("gpu:80", "or up to 1024 of one as gpu:8x80GB"),
        ("gpu:100000x80GB", "up to 1024 of one"),
        ("GPU:80GB", "expected gpu:16GB, gpu:24GB"),
    ],
)
def test_a_topology_that_does_not_exist_lists_those_that_do(name, words):
    with pytest.raises(InputError, match=words):
        chips.topology(name)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"v5e:4x8 is compiled by libtpu, .*pip install 'jax\[tpu\]'`, or take cpu"):
        chips.topology("v5e:4x8")


def test_a_mesh_that_does_not_divide_lists_meshes_that_would(small):
    config = case.config(tensor=3)
    with pytest.raises(InputError, match=r"needs 3 devices; found 1 on cpu; meshes that would work: data=1, fsdp=1"):
        stages.jobs(config, case.one_cpu())


def test_a_batch_that_the_mesh_does_not_divide_lists_meshes_that_would(small):
    place = chips.topology("cpu")
    assert place.size >= 4, "tests run on several CPU devices"
    with pytest.raises(InputError, match=r"stages\.sft\.batch_size: 2 .*by mesh .*: data=1, fsdp=2, tensor="):
        stages.jobs(case.config(rows=2), place, ["sft"])


def test_a_gpu_is_reckoned_with_the_attention_it_would_choose(small):
    """cuDNN holds no logits: the plan of one GPU needs less than with xla."""

    def temporaries(attention: str) -> int:
        config = case.config(remat="none", prompt=512, response=256)
        config = settings.replaced(config, {"model.attention": attention, "mesh.tensor": 1})
        place = gpu(80_000_000_000)
        found = stages.plan(stages.jobs(config, place, ["dpo"])["dpo"], place, Assumptions(), ["train"])
        return found.programs["train"].report.temporaries

    assert temporaries("auto") < 0.9 * temporaries("xla")


@pytest.mark.parametrize(("size", "backend"), [(24, "xla"), (40, "xla"), (48, "xla"), (80, "cudnn")])
def test_a_head_size_that_only_hopper_computes_is_planned_by_the_card(size, backend):
    """A head_dim of 256, as Gemma's: cuDNN computes it from compute capability 9.0 on."""
    model = ModelConfig("llama", 100, 1, 256, 1, 1, 256, 32, 64, dtype="bfloat16")
    assert attention.choose("auto", model, "gpu", 1, chips.GPUS[size].capability).backend == backend


def test_every_kind_of_stage_has_its_programs(small):
    config = case.config()
    found = {}
    for job in stages.jobs(config, case.one_cpu()).values():
        with jax.set_mesh(job.mesh):
            found[job.settings.kind] = set(kinds.of(job.settings).programs(job))
    assert found == {
        "sft": {"train", "evaluate"},
        "reward": {"train", "evaluate", "score"},
        "split": {"sample", "score_samples"},
        "dpo": {"reference", "train", "evaluate"},
        "ppo": {"rollout", "experience", "update", "measure"},
        "evaluate": {"sample", "logps", "score"},
    }


def test_equal_programs_of_two_stages_are_compiled_once(small, monkeypatch):
    """dpo and dpo_full differ in their pairs alone; another batch is another program."""
    compiles = []
    monkeypatch.setattr(
        compiler.hlo,
        "parse",
        lambda text, loops, parse=compiler.hlo.parse: compiles.append(loops) or parse(text, loops),
    )
    known = Known()
    place = case.one_cpu()

    def reference(config, stage: str) -> compiler.Report:
        job = stages.jobs(config, place, [stage])[stage]
        return stages.plan(job, place, Assumptions(), ["reference"], known).programs["reference"].report

    first = reference(case.config(), "dpo")
    assert reference(case.config(), "dpo_full") == first and first.peak > 0
    assert known.programs == known.compiles == len(compiles) == 1
    assert reference(case.config(rows=16), "dpo").temporaries > first.temporaries
    assert known.programs == known.compiles == len(compiles) == 2


def test_a_plan_by_arithmetic_says_so_and_holds_what_it_promises(small):
    place = gpu(80_000_000_000)
    config = case.config()
    jobs = stages.jobs(config, place, ["dpo", "mpo"])
    plans = {name: stages.plan(job, place, Assumptions()) for name, job in jobs.items()}
    found = report.as_json(place, jobs["dpo"].mesh.shape, plans, {}, Assumptions())
    json.dumps(found)
    assert found["source"] == "arithmetic"
    assert found["stages"]["dpo"]["fits"] is True
    assert found["stages"]["mpo"]["peak_bytes_per_chip"] > found["stages"]["dpo"]["peak_bytes_per_chip"] > 0
    assert "BY ARITHMETIC" in report.heading(config, place, jobs["dpo"].mesh.shape, Assumptions())
    assert report.lines("mpo", plans["mpo"]).count("mpo/") == 4


def test_accelerators_compute_in_bfloat16_in_a_plan_by_arithmetic(small):
    job = stages.jobs(case.config(), gpu(1), ["dpo"])["dpo"]
    with jax.set_mesh(job.mesh):
        assert kinds.of(job.settings).programs(job)["train"].extent.model.dtype == "bfloat16"


def test_what_does_not_fit_is_proposed_with_the_change_that_makes_it_fit(small):
    config = case.config(remat="none")
    roomy = gpu(1 << 40)
    peaks = {}
    for remat in ("none", "full"):
        changed = settings.replaced(config, {"stages.sft.remat": remat})
        job = stages.jobs(changed, roomy, ["sft"])["sft"]
        peaks[remat] = stages.plan(job, roomy, Assumptions()).peak
    tight = gpu((peaks["none"] + peaks["full"]) // 2)
    found = proposal.propose(config, "sft", ["train"], tight, Assumptions())
    assert found.flags == ("--config.stages.sft.remat=full",)
    assert found.plan is not None and found.plan.fits
    nothing = proposal.propose(config, "sft", ["train"], gpu(1000), Assumptions())
    assert nothing.plan is None


def test_chip_hours_follow_the_data():
    one = estimate.Seconds(work=2.0, memory=1.0, collectives=0.5)
    assert (one.total, one.bound) == (2.0, "work")
    job = stages.jobs(case.config(rows=8), case.one_cpu(), ["sft"])["sft"]
    # 0.45 of 8,000 pairs are the sft share: 3,600 rows, 450 steps of 8.
    kind = kinds.of(job.settings)
    assert kind.rows(job, 8000, 0.5) == 3600
    with jax.set_mesh(job.mesh):
        assert estimate.calls(job, kind.programs(job)["train"], Assumptions(pairs=8000)) == 450


@pytest.mark.parametrize(("name", "billions"), [("llama2-7b", 6.74), ("llama2-13b", 13.0), ("llama-30b", 32.5),
                                                ("llama2-70b", 69.0), ("llama3-8b", 8.03), ("pythia-1b", 1.01),
                                                ("qwen2.5-0.5b", 0.494)])  # fmt: skip
def test_presets_have_the_published_number_of_weights(name, billions):
    assert presets.parameters(presets.find(name).architecture) / 1e9 == pytest.approx(billions, rel=0.01)


def test_an_unknown_model_suggests_the_nearest_preset():
    with pytest.raises(InputError, match="did you mean 'llama2-7b'"):
        presets.find("llama2-7")
