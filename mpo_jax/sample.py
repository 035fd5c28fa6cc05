"""Takes a policy and a prompt; prints replies as they are generated.

`python -m mpo_jax.sample --model=FOLDER_OR_STAGE --prompt="Once upon a time" --n=4 --temperature=0.7
--max_new_tokens=64 --seed=0`. Temperature 0 is greedy decoding. One reply is printed token by token; several are
printed with their numbers, each when it is complete. If the model has a chat template, the prompt is the user's turn;
with `--raw` its text is continued as it is. Without `--prompt`, each line of the standard input is a turn of one
conversation.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from mpo_jax import command, finished, sampling
from mpo_jax.artifacts import POLICY
from mpo_jax.data.prompts import prompt_batch
from mpo_jax.data.records import TextRecord
from mpo_jax.data.sources import conversation
from mpo_jax.data.tokenizer import check_vocabulary, load_tokenizer
from mpo_jax.data.tokenizer import stop_ids as all_stop_ids
from mpo_jax.errors import InputError
from mpo_jax.models import hf
from mpo_jax.models.config import ModelConfig, from_folder
from mpo_jax.sampling import SamplingConfig
from mpo_jax.stages import job as jobs
from mpo_jax.types import PyTree

_HELD_BACK = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


def replies(
    config: ModelConfig, settings: SamplingConfig, weights: PyTree, tokenizer, prompt: str | TextRecord, seed: int
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


def load(model: str) -> tuple[ModelConfig, PyTree, Any, tuple[int, ...]]:
    """A policy's config, weights, tokenizer and stop ids: of a Hugging Face folder, or of a finished stage."""
    if not finished.is_stage(model):
        folder = str(hf.resolve(model))
        config = from_folder(folder)
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, config.vocab_size, folder)
        return config, hf.import_weights(folder, config), tokenizer, hf.read_stop_ids(folder)
    job, artifact, _ = finished.load(finished.find(model))
    if artifact.produces != POLICY:
        raise InputError(f"--model={model}: a {artifact.produces} model; expected a policy")
    config = jobs.model(job)
    with jax.set_mesh(job.mesh):
        weights = jobs.base_weights(job, config) | jobs.load_weights(job, artifact, config)
    return config, weights, jobs.load_tokenizer(job, config), jobs.stop_ids(job)


def speak(
    model: str,
    prompts: str | Iterator[str],
    settings: SamplingConfig,
    seed: int,
    system: str = "",
    raw: bool = False,
) -> None:
    """Prints the replies of a policy to a prompt, or to each of several, which are then the turns of one conversation.
    The settings' stop ids are the policy's, and what ends a reply in training data.

    system: a system turn before all others. raw: the prompts are continued as they stand, each by itself.
    """
    config, weights, tokenizer, stop_ids = load(model)
    settings = dataclasses.replace(settings, stop_ids=all_stop_ids(tokenizer, stop_ids))
    settings.check(config, 1)
    chat = bool(tokenizer.chat_template) and not raw
    if system and not chat:
        raise InputError("--system: a prompt without a chat template has no system turn; leave it out")
    turns = [{"role": "system", "content": system}] if system else []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        turns.append({"role": "user", "content": prompt})
        shown = conversation(turns, tokenizer) if chat else prompt
        said = _print(replies(config, settings, weights, tokenizer, shown, seed), settings.n)
        turns.append({"role": "assistant", "content": said.strip()})


def _print(pieces: Iterator[tuple[int, str, bool]], n: int) -> str:
    """Prints replies as they come; the first of them."""
    said = [""] * n
    for index, piece, ended in pieces:
        said[index] += piece
        if n == 1:
            print(piece, end="\n" if ended else "", flush=True)
        elif ended:
            print(f"[{index}] {said[index]}", flush=True)
    return said[0]


def turns_of(lines: Sequence[str] | Iterator[str]) -> Iterator[str]:
    """The turns that a person types, or pipes in: lines that are not empty."""
    if sys.stdin.isatty():
        print("one line is one turn; Ctrl-D ends the conversation", file=sys.stderr)
    for line in lines:
        if line.strip():
            yield line.rstrip("\n")


def define() -> None:
    flags.DEFINE_string("model", None, "Hugging Face folder, or WORKDIR/NAME of a finished stage.")
    flags.DEFINE_string(
        "prompt", None, "Prompt that the replies answer or continue. Default: lines of the standard input."
    )
    flags.DEFINE_string("system", "", "A system turn, for a model with a chat template.")
    flags.DEFINE_bool("raw", False, "Continue the prompt's text as it stands, without the model's chat template.")
    flags.DEFINE_integer("n", 1, "Number of replies to the prompt.")
    flags.DEFINE_float("temperature", 1.0, "Sampling temperature; 0: greedy decoding.")
    flags.DEFINE_integer("top_k", None, "Sample only from this many most probable tokens. Default: from all.")
    flags.DEFINE_float(
        "top_p",
        None,
        "Sample only from the most probable tokens that together have this probability. Default: from all.",
    )
    flags.DEFINE_integer("min_new_tokens", 0, "No stop token is sampled before this many tokens.")
    flags.DEFINE_integer("max_new_tokens", 64, "Longest reply in tokens, including its stop token.")
    flags.DEFINE_integer("seed", 0, "Seed of sampling; another seed gives other replies.")


def work() -> None:
    given = flags.FLAGS
    model, prompt = given.model, given.prompt
    if not model or prompt == "":
        raise InputError(f"--{'prompt' if model else 'model'} is missing; give --model=FOLDER_OR_STAGE --prompt=TEXT")
    if prompt is None and given.n > 1:
        raise InputError(f"--n={given.n}: a conversation goes on from one reply; give a --prompt, or n=1")
    try:
        settings = SamplingConfig(
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            min_new_tokens=given.min_new_tokens,
            max_new_tokens=given.max_new_tokens,
            n=given.n,
        )
    except InputError as error:  # it begins with the flag's name
        raise InputError(f"--{error}") from None
    speak(model, turns_of(sys.stdin) if prompt is None else prompt, settings, given.seed, given.system, given.raw)


def run() -> None:
    command.start(define, work)


if __name__ == "__main__":
    run()
