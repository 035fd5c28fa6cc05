"""Selective DPO (Gao et al. 2025, arXiv 2502.09650): learn from the pairs that are not too hard for the model at hand.

A probe learns from the pairs of one share; its implicit rewards on another, which it never saw, say how hard each pair
is. DPO on the easy half, beside DPO on all of them. No reward model has a part in it; one judges the outcome.
"""

from mpo_jax import recipes


def get_config(variant=""):
    recipes.variants(variant, models=False)
    config = recipes.small_run("selective_dpo")
    dpo = recipes.SMALL_DPO
    split = {"pairs": "pairs", "reward": "", "reference": "sft", "quantile": 0.5, "batch_size": 64}
    config.stages.update(
        {
            "seen": recipes.stage("split", share="sft_reward", gap="reference_loss", **split),
            "probe": recipes.stage("dpo", pairs="seen/all", **dpo),
            "split": recipes.stage("split", gap="implicit", implicit="probe", **split),
            "selective": recipes.stage("dpo", pairs="split/easy", **dpo),
            "dpo_all": recipes.stage("dpo", pairs="split/all", **dpo),
            "evaluate": recipes.small_evaluation("sft", "selective", "dpo_all"),
        }
    )
    return config
