"""SFT and reward model of stories260K on HH harmless, 80 % of the prompts for training and 20 % held out.

    python -m mpo_jax.main --config=tests/configs/stories_hh.py --workdir=FOLDER

From the project's folder, with ../shared beside it. The variant "debug" takes a few steps on short rows.
"""

from configs import base


def get_config(variant=""):
    config = base.get_config()
    config.name = "stories_hh"
    config.model.path = "../shared/models/stories260K"
    config.data.path = "../shared/data/hh_rlhf/harmless-base/test.jsonl.gz"
    config.data.split = "all"
    config.data.shares = {"sft_reward": 0.8, "policy": 0.0, "eval": 0.2}
    config.data.max_response = 192
    config.stages.sft = base.stage("sft", epochs=2.0, learning_rate=1e-3)
    config.stages.reward = base.stage("reward", epochs=3.0, learning_rate=5e-4)
    if variant == "debug":
        config.data.limit = 300
        config.data.max_length, config.data.max_response, config.data.max_buckets = 128, 48, 2
        for stage in config.stages.values():
            stage.update({"batch_size": 8, "steps": 24, "save_every": 4, "eval_every": 12, "eval_batches": 4})
    return config
