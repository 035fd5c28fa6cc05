"""A tokenizer's folder enters; a checked tokenizer leaves, with the few facts about it that encoding rests on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable

from mpo_jax.data import template
from mpo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Conventions:
    """bos_id: None where the tokenizer has none or does not put it in front of a text by itself. eos_id. pad_id: EOS
    where there is no pad token. spaced: the tokenizer writes a space in front of every text (SentencePiece).
    turn_end_id: what the chat template writes at the end of a reply; None where there is no template, or it writes
    nothing."""

    bos_id: int | None
    eos_id: int
    pad_id: int
    spaced: bool
    turn_end_id: int | None = None

    def reply_end(self, templated: bool) -> int:
        """The one token that ends a reply: a chat's its end of turn, any other's EOS."""
        return self.eos_id if not templated or self.turn_end_id is None else self.turn_end_id


def load_tokenizer(folder: str):
    """The tokenizer in a folder (or of a hub name), its remote code never run.

    InputError if it cannot be loaded, has no EOS token, or encodes text to nothing (`transformers` 5 loads some
    vocabulary files into a tokenizer that does).
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is as it should be
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, or what the Rust library raises for a damaged file
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: no tokenizer can be loaded from here: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no eos_token; name one in tokenizer_config.json")
    if not tokenizer("hello", add_special_tokens=False).input_ids:
        raise InputError(f"{folder}: the tokenizer encodes 'hello' to nothing; expected a tokenizer.json beside it")
    return tokenizer


def conventions(tokenizer) -> Conventions:
    """What the tokenizer does by itself, found by trying it."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)[0]
    end = template.facts(tokenizer).end
    return Conventions(
        bos if adds_bos else None,
        eos,
        eos if pad is None else pad,
        str(first).startswith("\u2581"),
        tokenizer.convert_tokens_to_ids(end) if end else None,
    )


def stop_ids(tokenizer, model_ids: Iterable[int] = ()) -> tuple[int, ...]:
    """All ids that end a reply: those that end one in training data, whatever its form, and the model's own.

    The one rule for data and samples: what ends a reply in training data is what generation stops at.
    """
    known = conventions(tokenizer)
    return tuple(sorted({known.reply_end(False), known.reply_end(True), *map(int, model_ids)}))


def fingerprint(tokenizer) -> str:
    """A hash of all that decides the tokens of a text: the tokenizer's content, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    parts = [type(tokenizer).__name__, content, repr(special), json.dumps(tokenizer.chat_template, sort_keys=True)]
    parts += [end] if (end := getattr(tokenizer, template.END_OF_TURN, "")) else []
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def check_vocabulary(tokenizer, vocab_size: int, folder: str) -> None:
    """InputError if the tokenizer can make an id that the model does not have.

    Special tokens that nothing writes may lie beyond it: text never becomes one, and `transformers` gives some
    tokenizers more of them than their folder names (an `unk_token` beside a vocabulary of bytes)."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        largest = max(_made(tokenizer))
    if largest >= vocab_size:
        raise InputError(
            f"{folder}: the tokenizer's largest id is {largest}, the model's vocab_size {vocab_size}; "
            "take the model's own tokenizer"
        )


def _made(tokenizer) -> set[int]:
    """Ids that come about: all but the special tokens that are not used by name and that no template writes."""
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, getattr(model, "unk_token", None)}
    written = template.written(tokenizer)
    idle = {number for number, content in special.items() if content not in used and content not in written}
    return set(tokenizer.get_vocab().values()) - idle
