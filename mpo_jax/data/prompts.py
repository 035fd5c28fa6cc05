"""Prompt texts and a tokenizer enter; one Batch of prompts, as the sampler takes them, leaves."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mpo_jax.data.encode import Limits, encode
from mpo_jax.data.records import TextRecord
from mpo_jax.data.rows import prompt_slots
from mpo_jax.errors import InputError
from mpo_jax.types import Batch

_ANY_LENGTH = 1 << 30  # the model's context is checked with the prompt and the reply together


def prompt_batch(texts: Sequence[str | TextRecord], tokenizer, length: int | None = None) -> Batch:
    """Prompts in slot form, left-padded to the longest of them or to `length` columns.

    texts: plain prompts, or records (`sources.conversation` makes one of a chat, through the model's template). A
    prompt's id is the hash of what it says, so its replies don't depend on what else is sampled. InputError for prompts
    without tokens or above `length`.
    """
    records = [
        TextRecord(text, None, None, index, "sample") if isinstance(text, str) else text
        for index, text in enumerate(texts)
    ]
    encoded = encode(records, tokenizer, 0, Limits(_ANY_LENGTH if length is None else length, 0, too_long="drop"))
    if len(encoded) < len(texts):
        raise InputError(f"prompts: {len(texts) - len(encoded)} of {len(texts)} are empty or above {length} tokens")
    columns = int(encoded.piece_lens.max()) if length is None else length
    arrays = prompt_slots(encoded, np.arange(len(texts)), columns)
    return Batch(**{name: jnp.asarray(array) for name, array in arrays.items()}, window=0)
