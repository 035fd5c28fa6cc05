"""A stage's folder enters; what trackers of experiments are told of it leaves: a run at Weights & Biases, and the
settings that TensorBoard lists beside the curves."""

import dataclasses
import re
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from mpo_jax import artifacts, store
from mpo_jax.errors import InputError
from mpo_jax.settings import without_secrets

METRICS = ("loss", "eval/loss", "eval/accuracy", "eval/score", "eval/kl")
"""Those that TensorBoard's table of settings shows, where a stage has them."""
_KEY = re.compile(r"(.+)-[0-9a-f]{12}")
"""A stage's folder: its name and its key."""


@dataclasses.dataclass(frozen=True)
class Account:
    """Where runs are kept at Weights & Biases. entity: a user or a team; empty: the one who is logged in."""

    project: str = "mpo_jax"
    entity: str = ""


def known(folder: epath.Path) -> dict[str, Any]:
    """The settings of the stage in a folder, and those of its run, flat by dotted names as the command line has them;
    {} where the folder has none. What may be secret in addresses is left out."""
    if not (folder / artifacts.CONFIG).exists():
        return {}
    config = artifacts.read_json(folder / artifacts.CONFIG)
    name = found[1] if (found := _KEY.fullmatch(folder.name)) else folder.name
    run = {key: value for key, value in config.items() if key != "stages"}
    return dict(_flat(run, "")) | dict(_flat(config.get("stages", {}).get(name, {}), "stage."))


def _flat(value: Any, name: str):
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _flat(each, f"{name}{key}.")
        return
    plain = value if isinstance(value, bool | int | float) else str(value)
    yield name.rstrip("."), without_secrets(plain, "…") if isinstance(plain, str) else plain


def wandb_id(folder: epath.Path) -> str:
    """The id of a stage's run: its name and key, so that a stage that is resumed, or done again elsewhere with the same
    settings, goes on in its own run. A folder without a key, or one of an earlier version, keeps a random one."""
    path = folder / artifacts.WANDB_ID
    if not path.exists():
        keyed = _KEY.fullmatch(folder.name) is not None
        artifacts.write_text(path, re.sub(r"[^\w.-]", "-", folder.name) if keyed else uuid.uuid4().hex)
    return path.read_text()


def start_wandb(folder: epath.Path, account: Account):
    """The stage's run. InputError where the package is not installed, or does not begin."""
    try:
        import wandb
    except ImportError as error:
        raise InputError("wandb: true, but wandb is not installed; pip install wandb, or set it to false") from error
    settings = known(folder)
    try:
        return wandb.init(
            project=account.project,
            entity=account.entity or None,
            dir=str(store.local(folder)),
            name=folder.name,
            group=settings.get("name"),
            job_type=settings.get("stage.kind"),
            id=wandb_id(folder),
            resume="allow",
            config=settings,
        )
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"wandb: true, but project {account.project!r} can't be opened: {told}") from error


def hparams(settings: Mapping[str, Any]):
    """TensorBoard's three records of a session: the experiment, its beginning with the settings, and its end."""
    from tensorboardX.summary import hparams as made  # see `metrics._Events`

    return made(dict(settings), dict.fromkeys(METRICS, 0.0))
