"""The whole of MPO with its baselines on a bare machine: no network, no GPU, a model that comes with the package.

    bash run_scripts/quickstart.sh

A tiny language model writes stories; VADER's sentiment, with Bradley-Terry noise, stands in for the human who prefers
one of two. Then reward model, split, DPO on the easy pairs and PPO on the hard prompts, beside DPO on all pairs and PPO
from the SFT policy with the SFT policy as reference. Below 10 minutes on 2 cores; the numbers are in the README.
"""

from mpo_jax import recipes


def get_config(variant=""):
    recipes.variants(variant, models=False)
    config = recipes.small_run("quickstart")
    kept = {"snapshots": 3}  # for the curves of score against KL
    dpo, ppo = recipes.SMALL_DPO | kept, recipes.SMALL_PPO | kept
    config.stages.update(
        {
            "split": recipes.stage("split", pairs="pairs", quantile=0.5, batch_size=64),
            "dpo": recipes.stage("dpo", **dpo),
            "mpo": recipes.stage("ppo", **ppo),
            "dpo_all": recipes.stage("dpo", pairs="split/all", **dpo),
            "ppo_sft": recipes.stage("ppo", init="sft", reference="sft", prompts="split/all", **ppo),
            "evaluate": recipes.small_evaluation("sft", "dpo", "mpo", "dpo_all", "ppo_sft"),
        }
    )
    return config
