"""A finished stage of a run enters; the README of its exported folder leaves: a model card as the hub reads it.

It says what the run itself knows: base model and licence, data, the stages that made it, results with intervals. What
only people know (who it is for, what it must not be used for) is asked for in plain words. Folders of the machine that
it was made on are left out: the card is to be published.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from etils import epath

from mpo_jax import artifacts
from mpo_jax.artifacts import BASE, DATA
from mpo_jax.errors import InputError
from mpo_jax.evaluation import beside, pages, report, sections
from mpo_jax.evaluation.sections import Finished

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCE = ("license", "license_name", "license_link")


def text(
    folder: epath.PathLike,
    manifest: Mapping[str, Any],
    base: str,
    base_folder: epath.PathLike,
    head: bool = False,
    adapter: bool = False,
    chat: bool = False,
) -> str:
    """The card of the stage that lies in `folder`. base: the base model as the config names it; base_folder: where it
    lies. head: a reward model. adapter: LoRA adapters alone. chat: whether the tokenizer has a chat template."""
    folder = epath.Path(folder)
    config = artifacts.read_json(folder / artifacts.CONFIG)
    finished, _ = report.finished(folder.parent)
    beneath = artifacts.beneath(folder)
    own = [stage for stage in finished if stage.name in beneath] + [Finished(manifest["name"], folder, manifest)]
    environment = pages.environment(escaped=False, strict=False)  # manifests of earlier versions lack some
    named = Path(base).name if epath.Path(base).is_dir() else base
    environment.filters["public"] = beside.public
    return environment.get_template("model_card.md").render(
        name=manifest["name"],
        kind=manifest["kind"],
        head=head,
        adapter=adapter,
        base=named,
        hub_base=named if _HUB.fullmatch(named) else "",
        datasets=_datasets(config),
        licence=_licence(base_folder),
        manifest=manifest,
        chat=chat,
        settings=config["stages"][manifest["name"]],
        seed=config.get("seed", 0),
        provenance=sections.provenance(own),
        held_out=(manifest.get("summary") or {}).get("report") if head else None,
        data=sections.data(own),
        edges=[(source, stage.name) for stage in own for source in _sources(stage)],
        evaluations=[found for stage in finished if (found := _evaluated(stage, manifest)) is not None],
    )


def _sources(stage: Finished) -> list[str]:
    entries = (entry["name"] for given in stage.manifest["inputs"].values() for entry in given)
    return [name for name in dict.fromkeys(entries) if name != DATA]


def _datasets(config: Mapping[str, Any]) -> list[str]:
    """Those that the hub knows by name; a path of somebody's machine is nobody else's business."""
    data = config["data"]
    paths = [data["path"], *(source["path"] for source in data["sources"].values())]
    names = (path.removeprefix("hf:") for path in paths if not epath.Path(path or "-").exists())
    return list(dict.fromkeys(name for name in names if _HUB.fullmatch(name)))


def _licence(folder: epath.PathLike) -> dict[str, str]:
    """What the base model's own card says of its licence; {} where there is no card, or none in it."""
    card = epath.Path(folder) / "README.md"
    try:
        found = huggingface_hub.metadata_load(card) if card.exists() else None
    except (ValueError, OSError):
        return {}
    return {key: str(found[key]) for key in _LICENCE if found and found.get(key)}


def _evaluated(stage: Finished, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results of an evaluation that this very artifact was a policy of."""
    made = {entry["name"]: entry.get("made") for entry in stage.manifest["inputs"].get("policies", ())}
    name = manifest["name"]
    if name == BASE or made.get(name) != manifest.get("made") or not (stage.folder / artifacts.REPORT).exists():
        return None
    try:
        shown = sections.evaluation(stage)
    except (InputError, KeyError):
        return None
    given = shown["report"]["verdict"]
    return shown | {"sentences": given["sentences"] if given and given["name"] == name else []}
