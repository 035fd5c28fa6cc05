"""A small run of every kind of stage enters; what it compiled is held against the programs that a plan is made from."""

import dataclasses
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from mpo_jax import artifacts, metrics, recipes
from mpo_jax.artifacts import POLICY
from mpo_jax.errors import InputError
from mpo_jax.models import decoder
from mpo_jax.run import as_json
from mpo_jax.settings import replaced
from mpo_jax.stages import buckets, candidates, kinds, rows, shards
from mpo_jax.stages.job import Artifact, Job
from tests.evaluation import made
from tests.stages import ppo_job, split_job, test_judge_stage
from tests.stages.ppo_job import part
from tests.tools import reward_models

TRAINING = {"batch_size": 8, "steps": 1, "eval_batches": 1}
UNPLANNED = {
    "init_fn": "the optimizer's first state, once, before the first step; the state itself is an argument of every step"
}
"""Jitted functions of stages that no plan lists, and why."""
AHEAD = {
    "sft": {"train", "evaluate"},
    "reward": {"train", "evaluate", "score"},
    "pairs": {"sample"},
    "split": {"score"},
    "dpo": {"train", "evaluate"},
    "kto": {"train", "evaluate"},
    "ppo": {"rollout", "experience", "update", "measure"},
    "ppo, replaying pairs": {"rollout", "experience", "update", "measure"},
    "ppo, two samples by another scorer": {"rollout", "look", "evaluation_rollout"},
    "evaluate": {"sample", "logps", "score"},
}
"""Programs that are compiled before their first call, by case, at the least."""
FORESEEN = {
    "sft": {"train", "evaluate"},
    "sft, on a split's pairs": {"train", "evaluate"},
    "reward": {"train", "evaluate", "score"},
    "pairs": {"sample"},
    "split": {"sample", "score"},
    "split, by all measures": {"score"},
    "split, cross-fitted": {"score"},
    "dpo": {"reference", "train", "evaluate"},
    "dpo, a moving reference": {"reference", "train", "evaluate"},
    "dpo, without a reference": {"train", "evaluate"},
    "kto": {"reference", "train", "evaluate"},
    "ppo": {"rollout", "experience", "update", "measure"},
    "ppo, replaying pairs": {"rollout", "experience", "update", "measure", "replay_reference"},
    "ppo, two samples by another scorer": {"rollout", "look", "evaluation_rollout"},
    "ppo, by a sum": {"rollout", "look", "evaluation_rollout"},
    "ppo, by a model of the same tokens": {"rollout", "look"},
    "split, by others": {"sample"},
    "evaluate": {"sample"},
}
"""Programs of which a kind says before the stage begins with which shapes they will be called (`base.Stage.calls`)."""


def on_data(kind: str, **settings):
    """A stage that reads the data and begins with the base model."""

    def job(folder, shared) -> Job:
        base = {"init": Artifact("base", POLICY, shared / "models/stories260K")}
        return split_job.make_job(folder, shared, kind, inputs=base, **(TRAINING | settings))

    return job


def sampling(kind: str, **settings):
    """A stage that samples replies to the data's prompts."""
    return lambda folder, shared: split_job.make_job(folder, shared, kind, limit=30, **settings)


def measured(folder, shared) -> Job:
    """A split whose gaps are of everything at once, with a second reward model."""
    job = split_job.make_job(folder, shared)
    roles = {"implicit": "policy", "reference": "policy", "second": "reward"}
    inputs = job.inputs | {role: job.inputs[name] for role, name in roles.items()}
    named = {role: artifact.name for role, artifact in inputs.items()}
    measures = ("reward", "implicit", "reference_loss")
    return split_job.make_job(folder, shared, inputs=inputs, gap=measures, **named)


def crossfitted(folder, shared) -> Job:
    """A split by three reward models, each of which scores a part of the rows; these have several lengths."""
    job = split_job.make_job(folder, shared, limit=200)
    config = ml_collections.ConfigDict(as_json(job.config))
    recipes.crossfit(config.stages, "reward", "split", folds=3)
    whole = kinds.read(config.to_dict(), from_json=True)
    lengths = {"max_buckets": 4, "multiple": 8, "max_length": 256, "max_response": 64, "max_prompt": 128}
    whole = replaced(
        whole, {f"data.{name}": value for name, value in lengths.items()} | {"stages.split.score_batch": 16}
    )
    with jax.set_mesh(job.mesh):
        models = [split_job.reward_model(job, f"reward_fold_{fold}", seed=10 + fold) for fold in range(3)]
    inputs = job.inputs | {"reward": models}
    return dataclasses.replace(job, config=whole, settings=whole.stages["split"], inputs=inputs)


def ppo(**settings):
    """One step, on rows of one length."""
    small = {"steps": 1, "inner_epochs": 1, "minibatches": 1, "eval_batches": 1}

    def job(folder, shared) -> Job:
        job = ppo_job.make_job(folder, shared / "models/stories260K", **(small | settings))
        return ppo_job.replaced(job, {"data.max_buckets": 1, "data.multiple": 16})

    return job


def on_split(kind: str, roles: dict[str, str], **settings):
    """A stage on the artifacts of `ppo_job`. roles: role -> the name of one of those."""

    def job(folder, shared) -> Job:
        job = ppo()(folder, shared)
        inputs = {role: job.inputs[name] for role, name in roles.items()}
        inputs |= {role: part(artifact, "all") for role, artifact in inputs.items() if artifact.part}
        if "policies" in inputs:
            inputs["policies"] = [inputs["policies"]]
            job = ppo_job.beside(job, "dpo", "dpo")  # what that policy was trained as
        return ppo_job.beside(job, kind, kind, "made", inputs, **settings)

    return job


def ppo_by_a_sum(folder, shared) -> Job:
    """Of the run's own reward model, a model of others, and a scorer on the host."""
    other = f"hf:{reward_models.make(folder / 'other', 'llama')}"
    return ppo(samples=2, algorithm="rloo", scorer={"reward": 1.0, other: 0.5, "vader": 0.1})(folder, shared)


def ppo_by_tokens(folder, shared) -> Job:
    """Of a model of others that reads the run's own tokens."""
    job = ppo()(folder, shared)
    other = f"hf:{reward_models.export(job, folder / 'own')}"
    return ppo_job.replaced(job, {"scorer": other, "gold": other})


def split_by_others(folder, shared) -> Job:
    other = f"hf:{reward_models.make(folder / 'other', 'llama')}"
    return sampling("split", pair_source="both", scorer=other, labeller=other)(folder, shared)


def local_judge(folder, shared) -> Job:
    settings = {"judge": "local", "local": "base"}
    return test_judge_stage.make_job(folder, shared / "models/stories260K", made.rows(2), **settings)


CASES: dict[str, Callable[..., Job]] = {
    "sft": on_data("sft", learning_rate=1e-3),
    "sft, on a split's pairs": on_split(
        "sft", {"init": "init", "pairs": "prompts"}, pairs="split/hard", learning_rate=1e-3, **TRAINING
    ),
    "reward": on_data("reward", margin=False),
    "pairs": sampling("pairs"),
    "split": sampling("split", pair_source="both"),
    "split, by all measures": measured,
    "split, cross-fitted": crossfitted,
    "dpo": on_split("dpo", {"init": "init", "reference": "sft", "pairs": "prompts"}, pairs="split/all", **TRAINING),
    "dpo, a moving reference": on_split(
        "dpo", {"init": "init", "reference": "sft", "pairs": "prompts"},
        pairs="split/all", reference_every=1, **TRAINING,
    ),
    "dpo, without a reference": on_split(
        "dpo", {"init": "init", "pairs": "prompts"}, pairs="split/all", objective="simpo", reference="", **TRAINING
    ),
    "kto": on_split("kto", {"init": "init", "reference": "sft", "pairs": "prompts"}, **TRAINING),
    "ppo": ppo(),
    "ppo, replaying pairs": on_split(
        "ppo",
        {"init": "init", "reference": "reference", "reward": "reward", "prompts": "prompts", "replay": "prompts"},
        replay="split/all", replay_loss="dpo", prompts="split/all", batch_size=8, max_new_tokens=8, inner_epochs=1,
        eval_batches=1, eval_prompts=8, steps=1,
    ),
    "blend": on_split("blend", {"policies": "sft"}, policies=("sft",)),
    "ppo, two samples by another scorer": ppo(samples=2, algorithm="rloo", scorer="vader", gold="vader"),
    "ppo, by a sum": ppo_by_a_sum,
    "ppo, by a model of the same tokens": ppo_by_tokens,
    "split, by others": split_by_others,
    "evaluate": on_split(
        "evaluate", {"policies": "init", "reward": "reward", "prompts": "prompts"},
        policies=("dpo",), baseline="dpo", count=4, max_new_tokens=8, batch_size=4,
    ),
    "judge": local_judge,
}  # fmt: skip


class Recorded:
    """A program's function, whose calls are kept, and which of them compiled though they were compiled ahead."""

    def __init__(self, program, calls: list):
        self._function, self._listed, self._calls = program.function, program.arguments, calls
        self.ahead: set[tuple] = set()
        self.met: set[tuple] = set()
        self.__name__ = program.function.__name__

    def __call__(self, *args):
        before = metrics.compiles()
        result = self._function(*args)
        self.met.add(tuple(signature(args, shapes=True)))
        again = tuple(signature(args, shapes=True)) in self.ahead and metrics.compiles() > before
        self._calls.append((signature(args), signature(self._listed), again))
        return result

    def lower(self, *args):
        self.ahead.add(tuple(signature(args, shapes=True)))
        return self._function.lower(*args)


class Called:
    """What a stage's run called, and what it jitted: filled while it runs."""

    def __init__(self, monkeypatch, job: Job):
        self.programs: dict[str, list] = {}
        self.functions: dict[str, Recorded] = {}
        self.jitted: list = []
        self.planned: set[int] = set()
        module, jit = sys.modules[kinds.of(job.settings).run.__module__], jax.jit
        listed = module.programs

        def programs(*args):
            found = listed(*args)
            self.planned |= {id(program.function) for program in found.values()}
            return {name: self._recorded(name, program) for name, program in found.items()}

        def recorded_jit(function, *args, **options):
            made = jit(function, *args, **options)
            if sys._getframe(1).f_globals["__name__"].startswith("mpo_jax.stages"):
                self.jitted.append((function.__name__, made))
            return made

        for cached in (candidates.sampler, rows.scoring_step, rows.logps_step):  # what earlier tests have made
            cached.cache_clear()
        monkeypatch.setattr(module, "programs", programs)
        monkeypatch.setattr(jax, "jit", recorded_jit)

    def _recorded(self, name, program):
        calls = self.programs.setdefault(name, [])
        self.functions[name] = Recorded(program, calls)
        return dataclasses.replace(program, function=self.functions[name])

    def foreseen(self, calls) -> dict[str, set[tuple]]:
        """Program -> the shapes that a kind says it will be called with."""
        found: dict[str, set[tuple]] = {}
        for function, arguments in calls:
            names = [name for name, recorded in self.functions.items() if recorded._calls is function._calls]
            found.setdefault(names[0], set()).add(tuple(signature(arguments, shapes=True)))
        return found

    def ahead(self) -> set[str]:
        """What was compiled before it was called."""
        return {name for name, function in self.functions.items() if function.ahead}

    def unplanned(self) -> set[str]:
        return {name for name, made in self.jitted if id(made) not in self.planned and made._cache_size()}


def signature(args, shapes: bool = False) -> list[tuple]:
    """Place, type and number of axes of every array, or its shape: lengths differ from bucket to bucket."""
    leaves = jax.tree_util.tree_leaves_with_path(args)
    return [(jax.tree_util.keystr(path), *_kind(leaf, shapes)) for path, leaf in leaves]


def _kind(leaf, shape: bool) -> tuple:
    leaf = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
    return str(leaf.dtype), leaf.shape if shape else leaf.ndim


def test_every_kind_is_run_here():
    assert {name.split(",")[0] for name in CASES} == set(kinds.KINDS)


@pytest.mark.parametrize("case", ["ppo", "ppo, two samples by another scorer"])
def test_what_a_step_is_called_with_is_known_without_tracing_a_model(case, tmp_path, shared, monkeypatch):
    """The run's ETA asks for it before the first stage, and compiling begins with it."""
    job = CASES[case](tmp_path, shared)
    monkeypatch.setattr(decoder, "forward", untraced)
    monkeypatch.setattr(decoder, "prefill", untraced)
    with jax.set_mesh(job.mesh):
        assert "update" in kinds.of(job.settings).programs(job)
        with pytest.raises(AssertionError, match="a model is traced"):
            decoder.forward()


def untraced(*args, **options):
    raise AssertionError("a model is traced")


def test_a_ppo_stage_foresees_nothing_before_its_reward_model_has_statistics(tmp_path, shared, monkeypatch):
    """They are part of a program. No data are read for nothing."""
    job = ppo(normalise_scores=True)(tmp_path, shared)
    (job.inputs["reward"].folder / artifacts.STATISTICS).unlink(missing_ok=True)
    monkeypatch.setattr(buckets, "prompts_for", lambda *_: pytest.fail("the data are read"))
    with jax.set_mesh(job.mesh), pytest.raises(InputError, match=artifacts.STATISTICS):
        list(kinds.of(job.settings).calls(job))


@pytest.mark.parametrize("case", CASES)
def test_a_stage_compiles_what_its_plan_lists_and_nothing_else(case, tmp_path, shared, monkeypatch):
    job = CASES[case](tmp_path, shared)
    stage = kinds.of(job.settings)
    with jax.set_mesh(job.mesh):
        stage.check(job)
        planned = stage.programs(job)
        called = Called(monkeypatch, job)
        foreseen = called.foreseen(stage.calls(job))
        # Scorer and labeller may be one model: what it said of a reply is not computed twice, where it is kept.
        monkeypatch.setattr(shards, "_kept", lambda *_: iter(()))
        job.folder.mkdir(exist_ok=True)
        stage.run(job)
    assert called.programs.keys() == planned.keys()
    for name, calls in called.programs.items():
        assert calls, f"{name} is planned, and never called"
        for given, listed, again in calls:
            assert given == listed, name
            assert not again, f"{name} was compiled ahead, and again when it was called"
    assert called.ahead() >= AHEAD.get(case, set())
    assert foreseen.keys() == FORESEEN.get(case, set())
    for name, shapes in foreseen.items():
        assert shapes <= called.functions[name].met, f"{name} is never called with what its kind foresees"
    assert called.unplanned() <= UNPLANNED.keys()
