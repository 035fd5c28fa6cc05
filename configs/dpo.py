"""DPO alone, of a base (or chat) model on the data's pairs, held by that same model.

mpo run --config=dpo --config.model.path=MODEL --config.data.path=PAIRS --workdir=runs/dpo
"""

from mpo_jax import recipes


def get_config(variant=""):
    config, _ = recipes.alone("dpo", variant, policy=0.9, eval=0.1)
    config.stages.dpo = recipes.stage("dpo", init="base", reference="base", pairs="data")
    return config
