"""A model's name enters, of a folder, here or at gs://, or a hub id; the local folder that holds it leaves."""

import fnmatch
import functools
import os
import re
from pathlib import Path

from etils import epath

from mpo_jax import processes, store
from mpo_jax.errors import InputError

TEMPLATES = "additional_chat_templates"
"""Named chat templates, each in a file of that folder."""
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
"""What is downloaded of a model on the hub, or in an object store."""
_STORE = "gs://"
_pinned: dict[str, str] = {}  # hub id -> the revision that every process of the run takes
_fetched: dict[str, str] = {}  # name -> the folder that this process has fetched: it stays the same while it runs


def pin(folder: epath.PathLike) -> None:
    """Has every process take one revision of a model on the hub, that which process 0 finds now; to be called by all of
    them. Without a network it is the one that process 0's cache holds."""
    name = os.fspath(folder)
    revision = processes.told(functools.partial(_revision, name), f"revision of {name}")
    if revision:
        _pinned[name] = revision


def resolve(folder: epath.PathLike) -> str:
    """A local model folder as it is; a gs:// folder fetched to this host's scratch folder (`store.fetch`); a hub id
    downloaded to the local cache. Of both: safetensors, JSON, tokenizer files; what is here already isn't fetched
    again, and of several processes on a host one fetches.

    Raises InputError where it is none of these, or the hub can't be reached and the cache doesn't hold it; and for a
    folder among whose entries is something to wait for, such as a pipe, or a link that leads nowhere.
    """
    name = os.fspath(folder)
    if name in _fetched:
        return _fetched[name]
    if name.startswith(_STORE):
        _fetched[name] = str(store.fetch(name, _is_model_file))
        return _fetched[name]
    if Path(name).expanduser().is_dir():
        for path in Path(name).expanduser().iterdir():
            if not (path.is_file() or path.is_dir()):
                found = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "no regular file"
                raise InputError(f"{path}: is {found}; a model folder holds files")
        return str(Path(name).expanduser())
    _check_id(name)
    from huggingface_hub import snapshot_download

    revision = _pinned.get(name)
    try:
        snapshot_download(name, revision=revision, allow_patterns=[f"{TEMPLATES}/*.jinja"])
        found = snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=["*/*"])
        _fetched[name] = found
        return found
    except Exception as error:  # offline, unknown, gated: the hub's client raises a dozen kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: no such folder, and it can't be downloaded from the hub ({reason}); give a local folder"
        ) from (error)


def at_hand(folder: epath.PathLike) -> bool:
    """Whether a model is here: a local folder, or one of gs:// or the hub that was fetched before. Nothing is
    downloaded. InputError for what is neither a folder nor a hub id."""
    name = os.fspath(folder)
    if name.startswith(_STORE):
        return store.is_fetched(name, _is_model_file)
    if Path(name).expanduser().is_dir():
        return True
    _check_id(name)
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, allow_patterns=_FILES, ignore_patterns=["*/*"], local_files_only=True)
    except Exception:  # not in the cache: the hub's client raises several kinds
        return False
    return True


def _revision(name: str) -> str:
    """The commit of a hub id; "" for a folder, and where neither the hub nor the cache knows it."""
    if Path(name).expanduser().is_dir() or not _is_id(name):
        return ""
    from huggingface_hub import HfApi, snapshot_download

    try:
        return HfApi().model_info(name).sha or ""
    except Exception:  # offline: what the cache holds
        try:
            return Path(snapshot_download(name, allow_patterns=["config.json"], local_files_only=True)).name
        except Exception:  # `resolve` says what is wrong
            return ""


def _is_model_file(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and file.endswith(".jinja")
    return any(fnmatch.fnmatch(file, pattern) for pattern in _FILES)


def _is_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def _check_id(name: str) -> None:
    if not _is_id(name):
        raise InputError(f"{name}: no such folder; expected a local Hugging Face model folder or a hub id (owner/name)")
