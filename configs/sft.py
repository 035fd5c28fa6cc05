"""Supervised fine-tuning alone, of a base model on the data's chosen replies.

    mpo run --config=sft --config.model.path=MODEL --config.data.path=DATA --workdir=runs/sft

Without a path, the model and the stories that come with the package. Of replies with labels it learns from the good
ones.
"""

from mpo_jax import recipes


def get_config(variant=""):
    config, _ = recipes.alone("sft", variant, sft_reward=0.9, eval=0.1)
    config.data.path = recipes.STORIES
    config.stages.sft = recipes.stage("sft")
    return config
