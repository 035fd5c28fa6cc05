"""The whole of MPO with its baselines on a bare machine: no network, no GPU, a model that comes with the package.

    bash run_scripts/quickstart.sh

A tiny language model writes stories; VADER's sentiment, with Bradley-Terry noise, stands in for the human who prefers
one of two. Then reward model, split, DPO on the easy pairs and PPO on the hard prompts, beside DPO on all pairs and PPO
from the SFT policy with the SFT policy as reference. Below 10 minutes on 2 cores; the numbers are in the README.
"""

from mpo_jax import recipes

MODEL = recipes.MODELS["tiny"]


def get_config(variant=""):
    recipes.variants(variant, models=False)
    config = recipes.config()
    config.name = "quickstart"
    config.model.path = MODEL
    config.data.path = f"{MODEL}/stories.jsonl.gz"
    config.data.shares = {"sft_reward": 0.4, "policy": 0.4, "eval": 0.2}
    config.data.max_length = 144
    config.data.max_response = 56
    config.data.max_prompt = 32
    config.data.max_buckets = 1  # at this size a step takes less than compiling it for another length
    sampled = {"max_new_tokens": 56, "batch_size": 64}
    dpo = {
        "batch_size": 32,
        "learning_rate": 2e-4,
        "beta": 0.1,
        "log_every": 5,
        "eval_every": 50,
        "eval_batches": 12,
        "save_every": 25,
    }
    ppo = {
        "sft": "sft",
        "batch_size": 32,
        "steps": 20,
        "max_new_tokens": 56,
        "learning_rate": 2e-4,
        "value_learning_rate": 1e-3,
        "inner_epochs": 2,
        "kl_coefficient": 0.05,
        "eval_every": 10,
        "save_every": 10,
        "gold": "vader",
    }
    config.stages.update(
        {
            "sft": recipes.stage("sft", batch_size=32, learning_rate=2e-4, eval_every=20, save_every=20),
            "pairs": recipes.stage("pairs", samples=3, label_temperature=0.2, **sampled),
            "reward": recipes.stage(
                "reward",
                pairs="pairs",
                batch_size=16,
                learning_rate=3e-3,
                eval_every=60,
                eval_batches=24,
                save_every=30,
            ),
            "split": recipes.stage("split", pairs="pairs", quantile=0.5, batch_size=64),
            "dpo": recipes.stage("dpo", **dpo),
            "mpo": recipes.stage("ppo", **ppo),
            "dpo_all": recipes.stage("dpo", pairs="split/all", **dpo),
            "ppo_sft": recipes.stage("ppo", init="sft", reference="sft", prompts="split/all", **ppo),
            "evaluate": recipes.stage(
                "evaluate", policies=("sft", "dpo", "mpo", "dpo_all", "ppo_sft"), labeller="vader", count=256, **sampled
            ),
        }
    )
    return config
