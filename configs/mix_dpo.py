"""DPO on easy pairs and SFT on the chosen replies of hard ones, in the manner of MixDPO.

Where the reward model hardly tells two replies apart their difference teaches little, but the chosen one is still worth
imitating. In place of PPO on the hard prompts; beside DPO on all pairs.
"""

from mpo_jax import recipes


def get_config(variant=""):
    recipes.variants(variant, models=False)
    config = recipes.small_run("mix_dpo")
    dpo = recipes.SMALL_DPO
    config.stages.update(
        {
            "split": recipes.stage("split", pairs="pairs", quantile=0.5, batch_size=64),
            "dpo": recipes.stage("dpo", **dpo),
            "mixed": recipes.stage("sft", init="dpo", pairs="split/hard", batch_size=32, learning_rate=5e-5),
            "dpo_all": recipes.stage("dpo", pairs="split/all", **dpo),
            "evaluate": recipes.small_evaluation("sft", "dpo", "mixed", "dpo_all"),
        }
    )
    return config
