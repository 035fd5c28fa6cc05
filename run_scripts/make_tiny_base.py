"""A teacher's folder enters; the embedded base model leaves, with its tokenizer, opening lines and model card.

The steps of make_tiny_base.sh, which trains between `begin` and `finish`:
  stories  samples short stories from the teacher with the package's own sampler;
  begin    trains a byte-level BPE tokenizer on them and writes a freshly initialised model;
  finish   exports the trained stage, measures it beside the teacher on held-out stories, and writes the card.
"""

import argparse
import gzip
import json
import re
import string
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax import checkpoint, sampling, scoring
from mpo_jax.data import encode
from mpo_jax.data.loader import Loader
from mpo_jax.data.schemas import TextRecord
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.models import config as model_config
from mpo_jax.models import decoder, hf
from mpo_jax.types import Batch

VOCABULARY = 1024
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}
TEACHER_BOS = 1  # stories260K begins the next story with it
TEMPERATURE = 0.8
NEW_TOKENS = 112  # of the teacher, about 280 characters
OPENING_WORDS = (6, 14)  # the prompt of a story: this many of its first words
LONGEST_OPENING = 24  # words
STORY_CHARACTERS = (120, 260)  # a story is cut after its last sentence within these
HELD_OUT = 2500  # stories that are not trained on: some for the figures, the others for the openings
OPENINGS = 1500  # stories that the package ships, no two with the same opening
MEASURED = 500


def stories(teacher: str, output: Path, count: int, seed: int) -> None:
    """Writes `count` different stories, a JSON line with `prompt` and `chosen` each."""
    config = model_config.from_folder(teacher)
    tokenizer = load_tokenizer(teacher)
    weights = hf.import_weights(teacher, config)
    settings = sampling.SamplingConfig(
        temperature=TEMPERATURE, max_new_tokens=NEW_TOKENS, n=8, stop_ids=(TEACHER_BOS, *hf.read_stop_ids(teacher))
    )
    rows = 32
    draw = jax.jit(lambda prompts, seed: sampling.sample(config, settings, weights, prompts, seed, 0))
    found: dict[str, dict[str, str]] = {}
    call = 0
    with gzip.open(output, "wt", encoding="utf-8") as file:
        while len(found) < count:
            ids = np.arange(call * rows, (call + 1) * rows, dtype=np.int32)
            one = np.ones((rows, 1), np.int32)
            prompts = Batch(
                TEACHER_BOS * one, 0 * one, one, id=ids, prompt_id=ids, weight=np.ones(rows, np.float32), window=0
            )
            rollout = jax.device_get(draw(prompts, seed))
            drawn = rollout.batch.tokens[:, 1:].reshape(-1, NEW_TOKENS)
            for text in tokenizer.batch_decode(drawn, skip_special_tokens=True):
                story = cut(text)
                if story is not None and story not in found:
                    found[story] = record = divide(story, len(found), seed)
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            call += 1
            if call % 20 == 0:
                print(f"{len(found)} stories of {call * rows * settings.n} samples", flush=True)


def cut(text: str) -> str | None:
    """The sampled text up to its last whole sentence, in plain characters; None where that is too short."""
    text = " ".join(text.replace("�", "").split())
    low, high = STORY_CHARACTERS
    ends = [match.end() for match in re.finditer(r"[.!?]\"?(?= |$)", text[:high])]
    return text[: ends[-1]] if ends and ends[-1] >= low else None


def divide(story: str, number: int, seed: int) -> dict[str, str]:
    """An opening of a few words, and what follows (its leading space included)."""
    words = np.random.default_rng([seed, number]).integers(*OPENING_WORDS, endpoint=True)
    at = [match.start() for match in re.finditer(" ", story)][words - 1]
    return {"prompt": story[:at], "chosen": story[at:]}


def distinct(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """The stories with openings of which no two are the same: a taken one is made longer, word by word."""
    found: dict[str, dict[str, str]] = {}
    for record in records:
        opening, rest = record["prompt"], record["chosen"]
        while opening in found and len(opening.split()) < LONGEST_OPENING:
            word, space, rest = rest[1:].partition(" ")
            opening, rest = f"{opening} {word}", space + rest
        if opening not in found and rest:
            found[opening] = {"prompt": opening, "chosen": rest}
    return list(found.values())


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, records: list[dict[str, str]]) -> None:
    """Gzipped JSON lines, the same bytes whenever they are written."""
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())


def begin(found: Path, folder: Path, seed: int) -> None:
    """Writes folder/train.jsonl.gz, folder/held_out.jsonl.gz and folder/init, a model that knows nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    records = read(found)
    write(folder / "held_out.jsonl.gz", records[:HELD_OUT])
    write(folder / "train.jsonl.gz", records[HELD_OUT:])
    special = ["<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((record["prompt"] + record["chosen"] for record in records[HELD_OUT:]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(source / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": ARCHITECTURE["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(names, indent=1))
    (source / "config.json").write_text(json.dumps(ARCHITECTURE, indent=1))
    config = model_config.from_folder(source)
    hf.export_weights(folder / "init", config, decoder.init(config, jax.random.key(seed)), source)


def finish(teacher: str, stage: Path, folder: Path, output: Path) -> None:
    """Writes the trained model in bfloat16, the opening lines and the card."""
    config = model_config.from_folder(folder / "init")
    abstract = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    weights = checkpoint.restore_weights(stage / "weights", one_device(abstract))
    hf.export_weights(output, config, weights, folder / "init", dtype="bfloat16")
    held_out = read(folder / "held_out.jsonl.gz")
    measured = held_out[:MEASURED]
    openings = distinct(held_out[MEASURED:])[:OPENINGS]
    write(output / "stories.jsonl.gz", openings)
    ours, theirs = (nats_per_character(name, measured) for name in (str(output), teacher))
    text = card(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(weights)),
        layers=config.layers,
        width=ARCHITECTURE["hidden_size"],
        heads=ARCHITECTURE["num_attention_heads"],
        kv_heads=ARCHITECTURE["num_key_value_heads"],
        vocabulary=VOCABULARY,
        stories=len(read(folder / "train.jsonl.gz")),
        temperature=TEMPERATURE,
        characters=STORY_CHARACTERS[1],
        steps=json.loads((stage / "manifest.json").read_text())["summary"]["steps"],
        measured=MEASURED,
        ours=f"{ours:.4f}",
        theirs=f"{theirs:.4f}",
        openings=len(openings),
        samples="\n".join(f"> {sample(output, record['prompt'])}\n" for record in measured[:4]),
    )
    (output / "README.md").write_text(text)
    print(f"held-out loss {ours:.4f} nats per character; the teacher's {theirs:.4f}")


def one_device(abstract):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract)


def nats_per_character(model: str, records: list[dict[str, str]]) -> float:
    """The mean negative log-likelihood of the stories after their openings, the end of text left out."""
    config = model_config.from_folder(model)
    weights = hf.import_weights(model, config)
    rows = [TextRecord(record["prompt"], record["chosen"], None, i, "held_out") for i, record in enumerate(records)]
    encoded = encode.encode(rows, load_tokenizer(model), 1, encode.Limits(512, 256))

    @jax.jit
    def total(batch):
        out = scoring.response_logps(config, weights, batch)
        ends = jnp.sum(out.mask.astype(jnp.int32), axis=1, keepdims=True) - 1
        last = jnp.take_along_axis(out.logps, ends, axis=1)[:, 0]
        return -jnp.sum((jnp.sum(out.logps, axis=1) - last) * batch.weight)

    loader = Loader(encoded, 50, shuffle=False)
    with loader.batches(0, loader.steps_per_epoch) as stream:
        nats = sum(float(total(batch)) for batch in stream)
    return nats / sum(len(record["chosen"]) for record in records)


def sample(model: Path, prompt: str) -> str:
    command = [sys.executable, "-m", "mpo_jax.sample", f"--model={model}", f"--prompt={prompt}", "--temperature=0.7"]
    return prompt + subprocess.run(command, check=True, capture_output=True, text=True).stdout.rstrip("\n")


def card(**facts) -> str:
    template = string.Template((Path(__file__).parent / "tiny_base_card.md").read_text())
    shown = {name: f"{fact:,}" if isinstance(fact, int) else str(fact) for name, fact in facts.items()}
    return template.substitute(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("stories", "begin", "finish"))
    parser.add_argument("--teacher", help="Hugging Face folder of stories260K")
    parser.add_argument("--folder", type=Path, required=True, help="for what lies between the steps")
    parser.add_argument("--count", type=int, default=42_000, help="stories")
    parser.add_argument("--stage", type=Path, help="the trained stage's folder")
    parser.add_argument("--output", type=Path, help="the model's folder")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = given.folder / "stories.jsonl.gz"
    if given.step == "stories":
        stories(given.teacher, found, given.count, given.seed)
    elif given.step == "begin":
        begin(found, given.folder, given.seed)
    else:
        finish(given.teacher, given.stage, given.folder, given.output)


if __name__ == "__main__":
    main()
