"""A model folder's `config.json` enters; its values leave, each held against the type and range that it must have.

`transformers` refuses a wrongly typed value too; a text "false" that is taken for true would change the model unseen.
"""

import math
from typing import Any

from etils import epath

from mpo_jax.errors import InputError
from mpo_jax.models.hf_files import read_json

ADAPTER = "adapter_config.json"
_REQUIRED: Any = object()
_TEXT_MODELS = ("text_config", "llm_config", "language_config", "language_model", "decoder", "thinker_config")
_QUANTISED = ("quantization_config", "quantization", "compression_config")


def read_config_json(folder: epath.PathLike) -> dict[str, Any]:
    """The object in `folder/config.json`. InputError, naming the file, where it is missing or broken, or where the
    folder is or holds an adapter, since `transformers` would then load the adapter's base model."""
    folder = epath.Path(folder)
    path, adapter = folder / "config.json", folder / ADAPTER
    if adapter.exists():
        instead = "merge it into its base model (peft: merge_and_unload, save_pretrained) and give that folder"
        if path.exists():
            instead = "move that file away if the weights here are whole, or " + instead
        raise InputError(f"{adapter}: this is an adapter's folder, not a whole model's; {instead}")
    if not path.exists():
        raise InputError(f"{path}: not found; expected a Hugging Face model folder")
    return read_json(path)


def check_whole(config: dict[str, Any], families: list[str]) -> str:
    """The model's family. InputError for one that is not among `families`, and for what `transformers` would make
    another model of: a wrapper, quantised weights, layers that differ, attention that is not causal."""
    family = config.get("model_type")
    if family not in families:
        wrapped = next((key for key in _TEXT_MODELS if isinstance(config.get(key), dict)), None)
        if wrapped is not None:
            raise InputError(
                f"model_type: {family!r} wraps its text model, under {wrapped!r}; save the text model alone as a "
                "folder of its own (transformers: model.language_model, save_pretrained) and give that"
            )
        raise InputError(f"model_type {family!r} is not supported; expected one of {families}")
    for key in _QUANTISED:
        if config.get(key) is not None:
            raise InputError(
                f"{key}: the weights are quantised; give the model's unquantised folder (float32, bfloat16 or float16)"
            )
    for key in ("per_layer_config", "pruned_heads"):
        if config.get(key):
            raise InputError(f"{key}: layers that differ from each other are not supported")
    for key, causal in (("is_causal", True), ("use_bidirectional_attention", False), ("add_cross_attention", False)):
        if config.get(key) not in (None, causal):
            raise InputError(f"{key}: {config[key]!r} is not supported; expected {causal}, a causal language model")
    return str(family)


class Keys:
    """The values of an object, read by name and type. InputError, naming the key, for a value of another type or range;
    KeyError for one that is missing and has no default. `null` reads as missing where a default is None."""

    def __init__(self, values: dict[str, Any], where: str = ""):
        self._values, self._where = values, where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the name is there and says nothing, which a default does not stand for."""
        return name in self._values and self._values[name] is None

    def objects(self) -> list[str]:
        """The names whose values are objects."""
        return [name for name, value in self._values.items() if isinstance(value, dict)]

    def integer(self, name: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        value = self._find(name, default)
        if value is default or (_is_integer(value) and value >= least):
            return value
        raise self._wrong(name, value, f"an integer of at least {least}")

    def number(self, name: str, default: Any = _REQUIRED, above: float = 0.0) -> Any:
        """A finite number above `above`, as float."""
        value = self._find(name, default)
        if value is default:
            return value
        if (_is_integer(value) or isinstance(value, float)) and math.isfinite(value) and value > above:
            return float(value)
        raise self._wrong(name, value, f"a number above {above:g}")

    def flag(self, name: str, default: bool) -> bool:
        value = self._find(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self._find(name, default)
        if value is default or isinstance(value, str):
            return value
        raise self._wrong(name, value, "text")

    def texts(self, name: str) -> list[str] | None:
        value = self._find(name, None)
        if value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            return value
        raise self._wrong(name, value, "a list of texts")

    def object(self, name: str) -> "Keys | None":
        """The object under a name; None where it is missing, null or empty."""
        value = self._find(name, None)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Keys(value, f"{name}.") if value else None

    def _find(self, name: str, default: Any) -> Any:
        if name not in self._values:
            if default is _REQUIRED:
                raise KeyError(f"{self._where}{name}")
            return default
        return self._values[name]

    def _wrong(self, name: str, value: Any, expected: str) -> InputError:
        return InputError(f"{self._where}{name}: {value!r}; expected {expected}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
