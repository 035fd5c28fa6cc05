"""A Hugging Face folder or hub id enters, sharded weights leave; and weights leave as a Hugging Face folder.

Safetensors and JSON only; remote code never runs. Which tensor is which weight, `hf_names` says for both directions.
"""

import math
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from mpo_jax import progress, sharding
from mpo_jax.errors import InputError
from mpo_jax.models import hf_names, parameters
from mpo_jax.models.config import ModelConfig
from mpo_jax.models.config_json import read_config_json
from mpo_jax.models.hf_files import DTYPES, INDEX, Reader, read_json, write_json, write_tensors
from mpo_jax.models.hf_names import Entry
from mpo_jax.models.hub import TEMPLATES, resolve
from mpo_jax.types import PyTree

PAD_TOKEN = "<|reward_pad|>"  # added to a tokenizer none of whose special tokens can be a reward model's padding
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def read_stop_ids(folder: epath.PathLike) -> tuple[int, ...]:
    """All ids that end a response: eos_token_id (one or several) of generation_config.json and config.json, and the
    tokenizer's own. Raises InputError where there is none at all, or one that is no integer."""
    folder = resolve(folder)
    found: set[int] = set()
    settings = {"config.json": read_config_json(folder)}
    generation = Path(folder) / "generation_config.json"
    if generation.exists():
        settings[generation.name] = read_json(generation)
    for name, setting in settings.items():
        ids = setting.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
            raise InputError(f"{Path(folder) / name}: eos_token_id: {setting['eos_token_id']!r}; expected an integer "
                             "or a list of integers")  # fmt: skip
        found |= set(ids)
    if (Path(folder) / "tokenizer_config.json").exists():
        eos = _load_tokenizer(folder).eos_token_id
        found |= set() if eos is None else {eos}
    if not found:
        raise InputError(f"{folder}: no eos_token_id in generation_config.json, config.json or the tokenizer")
    return tuple(sorted(found))


def import_weights(
    folder: epath.PathLike, config: ModelConfig, mesh: Mesh | None = None, dtype: str = "float32"
) -> PyTree:
    """The weights of a checkpoint, {"params"} and, of a sequence-classification folder, {"head"} (f32).

    Read slice by slice: a process holds its own shards and at most one more. Without a mesh, all on one device. The
    trunk is cast to `dtype`, but for what the forward pass reads in a wider one (`parameters.frozen_dtype`); rows of
    padding ids are zero. A reward model's folder holds no output matrix, so its
    "params" has none.
    Raises InputError, naming the file and the tensor, for unknown, missing and duplicate tensors, wrong shapes and
    dtypes, a folder without config or with pickles alone.
    """
    path = resolve(folder)
    architectures = read_config_json(path).get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
    reader = Reader(Path(path))
    entries = _match(reader, config, head=str(architecture).endswith("ForSequenceClassification"))
    weights: dict = {}
    # The largest first: what is held beside the shards so far is then smallest where the total is largest.
    entries = sorted(entries, key=lambda entry: -math.prod(_own_shape(entry, config)))
    for entry in progress.each(entries, "import weights", len(entries)):
        shape = _own_shape(entry, config)
        placed = (
            SingleDeviceSharding(jax.local_devices()[0])
            if mesh is None
            else NamedSharding(mesh, sharding.weight_spec(entry.weight, shape, mesh))
        )
        kept = parameters.frozen_dtype(config, entry.weight, dtype)
        *parents, leaf = entry.weight.split("/")
        tree = weights
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[leaf] = _place(reader, entry, config, shape, placed, kept)
    return weights


def export_weights(
    folder: epath.PathLike,
    config: ModelConfig,
    weights: PyTree,
    source: epath.PathLike,
    *,
    head: bool = False,
    dtype: str = "float32",
    max_shard_bytes: int = 4 << 30,
    stop_ids: tuple[int, ...] = (),
) -> None:
    """Writes weights as a Hugging Face folder: safetensors, config.json, generation_config.json and tokenizer.

    source: the base model's folder, whose config keys and tokenizer go along. head: as a reward model,
    `...ForSequenceClassification` with one label; its pad token is one that never ends a sequence, since transformers
    scores the last token that differs from it. dtype: float32, bfloat16 or float16. Tensors are gathered one at a
    time; process 0 alone writes, and holds at most one file's tensors. stop_ids: what ends a reply, beside what ends
    one in the source.
    Raises InputError for adapters not merged, a missing weight, or a folder that holds weights already.
    """
    target, source = Path(os.fspath(folder)).expanduser(), resolve(source)
    if "lora" in weights:
        raise InputError(f"{target}: the weights hold adapters; merge them first")
    writes = jax.process_index() == 0
    if writes and target.exists() and any(target.glob("*.safetensors")):
        raise InputError(f"{target}: holds safetensors already; give an empty folder")
    table = hf_names.table(config)
    settings = read_config_json(source) | {
        "architectures": [table.architectures[head]],
        "vocab_size": config.vocab_size,
    }
    settings[next((key for key in ("dtype", "torch_dtype") if key in settings), "torch_dtype")] = dtype
    entries = [entry for entry in table.entries if not (head and entry.weight == hf_names.LM_HEAD)]
    tokenizer = None
    if head:
        entries.append(hf_names.HEAD)
        tokenizer = _reward_tokenizer(source)
        pad_id = tokenizer.pad_token_id
        settings |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}, "pad_token_id": pad_id}
        settings["vocab_size"] = max(config.vocab_size, pad_id + 1)  # an added pad token may need a row of its own
    if writes:
        target.mkdir(parents=True, exist_ok=True)
    _write_tensors(target, entries, config, settings["vocab_size"], weights, dtype, max_shard_bytes)
    if writes:
        write_tokenizer(target, source, tokenizer)
        _write_generation(target, source, stop_ids)
        write_json(target / "config.json", settings)  # last: nothing loads a folder without it
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export_weights")


def _reward_tokenizer(source: str):
    """The tokenizer with a pad token that never ends a sequence: its own, else BOS (which only begins one), else a
    new token. EOS and other stop tokens end a reply, and text that is cut off may end in an unknown word."""
    tokenizer = _load_tokenizer(source)
    ends = {*read_stop_ids(source), tokenizer.unk_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        if tokenizer.bos_token_id is not None and tokenizer.bos_token_id not in ends:
            tokenizer.pad_token = tokenizer.bos_token
        else:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    return tokenizer


def write_tokenizer(target: Path, source: str, tokenizer=None) -> None:
    """Writes the tokenizer, or else copies that of the folder `source`, all its chat templates with it."""
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
        return
    templates = sorted((Path(source) / TEMPLATES).glob("*.jinja"))
    for path in [*(Path(source) / name for name in _TOKENIZER_FILES), *templates]:
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _write_generation(target: Path, source: str, stop_ids: tuple[int, ...]) -> None:
    path = Path(source) / "generation_config.json"
    own = read_stop_ids(source)
    ends = sorted({*own, *stop_ids})
    if path.is_file() and set(ends) == set(own):
        shutil.copyfile(path, target / path.name)
        return
    settings = read_json(path) if path.is_file() else {"bos_token_id": read_config_json(source).get("bos_token_id")}
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(target / path.name, {key: value for key, value in settings.items() if value is not None})


def _write_tensors(
    target: Path, entries: list[Entry], config: ModelConfig, vocabulary: int, weights, dtype: str, max_shard_bytes: int
) -> None:
    """The safetensors of all entries, and their index where there is more than one file."""
    parts: dict[str, list[tuple[Entry, int]]] = {}  # what lies side by side in a tensor, and of which layer
    for entry in entries:
        for layer, tensor in enumerate(_tensors(entry, config)):
            parts.setdefault(tensor, []).append((entry, layer))
    item = jnp.dtype(dtype).itemsize
    sizes = {tensor: math.prod(_tensor_shape(found[0][0], config)) * item for tensor, found in parts.items()}
    files: list[list[str]] = [[]]
    for tensor in parts:
        if files[-1] and sum(sizes[name] for name in files[-1]) + sizes[tensor] > max_shard_bytes:
            files.append([])
        files[-1].append(tensor)
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        held = {}
        for tensor in tensors:
            found = _gather(parts[tensor], config, vocabulary, weights, dtype)
            weight_map[tensor] = name
            if jax.process_index() == 0:
                held[tensor] = found
        if held:
            write_tensors(target / name, held)
    if len(files) > 1 and jax.process_index() == 0:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(target / INDEX, index)


def _gather(parts: list[tuple[Entry, int]], config: ModelConfig, vocabulary: int, weights, dtype: str) -> np.ndarray:
    """One whole tensor on the host, from the weights that lie in it."""
    first = parts[0][0]
    sizes = _sizes(first, config) | ({"v": vocabulary} if "v" in first.own_axes else {})
    tensor = np.zeros([sizes[letter] for axis in first.axes for letter in axis], jnp.dtype(dtype))
    for entry, layer in parts:
        own = _to_host(_find(weights, entry), layer if _is_stacked(entry) else None)
        own = own[: config.vocab_size] if entry.own_axes[0] == "v" else own
        letters = [letter for axis in entry.axes for letter in axis]
        order = [entry.own_axes.index(letter) for letter in letters if not letter.isdigit()]
        view = tensor[tuple(entry.part if letter.isdigit() else slice(None) for letter in letters)]
        view[tuple(slice(own.shape[axis]) for axis in order)] = own.transpose(order)
    return tensor.reshape([math.prod(sizes[letter] for letter in axis) for axis in first.axes])


def _find(weights: PyTree, entry: Entry) -> jax.Array:
    for name in entry.weight.split("/"):
        if name not in weights:
            raise InputError(f"export: weight {entry.weight!r} is missing; tensor {entry.tensor!r} needs it")
        weights = weights[name]
    return weights


@jax.jit
def _layer_of(weight: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)


def _to_host(weight: jax.Array, layer: int | None) -> np.ndarray:
    weight = jnp.asarray(weight) if layer is None else _layer_of(weight, jnp.int32(layer))
    if weight.is_fully_addressable:
        return np.asarray(weight)
    return np.asarray(multihost_utils.process_allgather(weight, tiled=True))


def _place(reader, entry: Entry, config: ModelConfig, shape, placed, dtype) -> jax.Array:
    """One weight, a shard at a time. (`jax.make_array_from_callback` reads all of a process's shards before it places
    the first; here one is in host memory at once, and a replica isn't read twice.)"""
    devices: dict[tuple, list] = {}
    for device, index in placed.addressable_devices_indices_map(shape).items():
        ranges = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        devices.setdefault(ranges, []).append(device)
    arrays = []
    for ranges, holders in devices.items():
        shard = _read_shard(reader, entry, config, ranges, dtype)
        arrays += [jax.device_put(shard, device).block_until_ready() for device in holders]
        del shard
    return jax.make_array_from_single_device_arrays(shape, placed, arrays)


def _read_shard(reader, entry: Entry, config: ModelConfig, ranges, dtype) -> np.ndarray:
    """Our weight within `ranges`, (start, stop) for each of its axes."""
    shard = np.zeros([stop - start for start, stop in ranges], dtype)
    if not _is_stacked(entry):
        piece = _read_piece(reader, entry.tensor, entry, config, ranges)
        shard[tuple(slice(size) for size in piece.shape)] = piece  # rows of padding ids stay zero
        return shard
    for row, layer in enumerate(range(*ranges[0])):
        shard[row] = _read_piece(reader, entry.tensor.format(layer), entry, config, ranges[1:])
    return shard


def _read_piece(reader, tensor: str, entry: Entry, config: ModelConfig, ranges) -> np.ndarray:
    """The slice of one tensor that our ranges need, in the order of our axes."""
    sizes = _sizes(entry, config)
    wanted = {letter: _clip(pair, sizes[letter]) for letter, pair in zip(entry.own_axes, ranges, strict=True)}
    wanted |= {letter: (entry.part, entry.part + 1) for letter in sizes if letter.isdigit()}
    slices, shape, picks = [], [], []
    for axis in entry.axes:
        # A run over several letters is contiguous as long as all letters before the last narrowed one have length 1.
        start, stride, narrow, extents = 0, math.prod(sizes[letter] for letter in axis), True, []
        for letter in axis:
            stride //= sizes[letter]
            first, last = wanted[letter]
            start += first * stride if narrow else 0
            extents.append(last - first if narrow else sizes[letter])
            picks.append(slice(None) if narrow else slice(first, last))
            narrow = narrow and last - first == 1
        slices.append(slice(start, start + math.prod(extents)))
        shape += extents
    read = reader.read(tensor, tuple(slices)).reshape(shape)[tuple(picks)]
    if not np.isfinite(read).all():
        raise InputError(f"{reader.file(tensor)}: tensor {tensor!r} holds NaN or infinite values; expected finite ones")
    letters = [letter for axis in entry.axes for letter in axis]
    kept = [letter for letter in letters if not letter.isdigit()]
    read = read.reshape([size for letter, size in zip(letters, read.shape, strict=True) if not letter.isdigit()])
    return read.transpose([kept.index(letter) for letter in entry.own_axes])


def _clip(pair: tuple[int, int], size: int) -> tuple[int, int]:
    return min(pair[0], size), min(pair[1], size)


def _sizes(entry: Entry, config: ModelConfig) -> dict[str, int]:
    """The size of each letter of a tensor, digits included."""
    sizes = hf_names.axis_sizes(config)
    letters = [letter for axis in entry.axes for letter in axis]
    return {letter: int(letter) if letter.isdigit() else sizes[letter] for letter in letters}


def _tensor_shape(entry: Entry, config: ModelConfig) -> tuple[int, ...]:
    sizes = _sizes(entry, config)
    return tuple(math.prod(sizes[letter] for letter in letters) for letters in entry.axes)


def _own_shape(entry: Entry, config: ModelConfig) -> tuple[int, ...]:
    sizes = hf_names.axis_sizes(config) | {"v": config.padded_vocab}
    shape = tuple(sizes[letter] for letter in entry.own_axes)
    return (config.layers, *shape) if _is_stacked(entry) else shape


def _is_stacked(entry: Entry) -> bool:
    return "{}" in entry.tensor


def _tensors(entry: Entry, config: ModelConfig) -> list[str]:
    return [entry.tensor.format(layer) for layer in range(config.layers if _is_stacked(entry) else 1)]


def _match(reader: Reader, config: ModelConfig, head: bool) -> list[Entry]:
    """The entries that the checkpoint holds, after all its tensors were held against the table."""
    table = hf_names.table(config)
    reader.add_prefix(table.prefix, outside=(hf_names.HEAD.tensor, "lm_head.weight", "embed_out.weight"))
    entries = list(table.entries)
    if head or hf_names.HEAD.tensor in reader:
        entries.append(hf_names.HEAD)
        entries = [entry for entry in entries if entry.weight != hf_names.LM_HEAD or entry.tensor in reader]
    known = {tensor: _tensor_shape(entry, config) for entry in entries for tensor in _tensors(entry, config)}
    ignored = {tensor.format(layer) for tensor in table.ignored for layer in range(config.layers)}
    for tensor, shape in known.items():
        if tensor not in reader:
            raise InputError(f"{reader.source}: tensor {tensor!r} is missing; a {config.family} model of this config "
                             f"needs it, of shape {shape}")  # fmt: skip
        found, dtype = reader.describe(tensor)
        if found != shape:
            raise InputError(f"{reader.file(tensor)}: tensor {tensor!r} has shape {found}; expected {shape} by "
                             "config.json")  # fmt: skip
        if dtype not in DTYPES:
            raise InputError(f"{reader.file(tensor)}: tensor {tensor!r} has dtype {dtype}; expected one of "
                             f"{sorted(DTYPES)}")  # fmt: skip
    if config.tied_embeddings and table.output in reader and not head:
        embedding = next(entry.tensor for entry in entries if entry.weight == hf_names.EMBEDDING)
        if not reader.same_rows(embedding, table.output):
            raise InputError(
                f"{reader.file(table.output)}: {table.output!r} differs from {embedding!r}, but config.json ties them "
                "(tie_word_embeddings); set that to false if the model has an output matrix of its own, as "
                "transformers would take it"
            )
    for tensor in reader:
        if tensor not in known and tensor not in ignored:
            raise InputError(f"{reader.file(tensor)}: tensor {tensor!r} is unknown to a {config.family} model of this "
                             "config; is this another model's file?")  # fmt: skip
    return entries


def _load_tokenizer(folder: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: no tokenizer can be loaded from here ({reason})") from error
