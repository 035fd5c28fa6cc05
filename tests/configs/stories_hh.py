"""SFT and reward model of stories260K on HH harmless, 80 % of the prompts for training and 20 % held out.

    python -m mpo_jax.main --config=tests/configs/stories_hh.py --workdir=FOLDER

From the project's folder, with ../shared beside it; about ten minutes of one CPU core. The variant "debug" takes a few
steps on short rows.
"""

from mpo_jax import recipes


def get_config(variant=""):
    config = recipes.config()
    config.name = "stories_hh"
    config.model.path = "../shared/models/stories260K"
    config.data.path = "../shared/data/hh_rlhf/harmless-base/test.jsonl.gz"
    config.data.split = "all"
    config.data.shares = {"sft_reward": 0.8, "policy": 0.0, "eval": 0.2}
    config.data.max_length, config.data.max_response, config.data.max_buckets = 256, 96, 4
    often = {"log_every": 10, "eval_every": 58, "save_every": 58}
    config.stages.sft = recipes.stage("sft", learning_rate=1e-3, eval_batches=16, **often)
    config.stages.reward = recipes.stage("reward", epochs=2.0, learning_rate=5e-4, score_batch=32, **often)
    if variant == "debug":
        config.data.limit = 150
        config.data.max_length, config.data.max_response, config.data.max_buckets = 64, 24, 2
        for stage in config.stages.values():
            few = {"batch_size": 8, "steps": 16, "log_every": 1, "save_every": 4, "eval_every": 8, "eval_batches": 2}
            stage.update(few)
    return config
