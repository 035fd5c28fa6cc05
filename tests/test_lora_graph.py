"""The whole graph with adapters: each stage leaves adapters alone, `peft` computes what we do with them, and PPO's
reference is the frozen DPO adapter, not the base."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, checkpoint, metrics, sharding
from mpo_jax.models import config as model_config
from mpo_jax.models import decoder, hf, hf_adapter
from mpo_jax.models.config import LoraConfig
from mpo_jax.stages import job as jobs
from tests.tools import processes
from tests.tools.small_graph import write_rows

RANK, ALPHA = 4, 16.0
TOKENS = np.arange(3, 33, dtype=np.int32).reshape(2, 15)


@pytest.fixture(scope="module")
def run(tmp_path_factory, stories) -> Path:
    """The workdir of a finished run with adapters of rank 4."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    write_rows(workdir.parent / "rows.jsonl")
    flags = [
        "--config=tests/tools/small_graph.py",
        f"--config.model.path={stories}",
        f"--config.data.path={workdir.parent / 'rows.jsonl'}",
        f"--config.model.lora.rank={RANK}",
    ]
    processes.run(1, [*flags, f"--workdir={workdir}"], workdir.parent / "log")
    return workdir


def folder(workdir: Path, stage: str) -> epath.Path:
    return epath.Path(workdir) / json.loads((workdir / "stages.json").read_text())[stage]


def adapters(workdir: Path, stories: Path, stage: str, head: bool = False):
    """The model's config and the collections that a stage left."""
    base = model_config.from_folder(stories)
    targets = ("q", "k", "v", "o")
    config = dataclasses.replace(base, lora=LoraConfig(RANK, ALPHA, targets))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    like = jobs.abstract_weights(config, mesh, head=head)
    return config, checkpoint.restore_weights(folder(workdir, stage) / artifacts.WEIGHTS, like)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "mpo"])
def test_peft_computes_the_same_logits_with_a_stages_adapters(run, stories, torch, tmp_path, stage):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    config, weights = adapters(run, stories, stage)
    assert set(weights) == {"lora"}, "a stage under LoRA trains and stores adapters alone"
    hf_adapter.export_adapter(tmp_path, config, weights, str(stories))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories), str(tmp_path)).eval()
    with torch.no_grad():
        there = model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
    whole = hf.import_weights(stories, dataclasses.replace(config, lora=None)) | weights
    positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    hidden = decoder.forward(config, whole, TOKENS, positions, np.ones_like(TOKENS))
    here = np.asarray(decoder.logits(config, whole, hidden))
    np.testing.assert_allclose(there, here[..., : there.shape[-1]], atol=1e-4 * max(1.0, float(here.std())))


@pytest.mark.slow
def test_the_reward_model_is_adapters_and_a_head(run, stories):
    _, weights = adapters(run, stories, "reward", head=True)
    assert set(weights) == {"lora", "head"}


@pytest.mark.slow
def test_ppos_reference_is_the_dpo_adapter_not_the_base(run, stories):
    first = metrics.read(folder(run, "mpo"))[0]
    assert first["kl"] == pytest.approx(0, abs=1e-4), "before the first update the policy is its reference"
    assert first["ratio_deviation_first"] < 1e-3
    assert abs(first["kl_sft"]) > 1e-4, "and it is not the SFT policy, so that the reference isn't either"
    manifest = json.loads((folder(run, "mpo") / "manifest.json").read_text())
    assert json.dumps(manifest["inputs"]["reference"]) == json.dumps(manifest["inputs"]["init"])
    moved = adapters(run, stories, "mpo")[1]["lora"], adapters(run, stories, "dpo")[1]["lora"]
    assert any(
        np.abs(np.asarray(a) - np.asarray(b)).max() > 0 for a, b in zip(*map(jax.tree.leaves, moved), strict=True)
    )
