"""The quickstart's own data and graph, in a few steps: whoever watches a training never reads what is reported on."""

import json

import jax
import pytest
from etils import epath

from configs import quickstart
from mpo_jax import graph, pipeline, sharding
from mpo_jax.data.loader import Loader
from mpo_jax.stages import kinds, loop


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The workdir of a run, and the prompt ids of the rows that were held out while its stages trained: a list of
    sets, one for each evaluation."""
    config = quickstart.get_config()
    for stage in config.stages.values():
        small = {"steps": 2, "eval_every": 1, "max_new_tokens": 4, "samples": 2, "select": "best"}
        stage.update({key: value for key, value in small.items() if key in stage})
    run, workdir = kinds.read(config.to_dict()), epath.Path(tmp_path_factory.mktemp("run"))
    watched: list[set[int]] = []
    training = [False]
    train, sample = loop.train, Loader.sample

    def marked(*arguments):
        training[0] = True
        try:
            return train(*arguments)
        finally:
            training[0] = False

    def noted(loader, batches):
        if training[0]:
            watched.append(set(loader.encoded.prompt_id.tolist()))
        return sample(loader, batches)

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh := sharding.make_mesh(devices=jax.devices()[:1])):
        patch.setattr(loop, "train", marked)
        patch.setattr(Loader, "sample", noted)
        pipeline.run(run, workdir, mesh)
    folders = {name: node.folder for name, node in graph.resolve(run, workdir).items()}
    return folders, watched


def test_prompts_that_select_a_checkpoint_are_not_reported_on(ran):
    folders, watched = ran
    lines = (folders["evaluate"] / "replies.jsonl").read_text().splitlines()
    reported = {json.loads(line)["prompt_id"] for line in lines}
    # sft, reward, two dpo and two ppo stages looked twice each.
    assert len(watched) == 12 and all(watched) and len(reported) > 100
    assert not reported & set().union(*watched)
