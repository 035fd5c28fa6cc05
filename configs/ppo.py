"""PPO alone, of a base (or chat) model on the data's prompts, held by that same model.

    mpo run --config=ppo --config.model.path=MODEL --config.data.path=PROMPTS --workdir=runs/ppo
    mpo run --config=ppo:reward --config.model.path=MODEL --config.data.path=PAIRS --workdir=runs/ppo

VADER's sentiment scores, unless `--config.stages.ppo.scorer` names another scorer (docs/scorers.md). With the variant
`reward` a reward model does, trained before on other prompts' pairs. Without paths, the model and the stories that come
with the package.
"""

from mpo_jax import recipes


def get_config(variant=""):
    config, chosen = recipes.alone("ppo", variant, "reward", sft_reward=0.4, policy=0.5, eval=0.1)
    start = {"init": "base", "reference": "base", "prompts": "data"}
    if "reward" in chosen:
        config.stages.reward = recipes.stage("reward", init="base")
        config.stages.ppo = recipes.stage("ppo", **start)
    else:
        config.data.path, config.data.shares = recipes.STORIES, {"sft_reward": 0.0, "policy": 0.9, "eval": 0.1}
        config.stages.ppo = recipes.stage("ppo", **start, reward="", scorer="vader")
    return config
