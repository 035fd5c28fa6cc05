"""Curri-DPO (Pattnaik et al. 2024, arXiv 2403.07230): all pairs, from the largest gap to the smallest.

The paper's curriculum is of four replies to a prompt, by their ratings; here of pairs, by the reward model's gap.
Beside the same pairs in random order, and in the opposite one.
"""

from mpo_jax import recipes


def get_config(variant=""):
    recipes.variants(variant, models=False)
    config = recipes.small_run("curri_dpo")
    dpo = recipes.SMALL_DPO | {"pairs": "split/all"}
    config.stages.update(
        {
            "split": recipes.stage("split", pairs="pairs", quantile=0.5, batch_size=64),
            "curriculum": recipes.stage("dpo", order="easy_first", **dpo),
            "dpo_all": recipes.stage("dpo", **dpo),
            "reversed": recipes.stage("dpo", order="hard_first", **dpo),
            "evaluate": recipes.small_evaluation("sft", "curriculum", "dpo_all", "reversed"),
        }
    )
    return config
