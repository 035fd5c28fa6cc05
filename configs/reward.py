"""A reward model alone, of a base model on the data's pairs.

mpo run --config=reward --config.model.path=MODEL --config.data.path=PAIRS --workdir=runs/reward
"""

from mpo_jax import recipes


def get_config(variant=""):
    config, _ = recipes.alone("reward", variant, sft_reward=0.9, eval=0.1)
    config.stages.reward = recipes.stage("reward", init="base")
    return config
