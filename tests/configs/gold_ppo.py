"""PPO on a gold reward, three seeds: from DPO and held by DPO, beside from SFT and held by SFT, at equal prompts and
steps. VADER's sentiment is the reward itself, so that nothing stands between PPO and what it is judged by.

    python tests/tools/story_prompts.py prompts.jsonl
    python -m mpo_jax.main --config=tests/configs/gold_ppo.py --config.data.path=prompts.jsonl --workdir=FOLDER
    python tests/tools/gold_ppo.py FOLDER

From the project's folder, with ../shared beside it; some minutes on 2 cores. The base model plays the SFT policy.
"""

from mpo_jax import recipes

SEEDS = (0, 1, 2)


def get_config():
    config = recipes.config()
    config.name = "gold_ppo"
    config.model.path = "../shared/models/stories260K"
    config.data.shares = {"sft_reward": 0.4, "policy": 0.4, "eval": 0.2}
    config.data.max_length, config.data.max_response, config.data.max_prompt = 144, 40, 56
    config.data.max_buckets = 1
    sampled = {"max_new_tokens": 40, "batch_size": 64}
    ppo = {
        "scorer": "vader", "sft": "base", "prompts": "split/hard", "batch_size": 32, "steps": 20, "inner_epochs": 2,
        "max_new_tokens": 40, "learning_rate": 2e-4, "value_learning_rate": 1e-3, "kl_coefficient": 0.05,
        "eval_prompts": 128, "eval_every": 10, "save_every": 20,
    }  # fmt: skip
    from_dpo = {"init": "dpo", "reference": "dpo"}
    from_sft = {"init": "base", "reference": "base"}
    config.stages.update(
        {
            "pairs": recipes.stage("pairs", policy="base", samples=4, label_temperature=0.2, **sampled),
            "reward": recipes.stage("reward", init="base", pairs="pairs", batch_size=32, learning_rate=1e-3),
            "split": recipes.stage("split", policy="base", pairs="pairs", quantile=0.5, batch_size=64),
            "dpo": recipes.stage("dpo", init="base", reference="base", batch_size=32, learning_rate=2e-4),
            # A rate of 0: the evaluation of the start itself, by the same prompts and draws.
            "dpo_level": recipes.stage("ppo", **(ppo | from_dpo | {"steps": 1, "learning_rate": 0.0})),
            "sft_level": recipes.stage("ppo", **(ppo | from_sft | {"steps": 1, "learning_rate": 0.0})),
        }
    )
    for seed in SEEDS:
        config.stages[f"mpo_{seed}"] = recipes.stage("ppo", seed=seed, **(ppo | from_dpo))
        config.stages[f"ppo_sft_{seed}"] = recipes.stage("ppo", seed=seed, **(ppo | from_sft))
    return config
