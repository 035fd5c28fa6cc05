"""One raw row of a preference dataset enters, as a dict from a file or a hub; one TextRecord leaves, or a drop rule.

A schema is recognised by the columns of a file's first row. A value of the wrong kind is an InputError that names the
place and the key; a pair that teaches nothing (empty, identical, two prompts) is dropped by a named rule and counted.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpo_jax.errors import InputError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclasses.dataclass(frozen=True)
class TextRecord:
    """A prompt and its replies as text.

    rejected is None for posts with a reference summary; chosen is None too for prompts alone. id: the row's number in
    its split, drops included. split: the split it came from. confidence: the annotator's, in the source's own units.
    margin: how much better chosen is, in the source's own units. templated: the text was written by a chat template,
    so special tokens spelled out in it are meant as such.
    """

    prompt: str
    chosen: str | None
    rejected: str | None
    id: int
    split: str
    confidence: float | None = None
    margin: float | None = None
    templated: bool = False


class Drop(Exception):
    """Raised by a schema for a row that a rule leaves out; the message is the rule's name in the report."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A raw row: its values, and where it stands for error messages (`train.jsonl, line 7`)."""

    values: Mapping[str, Any]
    where: str

    def get(self, key: str, kind=str, optional: bool = False):
        """The value of a dotted key, checked for its kind; bytes (TFDS) become text. None only if `optional`."""
        value: Any = self.values
        for part in key.split("."):
            if value is None and optional:
                return None
            if not isinstance(value, Mapping):
                raise InputError(f"{self.where}: key {key!r}: expected an object around {part!r}, found {_kind(value)}")
            if part not in value:
                if optional:
                    return None
                raise InputError(f"{self.where}: missing column {key!r}; columns here: {', '.join(value)}")
            value = value[part]
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        if value is None and optional:
            return None
        if kind is float:
            good = isinstance(value, int | float) and not isinstance(value, bool)
        elif kind is list:
            good = isinstance(value, Sequence) and not isinstance(value, str)
        else:
            good = isinstance(value, kind) and not isinstance(value, bool)
        if not good:
            raise InputError(f"{self.where}: key {key!r} is {_kind(value)}, expected {_NAMES.get(kind, kind.__name__)}")
        return value


_NAMES = {str: "text", list: "a list", dict: "an object", float: "a number", int: "a whole number"}


def _kind(value) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else type(value).__name__


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a schema reads off a row, before ids and splits are given."""

    prompt: str
    chosen: str | None = None
    rejected: str | None = None
    confidence: float | None = None
    margin: float | None = None
    templated: bool = False


def recognise(row: Row) -> "Schema":
    """The schema of a file, from its first row. InputError listing the columns if there is none."""
    columns = set(row.values)
    for schema in SCHEMAS:
        if schema.matches(columns, row.values):
            return schema
    known = "; ".join(f"{s.name}: {s.columns}" for s in SCHEMAS)
    raise InputError(f"{row.where}: unrecognised columns {', '.join(sorted(columns)) or '(none)'}; expected {known}")


def read_row(schema: "Schema", row: Row, tokenizer=None) -> Reply:
    """One row through its schema. Drop for empty prompts, empty replies and identical replies; InputError if bad."""
    reply = schema.read(row, tokenizer)
    if not reply.prompt.strip():
        raise Drop("empty prompt")
    if any(text is not None and not text.strip() for text in (reply.chosen, reply.rejected)):
        raise Drop("empty reply")
    if reply.chosen is not None and reply.rejected is not None and reply.chosen.strip() == reply.rejected.strip():
        raise Drop("identical replies")
    return reply


# HH strings -----------------------------------------------------------------------------------------------------------


def split_hh(text: str) -> tuple[str, str]:
    """A dialogue `\\n\\nHuman: …\\n\\nAssistant: …` into (prompt up to and with the last `Assistant:`, last reply)."""
    at = text.rfind(ASSISTANT)
    if at < 0:
        raise Drop("no assistant turn")
    at += len(ASSISTANT)
    if HUMAN in text[at:]:
        raise Drop("last turn is not the assistant's")
    return text[:at], text[at:]


def _read_hh(row: Row, tokenizer) -> Reply:
    sides = row.get("chosen"), row.get("rejected")  # both columns, before a rule may drop the row
    (prompt, chosen), (other, rejected) = (split_hh(side) for side in sides)
    if prompt != other:
        raise Drop("prompts differ")
    return Reply(prompt, chosen, rejected)


# TL;DR ----------------------------------------------------------------------------------------------------------------


def tldr_prompt(subreddit: str | None, title: str | None, post: str) -> str:
    """`SUBREDDIT: r/…\\n\\nTITLE: …\\n\\nPOST: …\\n\\nTL;DR:`; parts that a source does not have are left out."""
    parts = [("SUBREDDIT: r/", subreddit), ("TITLE: ", title), ("POST: ", post)]
    return "".join(f"{label}{text}\n\n" for label, text in parts if text) + "TL;DR:"


def _info_prompt(row: Row) -> str:
    """The prompt of an `info` object. News articles (`info.article`) take ARTICLE: in the place of POST:."""
    title = row.get("info.title", optional=True)
    post = row.get("info.post", optional=True)
    if post:
        return tldr_prompt(row.get("info.subreddit", optional=True), title, post)
    article = row.get("info.article", optional=True)
    if not article:
        raise InputError(f"{row.where}: keys 'info.post' and 'info.article' are both missing or null; one is needed")
    return (f"TITLE: {title}\n\n" if title else "") + f"ARTICLE: {article}\n\nTL;DR:"


def _summary(text: str) -> str:
    """A summary as it follows `TL;DR:`: one leading space; the sources differ in it."""
    stripped = text.strip()
    return f" {stripped}" if stripped else ""


def _read_comparison(row: Row, tokenizer) -> Reply:
    summaries = row.values.get("summaries")
    if isinstance(summaries, Mapping):  # datasets and TFDS turn a list of objects into an object of lists
        texts = Row(summaries, row.where).get("text", list)
    else:
        texts = [Row(s, row.where).get("text") for s in row.get("summaries", list)]
    if len(texts) != 2:
        raise InputError(f"{row.where}: key 'summaries' has {len(texts)} entries, expected 2")
    texts = [_summary(t.decode("utf-8") if isinstance(t, bytes) else t) for t in texts]
    choice = row.get("choice", int)
    if choice not in (0, 1):
        raise InputError(f"{row.where}: key 'choice' is {choice}, expected 0 or 1")
    confidence = row.get("extra.confidence", int, optional=True)
    if confidence is not None and confidence < 0:  # TFDS has no null: -1 stands for it
        confidence = None
    return Reply(_info_prompt(row), texts[choice], texts[1 - choice], None if confidence is None else float(confidence))


def _read_axis(row: Row, tokenizer) -> Reply:
    return Reply(_info_prompt(row))  # the rated summary is a sample of unknown quality, not a reference


def _read_post(row: Row, tokenizer) -> Reply:
    prompt = tldr_prompt(row.get("subreddit", optional=True), row.get("title", optional=True), row.get("post"))
    return Reply(prompt, _summary(row.get("summary")))


def _read_summaries(row: Row, tokenizer) -> Reply:
    """A post with the summaries of several models, unlabelled: the first of them is the reference."""
    prompt = tldr_prompt(row.get("subreddit", optional=True), row.get("title", optional=True), row.get("post"))
    summaries = row.get("summaries", dict)
    if not summaries:
        raise Drop("no summary")
    return Reply(prompt, _summary(Row(summaries, row.where).get(next(iter(summaries)))))


def _read_post_alone(row: Row, tokenizer) -> Reply:
    return Reply(tldr_prompt(row.get("subreddit", optional=True), row.get("title", optional=True), row.get("post")))


# Plain text -----------------------------------------------------------------------------------------------------------


def _margin(row: Row) -> float | None:
    """`margin`, or the difference of `score_chosen` and `score_rejected`."""
    margin = row.get("margin", float, optional=True)
    scores = [row.get(key, float, optional=True) for key in ("score_chosen", "score_rejected")]
    if margin is None and None not in scores:
        margin = scores[0] - scores[1]
    return None if margin is None else float(margin)


def _read_pair(row: Row, tokenizer) -> Reply:
    confidence = row.get("confidence", float, optional=True)
    return Reply(
        row.get("prompt"),
        row.get("chosen"),
        row.get("rejected"),
        None if confidence is None else float(confidence),
        _margin(row),
    )


def _read_chosen(row: Row, tokenizer) -> Reply:
    return Reply(row.get("prompt"), row.get("chosen"))


def _read_prompt(row: Row, tokenizer) -> Reply:
    return Reply(row.get("prompt"))


def _read_completion(row: Row, tokenizer) -> Reply:
    return Reply(row.get("prompt"), row.get("completion"))


# Chat -----------------------------------------------------------------------------------------------------------------


Messages = list[dict[str, str]]
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def _message(row: Row, key: str, value, role_key: str, text_key: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise InputError(f"{row.where}: key {key!r} holds {_kind(value)}, expected a message object")
    inner = Row(value, f"{row.where}, {key}")
    role = inner.get(role_key)
    return {"role": _ROLES.get(role, role), "content": inner.get(text_key)}


def _messages(row: Row, key: str) -> Messages:
    return [_message(row, key, value, "role", "content") for value in row.get(key, list)]


def plain_chat(messages: Messages) -> str:
    """The form of a chat without a chat template: HH's, `\\n\\nHuman: …\\n\\nAssistant: …`, a system text first."""
    names = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} ", "system": ""}
    return "".join(names.get(m["role"], f"\n\n{m['role'].capitalize()}: ") + m["content"] for m in messages)


def render(row: Row, messages: Messages, replies: list[Messages], tokenizer) -> tuple[str, list[str], bool]:
    """A conversation and each of its last assistant messages as (prompt, replies, templated).

    With a chat template, the prompt is its rendering with the generation prompt, and a reply is what its rendering of
    the whole adds to that, without the final EOS and white space (the encoder adds the EOS). Special tokens spelled
    out in a message are removed first: data must not forge turns. Without one, `plain_chat`.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return plain_chat(messages) + ASSISTANT, [f" {r[0]['content'].strip()}" for r in replies], False
    clean = [_without_special(m, tokenizer) for m in messages]
    try:
        prompt = tokenizer.apply_chat_template(clean, tokenize=False, add_generation_prompt=True)
        texts = []
        for reply in replies:
            reply = [_without_special(m, tokenizer) for m in reply]
            if not reply[0]["content"].strip():
                raise Drop("empty reply")
            whole = tokenizer.apply_chat_template(clean + reply, tokenize=False)
            text = whole[len(prompt) :] if whole.startswith(prompt) else reply[0]["content"]
            text = text.rstrip()
            if tokenizer.eos_token:
                text = text.removesuffix(tokenizer.eos_token)
            texts.append(text)
    except Drop:
        raise
    except Exception as error:  # jinja's TemplateError and whatever the template itself raises
        raise InputError(f"{row.where}: the tokenizer's chat template rejects these messages: {error}") from error
    return prompt, texts, True


def _without_special(message: dict[str, str], tokenizer) -> dict[str, str]:
    content = message["content"]
    for token in tokenizer.all_special_tokens:
        content = content.replace(token, "")
    return {"role": message["role"], "content": content}


def _read_chat(row: Row, tokenizer) -> Reply:
    head = _messages(row, "prompt") if _is_list(row.values.get("prompt")) else []
    sides = [head + _messages(row, key) for key in ("chosen", "rejected")]
    if any(not side or side[-1]["role"] != "assistant" for side in sides):
        raise Drop("last turn is not the assistant's")
    if sides[0][:-1] != sides[1][:-1]:
        raise Drop("prompts differ")
    if len(sides[0]) < 2:
        raise Drop("empty prompt")
    prompt, (chosen, rejected), templated = render(row, sides[0][:-1], [s[-1:] for s in sides], tokenizer)
    return Reply(prompt, chosen, rejected, None, _margin(row), templated)


def _read_sharegpt(row: Row, tokenizer) -> Reply:
    turns = [_message(row, "conversations", v, "from", "value") for v in row.get("conversations", list)]
    sides = [[_message(row, key, row.get(key, dict), "from", "value")] for key in ("chosen", "rejected")]
    if not turns or turns[-1]["role"] == "assistant":
        raise Drop("last turn before the replies is not the user's")
    if any(side[0]["role"] != "assistant" for side in sides):
        raise Drop("last turn is not the assistant's")
    prompt, (chosen, rejected), templated = render(row, turns, sides, tokenizer)
    return Reply(prompt, chosen, rejected, templated=templated)


def _read_messages(row: Row, tokenizer) -> Reply:
    turns = _messages(row, "messages")
    reply = [turns.pop()] if turns and turns[-1]["role"] == "assistant" else None
    if not turns:
        raise Drop("empty prompt")
    prompt, replies, templated = render(row, turns, [reply] if reply else [], tokenizer)
    return Reply(prompt, replies[0] if replies else None, templated=templated)


@dataclasses.dataclass(frozen=True)
class Schema:
    """A kind of row: how it is recognised, what its columns are called in messages, and how it is read."""

    name: str
    columns: str
    matches: Callable[[set[str], Mapping[str, Any]], bool]
    read: Callable[[Row, Any], Reply]


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


SCHEMAS = (
    Schema("tldr_comparison", "info/summaries/choice", lambda c, v: {"info", "summaries"} <= c, _read_comparison),
    Schema("tldr_axis", "info/summary", lambda c, v: {"info", "summary"} <= c, _read_axis),
    Schema("tldr_post", "post/summary", lambda c, v: {"post", "summary"} <= c, _read_post),
    Schema("tldr_summaries", "post/summaries", lambda c, v: {"post", "summaries"} <= c, _read_summaries),
    Schema("tldr_prompt", "post", lambda c, v: "post" in c, _read_post_alone),
    Schema(
        "sharegpt",
        "conversations/chosen/rejected",
        lambda c, v: {"conversations", "chosen", "rejected"} <= c,
        _read_sharegpt,
    ),
    Schema(
        "chat", "chosen/rejected as message lists", lambda c, v: "chosen" in c and _is_list(v["chosen"]), _read_chat
    ),
    Schema("messages", "messages", lambda c, v: "messages" in c and _is_list(v["messages"]), _read_messages),
    Schema("completion", "prompt/completion", lambda c, v: {"prompt", "completion"} <= c, _read_completion),
    Schema("pair", "prompt/chosen/rejected", lambda c, v: {"prompt", "chosen", "rejected"} <= c, _read_pair),
    Schema("chosen", "prompt/chosen", lambda c, v: {"prompt", "chosen"} <= c, _read_chosen),
    Schema("prompt", "prompt", lambda c, v: "prompt" in c and not {"chosen", "rejected"} & c, _read_prompt),
    Schema(
        "hh", "chosen/rejected as dialogues", lambda c, v: {"chosen", "rejected"} <= c and "prompt" not in c, _read_hh
    ),
)
"""In order: the first that matches is taken."""
