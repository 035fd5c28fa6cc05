"""Stages on a real tiny LLaMA, exported: transformers loads them, agrees with ours, and generates."""

import dataclasses

import jax
import numpy as np
import pytest

from mpo_jax import artifacts, export, finished
from mpo_jax import settings as declared
from mpo_jax.data.prompts import prompt_batch
from mpo_jax.data.templates import BUILT_IN
from mpo_jax.errors import InputError
from mpo_jax.models import decoder
from mpo_jax.run import as_json
from mpo_jax.stages import job as jobs
from mpo_jax.stages import kinds
from tests.stages.ppo_job import make_job


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, stories):
    """A run's folder with a policy and a reward model, and what the pipeline writes beside them."""
    folder = tmp_path_factory.mktemp("export")
    job = make_job(folder, stories)
    for artifact in (job.inputs["init"], job.inputs["reward"]):
        finish(job, artifact)
    artifacts.write_json(job.workdir / "stages.json", {"mpo": job.inputs["init"].folder.name})
    return job


def finish(job, artifact):
    """Leaves beside an artifact's weights what the pipeline writes. Its kind: the first that leaves such a one."""
    kind = next(name for name, each in kinds.KINDS.items() if each.produces == artifact.produces)
    stage = kinds.KINDS[kind].settings(kind=kind)
    artifacts.write_json(
        artifact.folder / artifacts.CONFIG, as_json(job.config) | {"stages": {artifact.name: as_json(stage)}}
    )
    manifest = {"name": artifact.name, "kind": kind, "key": "0123", "inputs": {}, "shared": "abcd"}
    artifacts.write_manifest(artifact.folder, manifest | {"packages": {"jax": jax.__version__}})


def ours(job, role, stories):
    model = dataclasses.replace(jobs.model(job), lora=None)
    weights = jobs.load_weights(job, job.inputs[role], model)
    batch = prompt_batch(["Once upon a time, there was a"], export.load_tokenizer(str(stories)))
    hidden = decoder.forward(model, weights, batch.tokens, batch.positions, batch.segments)
    if role == "reward":
        return batch.tokens, decoder.scalar_head(weights, hidden)[0, -1:]
    return batch.tokens, decoder.logits(model, weights, hidden)[0, :, : model.vocab_size]


@pytest.mark.parametrize("role", ["init", "reward"])
def test_transformers_agrees(workdir, stories, tmp_path, capsys, role):
    torch = pytest.importorskip("torch")
    import transformers

    export.export(workdir.inputs[role].folder, tmp_path / "out", verify=True)
    assert "verified" in capsys.readouterr().out
    kind = "AutoModelForSequenceClassification" if role == "reward" else "AutoModelForCausalLM"
    loaded = getattr(transformers, kind).from_pretrained(tmp_path / "out")
    tokens, expected = ours(workdir, role, stories)
    with torch.no_grad():
        found = loaded(torch.tensor(np.asarray(tokens)).long()).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    if role == "init":
        drawn = loaded.generate(torch.tensor(np.asarray(tokens)).long(), max_new_tokens=4, do_sample=False)
        assert drawn.shape[1] > tokens.shape[1]
    assert "| `0123` |" in (tmp_path / "out" / "README.md").read_text()


def test_the_template_of_the_data_is_exported(stories, tmp_path):
    import transformers

    job = make_job(tmp_path / "run", stories)
    job = dataclasses.replace(job, config=declared.replaced(job.config, {"data.template": "chatml"}))
    finish(job, job.inputs["init"])
    export.export(job.inputs["init"].folder, tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == BUILT_IN["chatml"]
    assert export.load_tokenizer(str(stories)).chat_template is None


def test_into_an_object_store(workdir, gcs):
    export.export(workdir.inputs["init"].folder, "gs://bucket/exported")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        name.partition("/")[2] for name in gcs.names("exported/")
    }
    with pytest.raises(InputError, match=r"^--output=gs://bucket/exported: exists; choose another$"):
        export.export(workdir.inputs["init"].folder, "gs://bucket/exported")


def test_named_by_stages_json(workdir):
    assert finished.find(workdir.workdir / "mpo") == workdir.inputs["init"].folder
    with pytest.raises(InputError, match="no such stage; expected one of mpo"):
        finished.find(workdir.workdir / "dpo_full")


def test_refusals(workdir, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(InputError, match="not an empty folder"):
        export.export(workdir.workdir / "mpo", tmp_path / "full")
    with pytest.raises(InputError, match="no adapters"):
        export.export(workdir.workdir / "mpo", tmp_path / "out", adapter=True)
    unfinished = tmp_path / "dpo-1"
    unfinished.mkdir()
    split = {"split": as_json(kinds.KINDS["split"].settings(kind="split"))}
    artifacts.write_json(unfinished / artifacts.CONFIG, as_json(workdir.config) | {"stages": split})
    with pytest.raises(InputError, match="not finished"):
        finished.find(unfinished)
    artifacts.write_manifest(unfinished, {"name": "split", "kind": "split"})
    with pytest.raises(InputError, match="is a split stage"):
        export.export(unfinished, tmp_path / "out")


@pytest.mark.slow
def test_adapters_alone_and_merged(stories, tmp_path, capsys):
    """Both exports of a LoRA policy compute what the stage computes."""
    job = make_job(tmp_path / "run", stories, rank=2)
    artifact = job.inputs["init"]
    finish(job, artifact)
    for adapter, file in ((True, "adapter_model.safetensors"), (False, "model.safetensors")):
        target = tmp_path / str(adapter)
        export.export(artifact.folder, target, adapter=adapter, verify=True)
        assert "verified" in capsys.readouterr().out
        assert (target / file).exists() and (target / "README.md").exists()
