"""Every key of a run, with its default and unit; other configs begin here and change what they need.

`stage(kind, **settings)` gives a stage of the graph with every key its kind has, so that any of them can be overridden
on the command line: `--config.stages.dpo.beta=0.2`. Where a default is marked "ours", the paper does not publish it.
"""

import difflib

import ml_collections

OPERATIONAL = (
    "mesh", "decode_mesh", "remat", "attention", "microbatch", "log_every", "save_every", "keep", "path",
    "cache", "prefetch", "table_every", "wandb", "score_batch",
)  # fmt: skip
"""Keys that say how a run is computed, not what: they don't enter an artifact's hash, so a run goes on elsewhere."""


def get_config() -> ml_collections.ConfigDict:
    """The keys that stand outside the stages. Run with a config that declares stages: configs/quickstart.py, ..."""
    config = ml_collections.ConfigDict()
    config.name = "mpo"
    config.seed = 0
    config.operational = OPERATIONAL
    config.model = ml_collections.ConfigDict(
        {
            "path": "",  # Hugging Face folder or hub id of the base model
            "dtype": "auto",  # of computation: float32 | bfloat16 | auto (bfloat16 on accelerators)
            "frozen_dtype": "auto",  # of frozen weights: float32 | bfloat16 | auto (bfloat16 on accelerators)
            "remat": "none",  # none | full (save only a layer's input) | dots (save matrix products too)
            "attention": "xla",  # xla | flash (TPU: Pallas splash; rows in multiples of 128)
            "lora": {"rank": 0, "alpha": 16.0, "targets": ("q", "k", "v", "o")},  # rank 0: full fine-tuning
        }
    )
    config.mesh = ml_collections.ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})  # -1: what the devices leave
    config.data = ml_collections.ConfigDict(
        {
            "path": "",  # file, folder, tfds:name or hub name
            "split": "train",
            "eval_split": "",  # a split of its own for evaluation; empty: the eval share of `split`
            "shares": {"sft_reward": 0.45, "policy": 0.45, "eval": 0.1},  # of prompts, by hash; ours
            "limit": 0,  # records read; 0: all
            "max_length": 512,  # tokens of a row: prompt and all replies
            "max_response": 128,  # tokens of one reply, its EOS included
            "too_long": "truncate",  # truncate | drop
            "max_buckets": 8,  # row lengths that a step is compiled for
            "multiple": 8,  # what row lengths are a multiple of; flash attention needs 128
            "cache": True,  # keep encoded rows in WORKDIR/cache
        }
    )
    config.stages = ml_collections.ConfigDict()
    return config


TRAINING = {
    "batch_size": 16,  # rows of a step, over all devices
    "microbatch": 0,  # rows computed at a time (gradient accumulation); 0: all of them
    "epochs": 1.0,
    "steps": 0,  # optimizer steps; 0: as many as `epochs` gives
    "learning_rate": 1e-5,  # peak
    "schedule": "cosine",  # constant | linear | cosine
    "warmup": 0.05,  # share of the steps
    "end_fraction": 0.1,  # of the peak, at the last step
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "clip_norm": 1.0,  # of the global gradient; 0: none
    "moments": "float32",  # float32 | bfloat16 | factored
    "eval_every": 0,  # steps; 0: a tenth of the run
    "eval_batches": 32,  # at most, of the held-out share
    "save_every": 0,  # steps; 0: a tenth of the run
    "keep": 2,  # checkpoints
    "log_every": 1,  # steps
    "wandb": False,  # also log to Weights & Biases, where installed
}

KINDS = {
    "sft": TRAINING
    | {
        "init": "base",
        "share": "sft_reward",
        "learning_rate": 2e-5,  # ours
    },
    "reward": TRAINING
    | {
        "init": "sft",
        "share": "sft_reward",
        "margin": False,  # subtract the annotator's margin inside the sigmoid, where the data has one
        "learning_rate": 1e-5,  # ours
        "score_batch": 0,  # rows scored at a time for the statistics; 0: batch_size
    },
}


def stage(kind: str, **settings) -> ml_collections.ConfigDict:
    """A stage of `kind` with every key it has; ValueError, suggesting the nearest, for a key or kind it has not."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of stage {kind!r}; expected one of {', '.join(KINDS)}")
    for key in settings:
        if key not in KINDS[kind]:
            near = difflib.get_close_matches(key, KINDS[kind], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(KINDS[kind])}"
            raise ValueError(f"stage of kind {kind!r} has no key {key!r}{hint}")
    return ml_collections.ConfigDict({"kind": kind} | KINDS[kind] | settings)
