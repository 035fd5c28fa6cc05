"""Every key of a run, with its default and unit; other configs begin here and change what they need.

`stage(kind, **settings)` gives a stage of the graph with every key its kind has, so that any of them can be overridden
on the command line: `--config.stages.dpo.beta=0.2`. Where a default is marked "ours", the paper does not publish it.
"""

import difflib

import ml_collections

OPERATIONAL = (
    "mesh", "remat", "attention", "microbatch", "log_every", "save_every", "keep", "path",
    "cache", "wandb", "score_batch", "key_variable", "concurrency", "seconds", "attempts", "max_calls",
    "max_tokens",
)  # fmt: skip
"""Keys that say how a run is computed, not what: they don't enter an artifact's hash, so a run goes on elsewhere."""

MODELS = {
    "tiny": "mpo_jax/assets/tiny_stories",  # comes with the package
    "pythia-1b": "EleutherAI/pythia-1b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
}
"""Names that a config takes after its colon: the base model, as a folder or hub id."""


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
            "attention": "auto",  # auto (cudnn on a GPU if it can, else xla) | xla | cudnn | flash (TPU, rows of 128s)
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
            "max_prompt": 0,  # tokens of a prompt, its latest kept; 0: what the replies leave
            "too_long": "truncate",  # truncate | drop
            "max_buckets": 8,  # row lengths that a step is compiled for
            "multiple": 8,  # what row lengths are a multiple of; flash attention needs 128
            "cache": True,  # keep encoded rows in WORKDIR/cache
        }
    )
    config.stages = ml_collections.ConfigDict()
    return config


TRAINING = {
    "seed": 0,  # added to the run's, for a stage of another seed in the same run
    "batch_size": 16,  # rows of a step, over all devices
    "microbatch": 0,  # rows computed at a time (gradient accumulation); 0: all of them
    "remat": "",  # of this stage; empty: model.remat
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
    "select": "last",  # last | best: which parameters the stage leaves
    "wandb": False,  # also log to Weights & Biases, where installed
}

SAMPLING = {
    "seed": 0,  # added to the run's
    "temperature": 1.0,
    "top_k": 0,  # 0: the whole vocabulary
    "top_p": 0.0,  # 0: no truncation
    "min_new_tokens": 0,
    "max_new_tokens": 64,
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
        "pairs": "",  # a pairs stage to learn from; empty: the data's own pairs
        "folds": 0,  # parts of the share, by prompt, for cross-fitting (see `crossfit`); 0: learn from all of it
        "fold": 0,  # the part that is left out
        "score_batch": 0,  # rows scored at a time for the statistics; 0: batch_size
    },
    "pairs": SAMPLING
    | {
        "policy": "sft",
        "labeller": "vader",  # who says which reply is better
        "label_temperature": 0.1,  # of the Bradley-Terry noise, in the labeller's units; 0: none
        "samples": 2,  # replies to a prompt
        "pairing": "all",  # all: every two replies | best_worst
        "batch_size": 32,  # prompts sampled at a time
    },
    "split": SAMPLING
    | {
        "reward": "reward",  # one that never saw the share, or the k of cross-fitting
        "policy": "sft",
        "pairs": "",  # a pairs stage to read; empty: the data's own pairs
        "share": "policy",
        "pair_source": "dataset",  # dataset | sampled (the policy's own replies) | both
        "samples": 4,  # sampled replies to a prompt
        "pairing": "best_worst",  # best_worst (by reward) | all
        "labeller": "reward",  # who orders sampled replies: reward | vader
        "label_temperature": 0.1,
        "threshold": 1.0,  # gap, reward units: the paper tests 1 and 2
        "quantile": 0.0,  # share of pairs beneath the threshold, instead of it; 0: use threshold
        "flipped": "hard",  # where pairs go whose gap is at most -threshold: hard | drop | swap; ours
        "batch_size": 32,
        "score_batch": 0,
    },
    "dpo": TRAINING
    | {
        "init": "sft",
        "reference": "sft",
        "pairs": "split/easy",
        "algorithm": "dpo",  # dpo | ipo
        "beta": 0.1,  # ours
        "label_smoothing": 0.0,  # assumed share of flipped labels (cDPO)
        "sft": 0.0,  # weight of the chosen reply's mean log-likelihood
        "learning_rate": 5e-7,  # ours
    },
    "ppo": TRAINING
    | {
        "init": "dpo",
        "reference": "dpo",
        "reward": "reward",
        "prompts": "split/hard",
        "sft": "",  # a policy whose KL is logged too
        "algorithm": "ppo",  # ppo | rloo
        "labeller": "reward",  # who scores: the reward model | vader, for studies
        "gold": "",  # a labeller whose scores are logged at evaluations, and learned from by nobody: vader
        "samples": 1,  # replies to a prompt
        "temperature": 1.0,
        "max_new_tokens": 64,
        "inner_epochs": 4,  # passes over each rollout
        "minibatches": 1,  # updates in a pass
        "clip": 0.2,  # of the ratio
        "value_clip": 0.2,  # 0: none
        "value_learning_rate": 0.0,  # peak; 0: learning_rate
        "critic": "separate",  # separate | shared (a head on the policy's trunk)
        "critic_warmup": 0,  # steps before the policy moves
        "entropy": 0.0,  # coefficient of the entropy bonus
        "gamma": 1.0,
        "lam": 0.95,
        "whiten": True,  # advantages to mean 0, variance 1
        "kl_term": "k1",  # k1: inside the reward | k2: a term of the loss
        "kl_coefficient": 0.05,  # ours
        "kl_target": 0.0,  # nats per response, for an adaptive coefficient; 0: fixed
        "kl_gain": 0.1,  # of the adaptive coefficient
        "target_kl": 0.0,  # stops the inner epochs above this k3 per token; 0: never
        "missing_eos_penalty": 0.0,  # taken off the score of a reply without a stop token
        "normalise_scores": False,  # by the reward model's stored mean and standard deviation
        "score_clip": 0.0,  # 0: none
        "eval_prompts": 64,  # held-out prompts of the mid-run evaluation
        "best_kl": 0.0,  # nats: the best checkpoint may not be further from the reference; 0: any
        "table_rows": 4,  # replies kept as text at each evaluation
        "learning_rate": 1e-6,  # ours
    },
    "evaluate": SAMPLING
    | {
        "policies": ("sft", "dpo", "mpo"),
        "reward": "reward",
        "baseline": "sft",  # whom the others are compared with
        "prompts": "split/all",  # whose held-out prompts
        "count": 128,  # of them
        "labeller": "",  # a gold labeller beside the reward model, for studies: vader
        "bootstrap": 2000,  # resamples of an interval
        "batch_size": 32,
        "score_batch": 0,  # rows scored at a time; 0: batch_size
    },
    "judge": {
        "evaluate": "evaluate",  # whose replies are judged
        "judge": "endpoint",  # endpoint (OpenAI's chat-completions protocol) | local | reward | gold (scores at hand)
        "local": "",  # the policy that judges, for `judge = "local"`
        "policies": (),  # some of the evaluation's; empty: all
        "baseline": "",  # whom the others are compared with; empty: every two of them
        "rubric": "helpful",  # the question that comes with the package: summary | helpful | harmless
        "prompt_file": "",  # a Jinja file instead, with {{ prompt }}, {{ first }} and {{ second }}
        "base_url": "https://api.openai.com/v1",
        "model": "",  # the endpoint's name for it
        "key_variable": "OPENAI_API_KEY",  # environment variable with the API key; empty: the server wants none
        "temperature": 0.0,
        "answer_tokens": 256,  # at most, of an answer
        "limit_key": "max_tokens",  # under which it is sent; some models want max_completion_tokens
        "concurrency": 8,  # calls at a time
        "seconds": 120.0,  # that a call may take
        "attempts": 6,  # at a question, before the stage stops
        "max_calls": 0,  # ceiling of the stage, failed attempts included; 0: none
        "max_tokens": 0,  # ceiling of the stage, of questions and answers; 0: none
        "bootstrap": 2000,
        "batch_size": 8,  # questions that a local policy reads at a time
        "seed": 0,  # added to the run's
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


def variants(text: str, *known: str) -> tuple[set[str], str]:
    """The words after a config's colon (`debug,pythia-1b`): those of `known`, and the base model's name or ""."""
    words = [word for word in text.split(",") if word]
    allowed = [*known, *MODELS]
    for word in words:
        if word not in allowed:
            near = difflib.get_close_matches(word, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected some of {', '.join(allowed)}"
            raise ValueError(f"config: no variant {word!r}{hint}")
    models = [word for word in words if word in MODELS]
    if len(models) > 1:
        raise ValueError(f"config: two models, {' and '.join(models)}; expected one")
    return {word for word in words if word in known}, "".join(models)


def crossfit(stages, reward: str, split: str, folds: int) -> None:
    """Scores the pairs that a reward model learns from, where data is short: `folds` further reward stages, each blind
    to its part of the prompts, score that part for `split`. In place; `reward` stays, trained on all, for PPO."""
    names = tuple(f"{reward}_fold_{fold}" for fold in range(folds))
    for fold, name in enumerate(names):
        stages[name] = ml_collections.ConfigDict(stages[reward].to_dict() | {"folds": folds, "fold": fold})
    share = stages[reward].share
    stages[split] = ml_collections.ConfigDict(stages[split].to_dict() | {"reward": names, "share": share})


def sweep(stages, name: str, key: str, values) -> None:
    """Expands stage `name` over `values` of `key`, in place: `split` becomes `split_threshold_1`, `split_threshold_2`.

    Stages that rest on it are expanded with it; all others are shared. A stage that takes several inputs in one role
    (an evaluation's policies) stays one and takes them all. ValueError for an unknown stage or key.
    """
    from mpo_jax.graph import ROLES

    if name not in stages:
        raise ValueError(f"sweep: no stage {name!r}; expected one of {', '.join(stages)}")
    if key not in stages[name]:
        raise ValueError(f"sweep: stage {name!r} has no key {key!r}")

    # Where the buckets' edge moves, all pairs together stay the same, unless pairs beyond the edge are changed.
    edge_alone = key in ("threshold", "quantile") and stages[name].flipped == "hard"

    def sources(stage) -> list[str]:
        given = [stage[role] for role in ROLES[stage.kind] if isinstance(stage.get(role), str)]
        return [source for source in given if not (edge_alone and source == f"{name}/all")]

    expanded, grown = {name}, True
    while grown:
        found = {
            other
            for other, stage in stages.items()
            if any(source.partition("/")[0] in expanded for source in sources(stage))
            and not any(isinstance(stage.get(role), tuple | list) for role in ROLES[stage.kind])
        }
        grown = not found <= expanded
        expanded |= found
    tags = [
        f"{key}_{value:g}".replace(".", "_") if isinstance(value, int | float) else f"{key}_{value}" for value in values
    ]

    def renamed(source: str, tag: str) -> str:
        stem, slash, part = source.partition("/")
        return f"{stem}_{tag}{slash}{part}" if stem in expanded else source

    for other in list(stages):
        stage = stages[other]
        if other in expanded:
            for tag, value in zip(tags, values, strict=True):
                copy = stage.copy_and_resolve_references()
                for role in ROLES[stage.kind]:
                    if isinstance(copy.get(role), str):
                        copy[role] = renamed(copy[role], tag)
                if other == name:
                    copy[key] = value
                stages[f"{other}_{tag}"] = copy
            del stages[other]
            continue
        for role in ROLES[stage.kind]:
            given = stage.get(role)
            if isinstance(given, tuple | list):
                stage[role] = tuple(dict.fromkeys(renamed(source, tag) for source in given for tag in tags))
            elif isinstance(given, str):
                stage[role] = renamed(given, tags[0])


LARGE_DPO = {"batch_size": 64, "microbatch": 32, "learning_rate": 5e-7, "beta": 0.1}  # Rafailov et al. 2023
LARGE_PPO = {
    "sft": "sft",
    "batch_size": 64,
    "microbatch": 32,
    "max_new_tokens": 128,
    "learning_rate": 1e-6,  # ours
    "value_learning_rate": 5e-6,  # ours
    "kl_coefficient": 0.05,  # Stiennon et al. 2020, for summaries
    "normalise_scores": True,
    "missing_eos_penalty": 1.0,  # ours
}
"""Hyperparameters of runs at 7B; the paper publishes none but its thresholds."""


def large_run(name: str, model: str) -> ml_collections.ConfigDict:
    """The settings that runs on pods share: prompts of 512 tokens, replies of 128, batches of 64."""
    config = get_config()
    config.name = name
    config.model.path = MODELS[model]
    config.model.remat = "full"
    config.mesh.tensor = 4
    config.data.max_prompt = 512
    config.data.max_response = 128
    config.data.max_length = 512 + 2 * 128
    config.data.multiple = 128
    config.data.max_buckets = 4
    return config


def mpo_stages(pair_source: str) -> dict[str, ml_collections.ConfigDict]:
    """MPO as in the paper, beside its baselines: DPO on all pairs, and PPO from SFT held by the SFT policy."""
    return {
        "sft": stage("sft", batch_size=64, microbatch=32),
        "reward": stage("reward", batch_size=64, microbatch=32),
        "split": stage("split", pair_source=pair_source, threshold=1.0, max_new_tokens=128, batch_size=64),
        "dpo": stage("dpo", **LARGE_DPO),
        "mpo": stage("ppo", **LARGE_PPO),
        "dpo_full": stage("dpo", **(LARGE_DPO | {"pairs": "split/all"})),
        "ppo_sft": stage("ppo", **(LARGE_PPO | {"init": "sft", "reference": "sft", "prompts": "split/all"})),
        "evaluate": stage(
            "evaluate",
            policies=("sft", "dpo", "mpo", "dpo_full", "ppo_sft"),
            max_new_tokens=128,
            count=512,
            batch_size=64,
        ),
    }


def shrink(config) -> None:
    """Minutes on one device: some thousand rows of whatever splits the data has, divided by prompt, short rows, small
    batches, few steps, and a split in two halves."""
    config.model.remat = "none"
    config.mesh.tensor = 1
    config.data.update({"split": "all", "eval_split": "", "limit": 3000})
    config.data.update({"max_prompt": 160, "max_response": 64, "max_length": 288, "multiple": 8, "max_buckets": 2})
    for stage_ in config.stages.values():
        small = {"batch_size": 16, "microbatch": 0, "max_new_tokens": 48, "count": 64}
        small |= {"eval_every": 40, "eval_batches": 8, "save_every": 20}
        if stage_.kind in ("sft", "reward", "dpo"):
            small |= {"learning_rate": 2e-4}
        if stage_.kind == "ppo":
            small |= {"steps": 20, "learning_rate": 5e-5, "value_learning_rate": 5e-4, "eval_every": 10}
            small |= {"eval_prompts": 32, "save_every": 10}
        if stage_.kind == "split":
            small |= {"quantile": 0.5}
        stage_.update({key: value for key, value in small.items() if key in stage_})
