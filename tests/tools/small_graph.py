"""The quickstart's graph, so small that several processes on a few cores finish it: a tiny model, few rows and steps.

The model and the data are given on the command line: --config.model.path, --config.data.path.
"""

import json
from pathlib import Path

from configs import quickstart
from tests.stages.ppo_job import STORIES


def get_config():
    config = quickstart.get_config()
    config.data.update({"max_length": 96, "max_response": 16, "max_prompt": 64})
    stages = config.stages
    for name in ("dpo_all", "ppo_sft", "evaluate", "judge"):
        if name in stages:
            del stages[name]
    every = {"log_every": 1, "eval_every": 25, "save_every": 10}
    for stage in stages.values():
        small = every | {"batch_size": 8, "max_new_tokens": 16, "eval_batches": 2, "samples": 2}
        if stage.kind in ("sft", "reward", "dpo"):
            small["steps"] = 50
        if stage.kind == "ppo":
            small |= {"steps": 2, "samples": 1, "eval_prompts": 16, "inner_epochs": 2}
        stage.update({key: value for key, value in small.items() if key in stage})
    # At the quickstart's 3e-3 this tiny model turns a rounding difference of 1e-6 into 1e-2 within ten steps, so that
    # no two orders of summing give one curve.
    stages.reward.learning_rate = 3e-4
    return config


def write_rows(path: Path) -> None:
    """240 beginnings of stories with two endings each, as JSONL."""
    with path.open("w") as file:
        for number, story in enumerate(STORIES):
            good, bad = ENDINGS[number % len(ENDINGS)]
            file.write(json.dumps({"prompt": story, "chosen": good, "rejected": bad}) + "\n")


ENDINGS = (
    (" They were happy and played all day.", " It was dark and they were sad."),
    (" A kind dog came and they all smiled.", " A bad dog came and they cried."),
    (" Mom gave them a big hug.", " Mom was angry and they had to go."),
)
