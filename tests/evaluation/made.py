"""Made-up lines of replies.jsonl, and a run's folder around them, for tests of what reads an evaluation."""

import json
from pathlib import Path

import numpy as np
from etils import epath

from mpo_jax import artifacts
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
    artifacts.write_manifest(epath.Path(stage), {"name": name, "kind": "evaluate", "key": "0123456789ab"})
    (folder / "stages.json").write_text(json.dumps({name: stage.name}))
    return folder


def gap_table(gap: np.ndarray) -> GapTable:
    """The scored pairs of a split, of these gaps."""
    ids, zero = np.arange(len(gap), dtype=np.int32), np.zeros(len(gap), np.float32)
    return GapTable(ids, ids, gap.astype(np.float32), zero, gap.astype(np.float32), np.zeros(len(gap), np.int8))
