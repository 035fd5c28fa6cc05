"""Two rounds of MPO: a policy samples new pairs, which are scored and split; DPO on the easy ones, PPO on the hard.

Iterated DPO of Xu et al. 2023 (arXiv 2312.16682) and Dong et al. 2024 (arXiv 2405.07863), with the paper's two stages
in each round. The second round begins with the policy that the first has left.
"""

from mpo_jax import recipes


def get_config(variant=""):
    recipes.variants(variant, models=False)
    config = recipes.small_run("iterative")
    split = recipes.stage("split", pair_source="sampled", samples=3, quantile=0.5, **recipes.SMALL_SAMPLING)
    dpo = recipes.stage("dpo", **recipes.SMALL_DPO)
    ppo = recipes.stage("ppo", **(recipes.SMALL_PPO | {"steps": 10}))
    rounds = recipes.rounds(2, split, dpo, ppo)
    config.stages.update(rounds)
    config.stages.evaluate = recipes.small_evaluation("sft", "dpo_1", "mpo_1", "dpo_2", "mpo_2")
    config.stages.evaluate.prompts = "split_1/all"
    return config
