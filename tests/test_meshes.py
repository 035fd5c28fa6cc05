"""Runs whose stages divide eight devices each in its own way; the same numbers as on the run's mesh leave, and errors
before anything is compiled."""

import collections
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, checkpoint, eta, heading, main, metrics, pipeline, recipes, settings, sharding, stopping
from mpo_jax.data import encode
from mpo_jax.errors import PREEMPTED, InputError, Stopped
from mpo_jax.ops import product
from mpo_jax.stages import candidates, kinds
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from tests.stages.ppo_job import STORIES

SMALL = {"steps": 4, "batch_size": 16, "learning_rate": 1e-3, "eval_batches": 1, "save_every": 1}
OWN = {
    "sft": {"fsdp": 4, "tensor": 2},
    "pairs": {"data": 4, "fsdp": 1, "tensor": 2},
    "dpo": {"data": 2, "fsdp": 1, "tensor": 4},
    "mpo": {"data": 2, "fsdp": 2, "tensor": 2},
    "evaluate": {"fsdp": 2, "tensor": 4},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory, stories):
    """SFT, pairs of its samples, and DPO on the data."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": story, "chosen": " They ran away.", "rejected": " No."} for story in STORIES]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipes.config()
    made.model.path, made.data.path = str(stories), str(folder / "rows.jsonl")
    made.data.max_length, made.data.max_response, made.data.max_buckets, made.data.multiple = 64, 16, 1, 64
    made.data.max_prompt = 32
    made.data.shares = {"sft_reward": 0.3, "policy": 0.3, "eval": 0.4}
    made.stages.sft = recipes.stage("sft", **SMALL)
    made.stages.pairs = recipes.stage("pairs", batch_size=16, max_new_tokens=8, label_temperature=0.0)
    made.stages.dpo = recipes.stage("dpo", pairs="data", **SMALL)
    return made


def with_meshes(config, **meshes):
    made = config.copy_and_resolve_references()
    for name, sizes in meshes.items():
        made.stages[name].mesh.update(sizes)
    return made


def run(config, workdir, *only):
    run_ = kinds.read(config.to_dict())
    nodes = pipeline.run(run_, epath.Path(workdir), sharding.make_mesh(data=1, fsdp=8), only)
    return {name: node.folder for name, node in nodes.items()}


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folders of a run of which every stage is on the run's mesh, all of it fsdp; DPO is not run."""
    return run(config, tmp_path_factory.mktemp("whole"), "pairs")


def weights(config, folder, name):
    """A stage's weights as they lie on disk, whole, on the host."""
    run_ = kinds.read(config.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    job = Job(name, run_.stages[name], run_, folder, folder.parent, {}, mesh)
    abstract = jobs.abstract_weights(jobs.model(job), mesh)
    return jax.tree_util.tree_leaves_with_path(checkpoint.restore_weights(folder / artifacts.WEIGHTS, abstract))


def apart(config, one, other, name) -> float:
    """By how much a stage's weights differ between two runs, as a share of what its training has moved them: of means,
    since Adam makes a whole step of a gradient that is but rounding."""
    left, right, start = weights(config, one[name], name), weights(config, other[name], name), base(config)

    def mean(some, others) -> float:
        pairs = zip(some, others, strict=True)
        return float(np.mean([np.abs(np.asarray(x) - np.asarray(y)).mean() for (_, x), (_, y) in pairs]))

    moved = mean(left, start)
    found = mean(left, right) / moved
    print(f"{name}: {found:.1e} of the {moved:.1e} that training moved a weight")
    return found


def base(config):
    run_ = kinds.read(config.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    job = Job("sft", run_.stages["sft"], run_, epath.Path("unread"), epath.Path("unread"), {}, mesh)
    return jax.tree_util.tree_leaves_with_path(jobs.load_weights(job, jobs.base_artifact(job), jobs.model(job)))


def others(one, other) -> float:
    """The share of texts that one stage's pairs have and another's have not."""
    (left, right) = (
        collections.Counter(tuple(text) for part in each.values() for text in part) for each in (one, other)
    )
    return (left - right).total() / left.total()


def sampled(folder) -> dict[str, list[list[int]]]:
    """The tokens of every pair that a stage left, share by share."""
    shares = sorted(path.name for path in folder.iterdir() if (path / "tokens.npy").exists())
    read = {share: encode.read(folder / share) for share in shares}
    return {
        share: [part.tolist() for row in range(len(rows)) for part in rows.row(row)] for share, rows in read.items()
    }


def test_stages_on_meshes_of_their_own_leave_the_same(config, whole, tmp_path, capsys, monkeypatch):
    """Weights within what another order of sums does (f32), the same keys, and the same tokens, but where that decides
    which of two a draw falls on; on most processors none does."""
    set_mesh, seen = jax.set_mesh, []
    monkeypatch.setattr(jax, "set_mesh", lambda mesh: seen.append(mesh) or set_mesh(mesh))
    own = with_meshes(config, sft=OWN["sft"], pairs=OWN["pairs"])
    found = run(own, tmp_path, "pairs")
    assert {name: folder.name for name, folder in found.items()} == {
        name: folder.name for name, folder in whole.items()
    }
    meshes = [dict(mesh.shape) for mesh in dict.fromkeys(seen)]
    assert meshes == [{"data": 1, "fsdp": 4, "tensor": 2}, {"data": 4, "fsdp": 1, "tensor": 2}]
    told = " ".join(capsys.readouterr().out.split("stage 1 of")[0].split())
    assert " meshes " in told and "sft: data 1, fsdp 4, tensor 2" in told and "pairs: data 4, fsdp 1, tensor 2" in told
    assert others(sampled(found["pairs"]), sampled(whole["pairs"])) < 0.02
    losses = [dict(metrics.curve(folders["sft"], "loss")) for folders in (whole, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert apart(config, whole, found, "sft") < 1e-4


@pytest.mark.parametrize("name", ["sft", "pairs"])
def test_a_stage_goes_on_on_another_mesh(config, whole, tmp_path, monkeypatch, name):
    """Stopped behind its second step or batch, with a checkpoint or a shard, and ended on another mesh."""
    first = with_meshes(config, **{name: {"data": 2, "fsdp": 2, "tensor": 2}})
    first.shard_seconds = 0.0
    monkeypatch.setattr(candidates, "MOST_BATCHES", 1)  # in calls of a batch there is more to stop between
    if name == "pairs":
        shutil.copytree(whole["sft"], tmp_path / whole["sft"].name)
    boundaries = itertools.count(1)
    with stopping.Notice() as notice, monkeypatch.context() as patched:
        notice.code = PREEMPTED
        reached = lambda: any(tmp_path.glob(f"{name}-*")) and next(boundaries) == 2  # noqa: E731
        patched.setattr(notice, "reached", reached)
        with pytest.raises(Stopped) as stopped:
            run(first, tmp_path, name)
    assert re.search("2 of", stopped.value.where)
    found = run(with_meshes(config, **{name: {"data": 1, "fsdp": 4, "tensor": 2}}), tmp_path, name)
    manifest = artifacts.read_manifest(found[name])
    assert manifest is not None and manifest["seconds"] is None, "it was resumed"
    if name == "pairs":
        assert sampled(found[name]) == sampled(whole[name])
    else:
        assert apart(config, whole, found, name) < 1e-4


@pytest.mark.slow
def test_all_models_of_ppo_are_on_its_mesh(config, whole, tmp_path):
    """Reward model, PPO and evaluation too: weights are the same, and what PPO's first replies score."""
    made = config.copy_and_resolve_references()
    made.stages.reward = recipes.stage("reward", pairs="pairs", **SMALL)
    more = {"prompts": "data", "max_new_tokens": 8, "minibatches": 2, "eval_prompts": 8, "table_rows": 2}
    made.stages.mpo = recipes.stage("ppo", **(SMALL | more))
    policies = {"policies": ("sft", "dpo", "mpo"), "baseline": "sft", "reward": "reward", "prompts": "data"}
    made.stages.evaluate = recipes.stage("evaluate", count=32, batch_size=16, max_new_tokens=8, **policies)
    one, other = tmp_path / "one", tmp_path / "other"
    one, other = run(made, one), run(with_meshes(made, **OWN), other)
    assert {name: folder.name for name, folder in one.items()} == {name: folder.name for name, folder in other.items()}
    for name in ("sft", "dpo"):
        assert apart(made, one, other, name) < 1e-4, name
    # Later updates see replies of a policy that differs by its rounding, which a draw may lie between.
    scores = [metrics.curve(folders["mpo"], "score")[:2] for folders in (one, other)]
    for (step, left), (_, right) in zip(*scores, strict=True):
        assert right == pytest.approx(left, rel=1e-4), step
    assert len(scores[0]) == 2 and all((folders["evaluate"] / artifacts.MANIFEST).exists() for folders in (one, other))


# What can't be meant --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"data": 3}, "stages.dpo.mesh: {'data': 3, 'fsdp': 2, 'tensor': 1} needs 6 devices; found 8"),
        ({"tensor": 3, "fsdp": -1}, "stages.dpo.mesh: {'data': 1, 'fsdp': 2, 'tensor': 3} needs 6 devices; found 8"),
        ({"tensor": 8, "fsdp": 1}, "stages.dpo.mesh.tensor: 8 does not divide the model's feed-forward of 172"),
        ({"data": -1, "fsdp": -1}, "stages.dpo.mesh: {'data': -1, 'fsdp': -1, 'tensor': 1}, with those of the run; "
                                   "expected at most one -1"),
        ({"data": -2}, "stages.dpo.mesh.data: -2; expected -1 or more"),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_be_is_told_by_its_stage(config, tmp_path, sizes, told):
    made = with_meshes(config, dpo=sizes)
    with pytest.raises(InputError) as error:
        pipeline.check(kinds.read(made.to_dict()), epath.Path(tmp_path), sharding.make_mesh(data=1, fsdp=8))
    assert str(error.value).split("\n")[0] == told
    assert not list(tmp_path.iterdir())


def test_a_recipe_gives_some_axes_and_the_command_line_may_give_others():
    made = recipes.stage("sft", mesh={"tensor": 2})
    assert made.mesh.to_dict() == {"data": 0, "fsdp": 0, "tensor": 2}


def test_a_batch_that_a_stages_mesh_does_not_divide_is_told(config, tmp_path):
    made = with_meshes(config, pairs={"data": 8, "fsdp": 1})
    made.stages.pairs.batch_size = 12
    with pytest.raises(InputError, match=r"^stages\.pairs\.batch_size: 12 "):
        pipeline.check(kinds.read(made.to_dict()), epath.Path(tmp_path), sharding.make_mesh(data=1, fsdp=4, tensor=2))


def test_the_runs_mesh_is_checked_against_the_model(config, tmp_path):
    with pytest.raises(InputError, match=r"^mesh\.tensor: 8 does not divide the model's feed-forward of 172"):
        pipeline.check(kinds.read(config.to_dict()), epath.Path(tmp_path), sharding.make_mesh(fsdp=1, tensor=8))


def test_a_dry_run_on_fewer_devices_says_what_it_could_not_check(config, tmp_path):
    made = kinds.read(with_meshes(config, dpo={"data": 4, "fsdp": 2, "tensor": 4}).to_dict())
    shown = main.dry_run(made, epath.Path(tmp_path), [])
    assert "not checked here: stages.dpo.mesh: {'data': 4, 'fsdp': 2, 'tensor': 4} needs 32 devices; found 8" in shown
    assert "dpo [dpo]" in shown


# What is told ---------------------------------------------------------------------------------------------------------


def test_an_eta_is_of_the_same_mesh(config):
    before, other = (kinds.read(made.to_dict()) for made in (config, with_meshes(config, dpo={"tensor": 2})))
    known = [eta.Measured("dpo", settings.plain(before), 60.0, "8 x cpu")]
    assert eta.of_stages(["dpo"], before, known, "8 x cpu").seconds == 60.0
    assert eta.of_stages(["sft", "dpo"], other, known, "8 x cpu").unknown == ("sft", "dpo")
    same = with_meshes(config, dpo={"data": 1, "fsdp": -1})  # spelled out
    assert eta.of_stages(["dpo"], kinds.read(same.to_dict()), known, "8 x cpu").seconds == 60.0


def test_the_first_screen_tells_in_what_numbers_are_computed(config, tmp_path, monkeypatch):
    made, mesh = kinds.read(config.to_dict()), sharding.make_mesh(data=1, fsdp=8)

    def told(fast: bool) -> str:
        monkeypatch.setattr(product, "fast_on_this_cpu", lambda: fast)
        shown = heading.of_run(made, epath.Path(tmp_path), mesh, [], ["dpo"], eta.Eta(None, ("dpo",)))
        return " ".join(shown.split("  numbers  ")[1].split("  to do")[0].split())

    assert made.model.dtype == "auto"
    chosen = "mixed: products of bfloat16, sums in float32"
    assert told(True) == f"{chosen}, because XLA finds AVX512-BF16 on this CPU; model.dtype=float32 chooses the other"
    assert told(False) == "float32, because XLA finds no AVX512-BF16 on this CPU; model.dtype=mixed chooses the other"
    made = made.model_copy(update={"model": made.model.model_copy(update={"dtype": "mixed"})})
    assert told(False) == chosen


def test_the_first_screen_tells_meshes_of_stages_that_will_run(config, tmp_path):
    made = kinds.read(with_meshes(config, dpo={"tensor": 2}, sft={"tensor": 4}).to_dict())
    mesh = sharding.make_mesh(data=1, fsdp=8)
    shown = heading.of_run(made, epath.Path(tmp_path), mesh, ["sft"], ["pairs", "dpo"], eta.Eta(None, ("dpo",)))
    assert "\n  meshes   dpo: data 1, fsdp 4, tensor 2\n" in shown
