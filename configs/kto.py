"""KTO alone, of a base (or chat) model on single replies that the data calls good or bad, held by that same model.

mpo run --config=kto --config.model.path=MODEL --config.data.path=REPLIES --workdir=runs/kto
"""

from mpo_jax import recipes


def get_config(variant=""):
    config, _ = recipes.alone("kto", variant, policy=0.9, eval=0.1)
    config.stages.kto = recipes.stage("kto", init="base", reference="base", pairs="data")
    return config
