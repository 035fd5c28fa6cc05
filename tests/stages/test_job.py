"""Jobs of a run's stages enter; what they are handed is checked."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np

from mpo_jax.stages import job as jobs


def test_no_two_stages_share_a_key():
    """`dpo_full` and `ppo_full` had one key: that of their last four letters."""
    names = ["sft", "reward", "split", "dpo", "dpo_full", "ppo_full", "mpo", "xxxxxxxxxxxxxxfull"]
    keys = [
        np.asarray(jax.random.key_data(jobs.key(SimpleNamespace(name=name, seed=seed))))
        for name, seed in itertools.product(names, (0, 1))
    ]
    assert len(np.unique(keys, axis=0)) == len(keys)
