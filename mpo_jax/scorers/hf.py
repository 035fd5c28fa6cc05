"""A folder or hub id of a `...ForSequenceClassification` enters; its architecture, and the rows it scores, leave.

Any supported family, size and tokenizer. What it reads of a text, and where it is scored, is as in `transformers`: the
whole text is encoded at once, and the score is that of the last token which is not the pad token.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpo_jax.data import encode, template
from mpo_jax.data.chat import ASSISTANT, plain_chat
from mpo_jax.data.encode import Encoded
from mpo_jax.data.records import Chat
from mpo_jax.data.tokenizer import check_vocabulary, load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.models import config as model_config
from mpo_jax.models import hf
from mpo_jax.models.config import ModelConfig
from mpo_jax.models.config_json import read_config_json
from mpo_jax.scorers.names import HF


@dataclasses.dataclass(frozen=True)
class Model:
    """A reward model of somebody else's. pad_id: the token before whose last run a text is scored, as its config says;
    None: at its very last token."""

    name: str
    folder: str
    architecture: ModelConfig
    pad_id: int | None

    @functools.cached_property
    def tokenizer(self) -> Any:
        loaded = load_tokenizer(self.folder)
        check_vocabulary(loaded, self.architecture.vocab_size, self.folder)
        return loaded


def find(name: str) -> Model:
    """The model of a scorer's name; its files are fetched where they are not here. InputError, naming the scorer, for
    what is no reward model with one score."""
    try:
        folder = hf.resolve(name.removeprefix(HF))
        config = read_config_json(folder)
        _check_one_score(config)
        pad_id = config.get("pad_token_id")
        if pad_id is not None and (isinstance(pad_id, bool) or not isinstance(pad_id, int)):
            raise InputError(f"config.json: pad_token_id: {pad_id!r}; expected an integer")
        return Model(name, folder, model_config.from_folder(folder), pad_id)
    except InputError as error:
        raise InputError(f"{name!r}: {error}") from error


def _check_one_score(config: dict[str, Any]) -> None:
    names = config.get("architectures") or [""]
    if not str(names[0]).endswith("ForSequenceClassification"):
        raise InputError(f"config.json: architectures: {names}; expected a reward model, ...ForSequenceClassification")
    labels = config.get("id2label")  # where both are missing, transformers makes two
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if count != 1:
        raise InputError(f"config.json: it has {count} labels; expected a reward model, with one score (num_labels=1)")


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens of every text and every conversation, as far as the first names any:
    the other may have more special tokens, a pad token for instance."""
    if one is other:
        return True
    if any(getattr(each, "backend_tokenizer", None) is None for each in (one, other)):
        return False
    added = [{token.content: number for number, token in each.added_tokens_decoder.items()} for each in (one, other)]
    return (
        _rules(one) == _rules(other)
        and added[0].items() <= added[1].items()
        and one.chat_template == other.chat_template
    )


def _rules(tokenizer: Any) -> dict[str, Any]:
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in whole.items() if key not in ("added_tokens", "padding", "truncation")}


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a model reads rows of a run whose policy has the tokenizer `own`. chats: the conversations of prompt ids,
    for templates; {} where none is needed."""

    model: Model
    own: Any
    chats: Callable[[], dict[int, Chat]]

    @functools.cached_property
    def same(self) -> bool:
        """Whether the run's own tokens are the model's too."""
        return same_tokens(self.own, self.model.tokenizer)

    def rows(self, encoded: Encoded) -> Encoded:
        """The same rows in the model's tokens, each reply ending where it is scored: what all of a row's replies begin
        with is its prompt now."""
        if self.same and self.model.pad_id is None:
            return encoded
        pieces: list[np.ndarray] = []
        for row in range(len(encoded)):
            prompt, *replies = encoded.row(row)
            if self.same:
                pieces += [prompt, *(self._scored(reply) for reply in replies)]
                continue
            number = int(encoded.prompt_id[row])
            pieces += shared([self._fitted(self._ids(number, prompt, reply)) for reply in replies])
        return encode.assemble(
            pieces, encoded.replies, encoded.conventions, encoded.key, id=encoded.id, prompt_id=encoded.prompt_id
        )

    def _ids(self, number: int, prompt: np.ndarray, reply: np.ndarray) -> np.ndarray:
        """The model's tokens of a prompt and its reply, given in the run's."""
        tokenizer, own = self.model.tokenizer, self.own
        has_template = template.has_template(tokenizer)
        chat = self.chats().get(number) if has_template or template.has_template(own) else None
        if chat is None:
            text = own.decode([*prompt.tolist(), *reply.tolist()], skip_special_tokens=True)
        else:
            said = own.decode(reply.tolist(), skip_special_tokens=True).strip()
            if has_template:
                return np.array(template.whole_ids(chat, said, tokenizer), np.int32)
            text = f"{plain_chat(chat.turns)}{ASSISTANT} {said}"
        ids = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        return np.array(ids or [tokenizer.eos_token_id], np.int32)

    def _fitted(self, ids: np.ndarray) -> np.ndarray:
        """Up to where it is scored, and within the model's context: what is beyond it is cut off behind the first
        token, as far as the end of the text goes."""
        scored, most = self._scored(ids), self.model.architecture.max_positions
        ids = scored if len(scored) else ids[:1]
        return ids if len(ids) <= most else np.concatenate([ids[:1], ids[len(ids) - most + 1 :]])

    def _scored(self, ids: np.ndarray) -> np.ndarray:
        """Without the pad tokens at its end: `transformers` scores at the last token that is none."""
        real = np.flatnonzero(ids != self.model.pad_id)
        return ids[: real[-1] + 1] if len(real) else ids[:0]


def shared(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What all sequences begin with, but for the last token of each, and what is left of every one."""
    most = min(map(len, sequences)) - 1
    columns = itertools.takewhile(lambda place: len({int(ids[place]) for ids in sequences}) == 1, range(max(most, 0)))
    size = sum(1 for _ in columns)
    return [sequences[0][:size], *(ids[size:] for ids in sequences)]
