"""The SFT stage that trains the quickstart's embedded base model, as the last step but one of its recipe.

bash run_scripts/make_tiny_base.sh TEACHER_FOLDER        (10 to 60 minutes on 2 cores; see the card)
"""

from mpo_jax import recipes


def get_config():
    config = recipes.config()
    config.name = "tiny_base"
    config.data.shares = {"sft_reward": 0.98, "policy": 0.0, "eval": 0.02}
    config.data.max_length = 128
    config.data.max_response = 112
    config.data.max_buckets = 3
    config.stages.sft = recipes.stage(
        "sft", epochs=2.0, batch_size=64, learning_rate=4e-3, warmup=0.03, weight_decay=0.1, log_every=10, beta2=0.98
    )
    return config
