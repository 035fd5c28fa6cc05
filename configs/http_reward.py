"""PPO with a reward that a server gives, beside the SFT policy, on the quickstart's task.

    mpo run --config=http_reward:http://127.0.0.1:8900/score --workdir=runs/http

docs/scorers.md says what the server is asked and must answer. No reward model is trained.
"""

from mpo_jax import recipes


def get_config(variant="http://127.0.0.1:8900/score"):
    config = recipes.small_run("http_reward")
    for name in ("pairs", "reward"):
        del config.stages[name]
    start = {"init": "sft", "reference": "sft", "prompts": "data", "reward": "", "scorer": variant}
    config.stages.mpo = recipes.stage("ppo", **(recipes.SMALL_PPO | start))
    config.stages.evaluate = recipes.small_evaluation("sft", "mpo")
    config.stages.evaluate.update({"reward": "", "prompts": "data"})
    return config
