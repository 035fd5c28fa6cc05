"""MPO on TL;DR summaries, as in the paper (Gou & Nguyen 2024): LLaMA-2-7B, pairs sampled from the SFT policy.

    python -m mpo_jax.main --config=configs/tldr.py --workdir=gs://BUCKET/tldr \
        --config.model.path=FOLDER_OR_HUB_ID --config.data.path=FOLDER_OR_HUB_ID

Hardware: v5e:4x8 or v4:2x2x4 (what fits, `python -m mpo_jax.plan` says); hours and chip-hours are estimated in
docs/scaling.md. Not run by us at this size: there are no numbers to expect yet. Variants, after a colon, by commas:
  dataset    the data set's own labelled pairs are split, instead of pairs sampled from the SFT policy
  sweep      both thresholds of the paper, 1 and 2, beside each other
  debug      one GPU or CPU, a small model, minutes: sampled pairs are labelled by VADER, the split is by quantile
  v5e-32, v5p-16, v6e-16
             settings with which the stages take less time on that slice, with the same results (docs/pods.md)
  lora       adapters of rank 16 in place of whole weights, with learning rates ten times as large
  MODEL      pythia-1b, llama2-7b, llama3-8b, qwen2.5-0.5b, tiny
For example `--config=configs/tldr.py:debug --config.data.path=posts.jsonl`.
"""

from mpo_jax import recipes


def get_config(variant=""):
    chosen, model = recipes.variants(variant, "dataset", "sweep", "debug", "lora", *recipes.SLICES)
    config = recipes.large_run("tldr", model or ("tiny" if "debug" in chosen else "llama2-7b"))
    config.data.path = "openai/summarize_from_feedback/comparisons"
    source = "dataset" if "dataset" in chosen else "sampled"
    config.stages.update(recipes.mpo_stages(pair_source=source))
    recipes.on_slice(config, chosen)
    if "debug" in chosen:
        recipes.shrink(config)
        if source == "sampled":  # posts without labels: a simulated annotator compares the policy's own summaries
            config.stages.pairs = recipes.stage("pairs", max_new_tokens=48, samples=4, label_temperature=0.2)
            config.stages.reward.pairs = "pairs"
            config.stages.split.update({"pairs": "pairs", "pair_source": "dataset"})
    if "lora" in chosen:
        recipes.adapters(config)
    if "sweep" in chosen:
        recipes.sweep(config.stages, "split", "threshold", (1.0, 2.0))
    return config
