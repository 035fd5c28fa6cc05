"""A small model, known by its numbers alone, in a graph of every stage that compiles something."""

import dataclasses

import jax

from mpo_jax import recipes
from mpo_jax.models import presets
from mpo_jax.models.config import ModelConfig
from mpo_jax.planning import chips, stages
from mpo_jax.planning.chips import Topology
from mpo_jax.run import Run
from mpo_jax.stages import kinds
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Program


def model(layers: int = 2, width: int = 64, heads: int = 4, mlp: int = 192, vocabulary: int = 512) -> presets.Preset:
    return presets.Preset(
        ModelConfig("llama", vocabulary, layers, width, heads, heads, width // heads, mlp, 4096), stop_ids=(2,)
    )


def config(
    rows: int = 8, prompt: int = 64, response: int = 32, remat: str = "full", lora: int = 0, microbatch: int = 0,
    **changes,
) -> Run:  # fmt: skip
    """A graph whose batches are all of `rows`. changes: of the mesh's axes."""
    made = recipes.config()
    made.model.path, made.model.remat, made.model.lora.rank = "llama2-7b", remat, lora
    made.data.update({"path": "unread", "max_prompt": prompt, "max_response": response})
    made.data.max_length = prompt + 2 * response
    made.mesh.update(changes)
    made.stages.update(recipes.mpo_stages(pair_source="sampled"))
    for stage in made.stages.values():
        new = {"batch_size": rows, "microbatch": microbatch, "max_new_tokens": response}
        stage.update({key: value for key, value in new.items() if key in stage})
    return kinds.read(made.to_dict())


def one_cpu() -> Topology:
    place = chips.topology("cpu")
    return dataclasses.replace(place, devices=place.devices[:1])


def job(stage: str, place: Topology, preset: presets.Preset, **options) -> Job:
    return dataclasses.replace(stages.jobs(config(**options), place, [stage])[stage], preset=preset)


def program(stage: str, name: str, preset: presets.Preset, **options) -> tuple[Program, Job]:
    """One program of a stage on one CPU device."""
    planned = job(stage, one_cpu(), preset, **options)
    with jax.set_mesh(planned.mesh):
        return kinds.of(planned.settings).programs(planned)[name], planned
