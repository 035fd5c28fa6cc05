"""The small graph with every long kind of stage: a judge, KTO and an evaluation too; it keeps something at every batch.

The model and the data are given on the command line: --config.model.path, --config.data.path. `:pairs` leaves one
stage, pairs of the base model's own replies.
"""

from mpo_jax import recipes
from tests.tools import small_graph


def get_config(variant=""):
    config = small_graph.get_config()
    config.shard_seconds = 0.0
    stages = config.stages
    if variant == "pairs":
        pairs = stages.pairs
        pairs.update({"policy": "base", "batch_size": 4})
        config.stages = {"pairs": pairs}
        return config
    stages.kto = recipes.stage("kto", init="sft", reference="sft", data="", batch_size=8, steps=20)
    stages.evaluate = recipes.stage(
        "evaluate", policies=("sft", "dpo"), baseline="sft", count=32, batch_size=4, max_new_tokens=16
    )
    stages.judge = recipes.stage("judge", judge="local", local="sft", batch_size=4)
    for stage in stages.values():
        every = {"log_every": 1, "eval_every": 10, "eval_batches": 2, "save_every": 5}
        if stage.kind in ("sft", "reward", "dpo", "kto"):
            stage.update({key: value for key, value in (every | {"steps": 20}).items() if key in stage})
        if stage.kind == "ppo":
            stage.update({"steps": 6, "save_every": 2, "log_every": 1})
        if stage.kind in ("pairs", "split"):
            stage.batch_size = 4
    return config
