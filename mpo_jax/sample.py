"""A model folder and a prompt enter; its replies are printed as they are generated.

`python -m mpo_jax.sample --model=FOLDER --prompt="Once upon a time" --n=4 --temperature=0.7 --max_new_tokens=64
--seed=0`. Temperature 0 is greedy. One reply is printed token by token; of several, each when it is complete, behind
its number.
"""

import sys
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from mpo_jax import sampling
from mpo_jax.data.encode import Limits, encode
from mpo_jax.data.rows import prompt_slots
from mpo_jax.data.schemas import TextRecord
from mpo_jax.data.tokenizer import check_vocabulary, load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.models import hf
from mpo_jax.models.config import ModelConfig, from_folder
from mpo_jax.sampling import SamplingConfig
from mpo_jax.types import Batch, PyTree

_MODEL = flags.DEFINE_string("model", None, "Model folder in Hugging Face form.")
_PROMPT = flags.DEFINE_string("prompt", None, "What the replies continue.")
_N = flags.DEFINE_integer("n", 1, "Replies to the prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Sample from the most probable tokens alone. Default: from all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Sample from the fewest tokens with this probability. Default: from all.")
_MIN_NEW = flags.DEFINE_integer("min_new_tokens", 0, "No stop token is drawn before this many tokens.")
_MAX_NEW = flags.DEFINE_integer("max_new_tokens", 64, "Longest reply, its stop token included.")
_SEED = flags.DEFINE_integer("seed", 0, "Other seeds give other replies.")
_ANY_LENGTH = 1 << 30  # the model's context is checked with the prompt and the reply together
_HELD_BACK = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


def prompt_batch(texts: list[str], tokenizer, length: int | None = None) -> Batch:
    """Prompts in slot form, left-padded to the longest of them or to `length` columns.

    A prompt's id is the hash of its text, so its replies don't depend on what else is sampled. InputError for prompts
    without tokens or above `length`.
    """
    records = [TextRecord(text, None, None, index, "sample") for index, text in enumerate(texts)]
    encoded = encode(records, tokenizer, 0, Limits(_ANY_LENGTH if length is None else length, 0, too_long="drop"))
    if len(encoded) < len(texts):
        raise InputError(f"prompts: {len(texts) - len(encoded)} of {len(texts)} are empty or above {length} tokens")
    columns = int(encoded.piece_lens.max()) if length is None else length
    arrays = prompt_slots(encoded, np.arange(len(texts)), columns)
    return Batch(**{name: jnp.asarray(array) for name, array in arrays.items()}, window=0)


def replies(
    config: ModelConfig, settings: SamplingConfig, weights: PyTree, tokenizer, prompt: str, seed: int
) -> Iterator[tuple[int, str, bool]]:
    """Pieces of the replies to a prompt as they come: (which reply, text, whether that ends it)."""
    batch = prompt_batch([prompt], tokenizer)
    prompt_ids = batch.tokens[0].tolist()
    printed = [tokenizer.decode(prompt_ids, skip_special_tokens=True)] * settings.n
    open_replies = set(range(settings.n))
    chunk = 1 if settings.n == 1 else 8
    for drawn, lengths, done in sampling.stream(config, settings, weights, batch, seed, 0, chunk):
        for index in sorted(open_replies):
            ended = bool(done[0, index]) or int(lengths[0, index]) == settings.max_new_tokens
            ids = prompt_ids + drawn[0, index, : lengths[0, index]].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if not ended:
                text = text.rstrip(_HELD_BACK)
            piece = text[len(printed[index]) :]
            if piece or ended:
                yield index, piece, ended
                printed[index] = text
            if ended:
                open_replies.remove(index)


def main(argv) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments {argv[1:]}; put the prompt into --prompt")
    try:
        _run()
    except InputError as error:
        sys.exit(f"error: {error}")


def _run() -> None:
    folder, prompt = _MODEL.value, _PROMPT.value
    if not folder or not prompt:
        raise InputError(f"--{'prompt' if folder else 'model'} is missing; give --model=FOLDER --prompt=TEXT")
    config = from_folder(folder)
    settings = SamplingConfig(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_new_tokens=_MIN_NEW.value,
        max_new_tokens=_MAX_NEW.value,
        n=_N.value,
        stop_ids=hf.read_stop_ids(folder),
    )
    settings.check(config, 1)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, folder)
    weights = hf.import_weights(folder, config)
    unfinished = [""] * settings.n
    for index, piece, ended in replies(config, settings, weights, tokenizer, prompt, _SEED.value):
        if settings.n == 1:
            print(piece, end="\n" if ended else "", flush=True)
            continue
        unfinished[index] += piece
        if ended:
            print(f"[{index}] {unfinished[index]}", flush=True)


if __name__ == "__main__":
    app.run(main)
