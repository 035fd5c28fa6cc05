"""Made-up lines of replies.jsonl, and a run's folder around them, for tests of what reads an evaluation."""

import json
from pathlib import Path

import numpy as np
from etils import epath

from mpo_jax import artifacts
from mpo_jax.data.account import Account
from mpo_jax.types import GapTable


def rows(count=20, policies=("sft", "mpo"), seed=0, text=None):
    """Lines of replies.jsonl; reward is higher for later policies. text: (policy, number) -> a reply's text."""
    random = np.random.default_rng(seed)
    text = text or (lambda name, number: f"Reply of kind {policies.index(name)} to number {number}.")
    return [
        {
            "prompt_id": number,
            "prompt": f"Question {number}: why?",
            "replies": {
                name: {
                    "text": text(name, number),
                    "tokens": int(random.integers(10, 40)),
                    "finished": True,
                    "reward": float(random.normal(place, 1)),
                    "gold": None,
                }
                for place, name in enumerate(policies)
            },
        }
        for number in range(count)
    ]


def run_folder(folder: Path, lines, name="evaluate") -> Path:
    """A run whose one finished stage is an evaluation with these replies."""
    stage = folder / f"{name}-0123456789ab"
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    artifacts.write_json(epath.Path(stage) / artifacts.CONFIG, {"stages": {}})
    manifest = {"name": name, "kind": "evaluate", "key": "0123456789ab", "inputs": {}}
    artifacts.write_manifest(epath.Path(stage), manifest)
    (folder / "stages.json").write_text(json.dumps({name: stage.name}))
    return folder


def gap_table(gap: np.ndarray) -> GapTable:
    """The scored pairs of a split, of these gaps."""
    ids, zero = np.arange(len(gap), dtype=np.int32), np.zeros(len(gap), np.float32)
    return GapTable(ids, ids, gap.astype(np.float32), zero, gap.astype(np.float32), np.zeros(len(gap), np.int8))


def evaluation(folder, policies=("sft", "mpo"), verdict=None, lines=None) -> None:
    """The files of an evaluate stage whose policies' means are all alike."""
    means = {"tokens": 5.0, "finished": 1.0, "reward": 0.25, "kl": 0.0, "kl_error": 0.0}
    report = {
        "prompts": 3, "baseline": policies[0], "truncation": "", "comparisons": [],
        "policies": dict.fromkeys(policies, means),
        "errors": {name: {"tokens": 0.25, "reward": 0.0125} for name in policies}, "verdict": verdict, "frontier": {},
    }  # fmt: skip
    artifacts.write_json(epath.Path(folder) / artifacts.REPORT, report)
    artifacts.write_lines(epath.Path(folder) / artifacts.REPLIES_FILE, lines or rows(3, policies))


def account(path: str) -> dict:
    """What became of ten rows of a file, as a manifest holds it."""
    known = {"source": path, "split": "train", "schema": "preference pairs", "read": 10, "kept": 9}
    return Account(**known, dropped={"empty reply": 1}).as_json()
