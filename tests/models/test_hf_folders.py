"""Model folders as people bring them: read as `transformers` reads them, or refused in one line that names the file."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.models import config as model_config
from mpo_jax.models import hf, hub
from tests.models.test_parity import distances

TEMPLATES = [
    {"name": "default", "template": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"},
    {"name": "rag", "template": "RAG {{ messages[0]['content'] }}"},
]


@pytest.fixture
def folder(stories, tmp_path):
    """A copy of stories260K that may be written to."""
    target = tmp_path / "model"
    shutil.copytree(stories, target, copy_function=shutil.copyfile)
    os.chmod(target, 0o755)
    return target


def edit(path, **changes):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


def read(folder):
    """What a run reads of a base model, in its order."""
    path = hf.resolve(folder)
    config = model_config.from_folder(path)
    hf.read_stop_ids(path)
    return hf.import_weights(path, config)


def refused(folder, *told):
    """It is refused in one line, which holds `told`."""
    with pytest.raises(InputError) as caught:
        read(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in told:
        assert str(part) in message, message


def change_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {name.replace("__", "."): value for name, value in changes.items()}, folder / "model.safetensors"
    )


def test_an_output_matrix_of_its_own_is_not_dropped_where_the_config_ties_it(torch, folder):
    from transformers import AutoModelForCausalLM

    matrix = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, lm_head__weight=matrix)
    hf.import_weights(folder, model_config.from_folder(folder))  # an equal copy is what tied checkpoints may hold
    change_tensors(folder, lm_head__weight=np.ascontiguousarray(matrix[::-1]))
    refused(folder, folder / "model.safetensors", "'lm_head.weight' differs", "tie_word_embeddings")
    change_tensors(folder, lm_head__weight=np.ones((3, 64), np.float32))
    refused(folder, folder / "model.safetensors", "'lm_head.weight' differs", "tie_word_embeddings")
    change_tensors(folder, lm_head__weight=np.ascontiguousarray(matrix[::-1]))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    edit(folder / "config.json", tie_word_embeddings=False)  # as the error says
    config = model_config.from_folder(folder)
    found, scale = distances(torch, theirs, config, hf.import_weights(folder, config), lengths=(50, 3))
    assert max(found) < 1e-4 * max(scale, 1), "it is what transformers computes of the folder as it came"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_weight_that_is_no_number_is_named(folder, value, dtype):
    """A model of NaN samples nothing, and a training would blame its batch."""
    scale = np.ones(64, np.float32)
    scale[7] = value
    change_tensors(folder, model__norm__weight=scale.astype(np.dtype(dtype)))
    refused(folder, folder / "model.safetensors", "tensor 'model.norm.weight' holds NaN or infinite values")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "x.bin", 3, ""]
)
def test_an_index_cannot_lead_out_of_its_folder(folder, name):
    secret = folder.parent / "secret.safetensors"
    (folder / "model.safetensors").rename(secret)
    weight_map = dict.fromkeys(load_file(secret), name)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, folder / hf.INDEX, repr(name), "expected a .safetensors file of this folder")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}])
def test_an_index_of_another_form_is_refused(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / hf.INDEX).write_text(json.dumps(index))
    refused(folder, folder / hf.INDEX)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_pipes_devices_and_broken_links_are_not_waited_for(folder, name):
    path = folder / name
    for place in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to("absent")):
        path.unlink(missing_ok=True)
        place()
        refused(folder, path, "leads nowhere" if path.is_symlink() and not path.exists() else "no regular file")


def test_links_to_files_elsewhere_are_read(folder, tmp_path):
    """As the hub's cache has them."""
    (tmp_path / "blobs").mkdir()
    for path in folder.iterdir():
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(f"../blobs/{path.name}")
    hf.import_weights(hf.resolve(folder), model_config.from_folder(folder))


def test_a_damaged_file_is_named_whatever_bytes_are_hurt(folder):
    """Cut at any length, or with damage in its header: an error that names it, or weights of the right form (a header
    holds spaces and a note; what changes values alone shows in no file format without checksums)."""
    path = folder / "model.safetensors"
    whole, draw = path.read_bytes(), random.Random(0)
    config = model_config.from_folder(folder)
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        header + 1,
        len(whole) - 1,
        *(draw.randrange(len(whole)) for _ in range(8)),
    ]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        refused(folder, path)
    named = 0
    for _ in range(60):
        broken = bytearray(whole)
        broken[draw.randrange(header)] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        with contextlib.suppress(InputError):
            hf.import_weights(folder, config)
            continue
        refused(folder, path)
        named += 1
    assert named > 40


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", ["2", 2.0, True, [2, "3"], {"id": 2}])
def test_stop_ids_of_another_type_are_refused(folder, file, ids):
    edit(folder / file, eos_token_id=ids)
    refused(folder, folder / file, "eos_token_id", "expected an integer or a list of integers")


def test_a_generation_config_that_is_no_object_is_refused(folder):
    (folder / "generation_config.json").write_text("[2]")
    refused(folder, folder / "generation_config.json", "holds a list; expected an object")


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("form", ["in the config", "in files"])
def test_named_chat_templates_all_come_along_and_the_default_is_used(folder, tmp_path, head, form):
    import jax
    from transformers import AutoTokenizer

    from mpo_jax.models import decoder

    edit(folder / "tokenizer_config.json", chat_template=TEMPLATES)
    if form == "in files":  # as transformers 5 saves them
        loaded = AutoTokenizer.from_pretrained(folder)
        edit(folder / "tokenizer_config.json", chat_template=None)
        loaded.save_pretrained(folder)
        assert (folder / "additional_chat_templates" / "rag.jinja").exists()
    config = model_config.from_folder(folder)
    weights = hf.import_weights(folder, config)
    weights |= decoder.init_head(config, jax.random.key(0)) if head else {}
    hf.export_weights(tmp_path / "out", config, weights, folder, head=head)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.chat_template == {each["name"]: each["template"] for each in TEMPLATES}
    ours = load_tokenizer(str(tmp_path / "out"))
    talk = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(talk, tokenize=False) == "<user>hello\n"


def test_what_is_fetched_from_the_hub_holds_named_templates_and_no_other_frameworks_weights(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model.safetensors", "onnx/model.safetensors", "additional_chat_templates/rag.jinja"]
    files += ["tokenizer.json", "pytorch_model.bin", "chat_template.jinja", "original/params.json"]
    fetched = set()

    def download(name, revision, **patterns):
        assert revision is None
        fetched.update(filter_repo_objects(files, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "_fetched", {})
    assert hf.resolve("owner/name") == str(tmp_path)
    expected = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert fetched == expected | {"additional_chat_templates/rag.jinja"}


@pytest.fixture(scope="module")
def cases(shared, tmp_path_factory):
    """The folders of the collection of cases, made anew."""
    target = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, str(shared / "cases" / "make_models.py"), str(target)], check=True)
    return target


@pytest.mark.parametrize(
    ("name", "file", "told"),
    [
        ("tied_diff", "model.safetensors", "'lm_head.weight' differs"),
        ("both_yarn", "config.json", "rope_type: 'yarn' is not supported"),
        ("gptq", "config.json", "quantization_config: the weights are quantised"),
        ("bnb4", "config.json", "quantization_config: the weights are quantised"),
        ("vlm", "config.json", "'llava' wraps its text model, under 'text_config'"),
        ("peft_only", "adapter_config.json", "an adapter's folder, not a whole model's; merge it"),
        ("gen_str", "generation_config.json", "eos_token_id: '2'; expected an integer"),
        ("layers_str", "config.json", "num_hidden_layers: '5'; expected an integer"),
    ],
)
def test_the_collections_folders_that_are_no_plain_model_are_refused(cases, name, file, told):
    refused(cases / name, cases / name / file, told)


@pytest.mark.parametrize("name", ["llama3", "qwen_base", "gemma", "zephyr", "named"])
def test_the_collections_other_folders_are_read(cases, name):
    hf.import_weights(hf.resolve(cases / name), model_config.from_folder(cases / name))
    assert hf.read_stop_ids(cases / name)
