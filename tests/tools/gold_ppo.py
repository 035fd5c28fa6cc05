"""The run folder of tests/configs/gold_ppo.py enters; held-out gold score and KL of every policy leave, as a table.

python tests/tools/gold_ppo.py FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np

from mpo_jax import metrics

KINDS = ("sft_level", "dpo_level", "mpo", "ppo_sft")


def final(folder: Path) -> tuple[float, float, float]:
    """Held-out score and KL to the reference of the last evaluation, and the last step's KL to the SFT policy."""
    lines = metrics.read(folder)
    last = [line for line in lines if "eval/score" in line][-1]
    to_sft = [line for line in lines if "kl_sft" in line][-1]
    return last["eval/score"], last["eval/kl"], to_sft["kl_sft"]


def main(workdir: Path) -> None:
    stages = json.loads((workdir / "stages.json").read_text())
    print(f"{'policy':12} {'runs':>4} {'gold score':>16} {'KL to reference':>16} {'KL to SFT':>10}")
    for kind in KINDS:
        names = [name for name in stages if name == kind or name.rsplit("_", 1)[0] == kind]
        found = np.array([final(workdir / stages[name]) for name in names])
        mean, spread = found.mean(axis=0), found[:, 0].std(ddof=1) if len(found) > 1 else 0.0
        print(f"{kind:12} {len(found):4} {mean[0]:8.3f} ± {spread:5.3f} {mean[1]:16.2f} {mean[2]:10.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
