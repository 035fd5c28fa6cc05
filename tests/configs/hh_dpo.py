"""DPO on the easy pairs of HH harmless beside DPO on all, with stories260K; gaps by cross-fitting, as data is short.

    python -m mpo_jax.main --config=tests/configs/hh_dpo.py --workdir=FOLDER

From the project's folder, with ../shared beside it; the numbers are in docs/split.md. Both policies take equally many
steps from the same SFT policy and are judged on the same held-out pairs.
"""

from mpo_jax import recipes
from tests.configs import stories_hh


def get_config():
    config = stories_hh.get_config()
    config.name = "hh_dpo"
    config.data.max_length, config.data.max_response, config.data.max_buckets = 192, 64, 3
    often = {"log_every": 10, "eval_every": 25, "save_every": 100}
    stages = config.stages
    stages.sft = recipes.stage("sft", learning_rate=1e-3, eval_batches=16, **often)
    stages.reward = recipes.stage("reward", epochs=2.0, learning_rate=5e-4, score_batch=32, **often)
    stages.split = recipes.stage("split", quantile=0.5, batch_size=32)
    recipes.crossfit(stages, "reward", "split", folds=2)
    del stages.reward  # only PPO would need the one that is trained on all
    dpo = {"steps": 100, "learning_rate": 3e-4, "beta": 0.1, **often}
    stages.dpo = recipes.stage("dpo", **dpo)
    stages.dpo_all = recipes.stage("dpo", pairs="split/all", **dpo)
    return config
