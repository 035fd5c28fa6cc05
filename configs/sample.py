"""Sampling alone: replies of a base (or chat) model to the data's prompts, as lines of replies.jsonl.

    mpo run --config=sample --config.model.path=MODEL --config.data.path=PROMPTS --workdir=runs/sample

Without a path, the model and the stories that come with the package.
"""

from mpo_jax import recipes


def get_config(variant=""):
    config, _ = recipes.alone("sample", variant, eval=1.0)
    config.data.path = recipes.STORIES
    config.stages.sample = recipes.stage("evaluate", policies=("base",), baseline="", reward="", prompts="data")
    return config
