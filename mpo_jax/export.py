"""Takes a finished stage; writes its model as a Hugging Face folder with a model card.

`python -m mpo_jax.export --stage=WORKDIR/mpo --output=FOLDER [--adapter] [--verify]`. A policy becomes a causal model,
with its adapters merged; with --adapter, only the adapters are written, as a PEFT folder. A reward model becomes a
model for sequence classification. --verify reads the folder again and compares its logits or scores with the stage's.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath

from mpo_jax import command, finished, store
from mpo_jax.artifacts import REWARD
from mpo_jax.data import template
from mpo_jax.data.prompts import prompt_batch
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.evaluation import model_card
from mpo_jax.models import decoder, hf, hf_adapter, lora
from mpo_jax.models.config import ModelConfig, from_folder
from mpo_jax.stages import job as jobs
from mpo_jax.types import Batch, PyTree

_PROBES = ["Once upon a time", "The", "How do I"]
_TOLERANCE = 1e-5


def export(stage: epath.PathLike, output: epath.PathLike, adapter: bool = False, verify: bool = False) -> None:
    """Writes the folder; with `verify`, InputError where what is read again computes something else."""
    target = store.local(output).expanduser()
    if store.is_remote(output) and epath.Path(output).exists():
        raise InputError(f"--output={output}: exists; choose another")
    if store.is_remote(output) and target.exists():
        shutil.rmtree(target)  # what an export that was killed had not sent
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output={output}: exists and is not an empty folder; choose another")
    job, artifact, manifest = finished.load(finished.find(stage))
    model, base = jobs.model(job), job.config.model.path
    head = artifact.produces == REWARD
    if adapter and (head or model.lora is None):
        raise InputError(
            f"--adapter: {artifact.name} has {'a scalar head' if head else 'no adapters'}; "
            "export the whole model, without --adapter"
        )
    with jax.set_mesh(job.mesh):
        weights = jobs.base_weights(job, model) | jobs.load_weights(job, artifact, model)
        merged = lora.merge(model, weights)
        if adapter:
            hf_adapter.export_adapter(target, model, weights, base)
        else:
            hf.export_weights(target, model, merged, base, head=head, stop_ids=jobs.stop_ids(job))
    if (text := template.chosen(job.config.data.template)) is not None:
        (target / "chat_template.jinja").write_text(text)  # which transformers takes before all others
    chat = text is not None or bool(load_tokenizer(base).chat_template)
    card = model_card.text(job.folder, manifest, base, hf.resolve(base), head=head, adapter=adapter, chat=chat)
    (target / "README.md").write_text(card)
    if verify:
        _verify(target, model, base, merged, adapter, head)
    store.send(output, last="adapter_config.json" if adapter else "config.json")


def _verify(target: Path, model: ModelConfig, base: str, weights: PyTree, adapter: bool, head: bool) -> None:
    """Holds the folder's numbers against the stage's own, for the next token of a few prompts."""
    plain = dataclasses.replace(model, lora=None)
    if adapter:
        held = dataclasses.replace(plain, lora=hf_adapter.read_adapter_config(target, plain))
        again, read = lora.merge(held, hf.import_weights(base, plain) | hf_adapter.import_adapter(target, held)), plain
    else:
        read = dataclasses.replace(from_folder(str(target)), dtype=model.dtype)  # an added pad token has a row more
        again = hf.import_weights(target, read)
    batch = prompt_batch(_PROBES, load_tokenizer(base))
    first, second = _numbers(plain, weights, batch, head), _numbers(read, again, batch, head)
    furthest = float(np.abs(first - second).max())
    if not furthest <= _TOLERANCE:
        raise InputError(
            f"{target}: the model that was read back differs from the stage by {furthest:.3g}; expected {_TOLERANCE:g}"
        )
    print(f"verified: {first.size} {'scores' if head else 'logits'} differ by {furthest:.3g} at most")


def _numbers(model: ModelConfig, weights: PyTree, batch: Batch, head: bool) -> np.ndarray:
    """Prompts end in the last column: their scores, or the logits of what comes next."""
    hidden = decoder.forward(model, weights, batch.tokens, batch.positions, batch.segments)[:, -1]
    if head:
        return np.asarray(decoder.scalar_head(weights, hidden))
    return np.asarray(decoder.logits(model, weights, hidden)[:, : model.vocab_size])


def define() -> None:
    flags.DEFINE_string(
        "stage", None, "The finished stage: WORKDIR/NAME (names are in its stages.json) or WORKDIR/NAME-KEY."
    )
    flags.DEFINE_string("output", None, "An empty or new folder, here or at gs://.")
    flags.DEFINE_bool("adapter", False, "Write only the LoRA adapters, as PEFT reads them.")
    flags.DEFINE_bool(
        "verify", False, "Read the written folder again and compare what its model computes with the stage's."
    )


def work() -> None:
    given = flags.FLAGS
    for name in ("stage", "output"):
        if not given[name].value:
            raise InputError(f"--{name} is missing; give --stage=WORKDIR/NAME --output=FOLDER")
    export(given.stage, given.output, given.adapter, given.verify)
    print(f"exported to {given.output}")


def run() -> None:
    command.start(define, work)


if __name__ == "__main__":
    run()
