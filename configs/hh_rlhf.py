"""MPO on Anthropic's HH-RLHF dialogues (Gou & Nguyen 2024): LLaMA-2-7B; whole conversations are prompts.

    python -m mpo_jax.main --config=configs/hh_rlhf.py --workdir=gs://BUCKET/hh \
        --config.model.path=FOLDER_OR_HUB_ID --config.data.path=FOLDER_OR_HUB_ID

Two chains in one run: the data set's own pairs are split and trained on (`split`, `dpo`, `mpo`), and pairs sampled from
the SFT policy (`split_sampled`, `dpo_sampled`, `mpo_sampled`), with DPO on all pairs and PPO from SFT as baselines.
Hardware: v5e:4x8 or v4:2x2x4 (what fits, `python -m mpo_jax.plan` says); hours and chip-hours are estimated in
docs/scaling.md. Not run by us at this size: there are no numbers to expect yet. Variants, after a colon, by commas:
  sweep      both thresholds of the paper, 1 and 2, beside each other, for the data set's pairs
  debug      one GPU or CPU, a small model, minutes; the split is by quantile
  v5e-32, v5p-16, v6e-16
             settings with which the stages take less time on that slice, with the same results (docs/pods.md)
  lora       adapters of rank 16 in place of whole weights, with learning rates ten times as large
  MODEL      pythia-1b, llama2-7b, llama3-8b, qwen2.5-0.5b, tiny
"""

from mpo_jax import recipes


def get_config(variant=""):
    chosen, model = recipes.variants(variant, "sweep", "debug", "lora", *recipes.SLICES)
    config = recipes.large_run("hh_rlhf", model or ("tiny" if "debug" in chosen else "llama2-7b"))
    config.data.path = "Anthropic/hh-rlhf"
    config.stages.update(recipes.mpo_stages(pair_source="dataset"))
    own = recipes.mpo_stages(pair_source="sampled")
    config.stages.split_sampled = own["split"]
    config.stages.dpo_sampled = recipes.stage("dpo", **(recipes.LARGE_DPO | {"pairs": "split_sampled/easy"}))
    config.stages.mpo_sampled = recipes.stage(
        "ppo",
        **(recipes.LARGE_PPO | {"init": "dpo_sampled", "reference": "dpo_sampled", "prompts": "split_sampled/hard"}),
    )
    config.stages.evaluate.policies = (*config.stages.evaluate.policies, "dpo_sampled", "mpo_sampled")
    recipes.on_slice(config, chosen)
    if "debug" in chosen:
        recipes.shrink(config)
    if "lora" in chosen:
        recipes.adapters(config)
    if "sweep" in chosen:
        recipes.sweep(config.stages, "split", "threshold", (1.0, 2.0))
    return config
