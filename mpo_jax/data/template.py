"""A conversation and a tokenizer's chat template enter; prompt and replies leave as text, as the model knows them.

Only the template can open a turn. Control tokens that a message spells out are set between marks before the template
is applied, and encoded as the text they are (`transformers.utils.chat_template_utils`, whose ids these are).
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from etils import epath

from mpo_jax.data.records import Chat, Turn
from mpo_jax.data.row import Drop
from mpo_jax.data.templates import BUILT_IN
from mpo_jax.errors import InputError
from mpo_jax.settings import nearest

TODAY = datetime.date(2024, 7, 26)
"""What templates with a clock are told: the day that Llama 3.1's own has where it finds no clock. With the true date,
prompts would be other texts every day."""
MARKS = "\U000f0000\U000f0001"
"""Around control tokens that stand in a message; those of `transformers`, checked by a test."""
CHOICES = ("auto", "plain", "chat")
"""Of `data.template`, for the tokenizer's own: where it shows conversations, nowhere, or plain prompts too."""
END_OF_TURN = "mpo_end_of_turn"
"""The attribute of a tokenizer in which `dressed` keeps what ends a turn; it enters the tokenizer's fingerprint."""
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_PROBE = ("What is it?", "It is a probe.")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a chat template does, found by trying it. written: the token that it writes after a reply ("" for none).
    end: the one that is to end a reply: that, unless `dressed` was told another. lead: what stands between the user's
    last word and the reply. control: tokens that only it may write. clock: whether it asks for the date."""

    end: str
    written: str
    lead: str
    control: tuple[str, ...]
    clock: bool


def has_template(tokenizer) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def chosen(name: str) -> str | None:
    """The Jinja text that `data.template` means: of the package by its name, a file's, or the text itself; None for the
    tokenizer's own. InputError for what is none of these."""
    if name in CHOICES:
        return None
    if name in BUILT_IN:
        return BUILT_IN[name]
    if "{{" in name or "{%" in name:
        text = name
    else:
        text = _text_of(name)
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"data.template: line {error.lineno}: no Jinja template: {error.message}") from None
    return text


def _text_of(file: str) -> str:
    try:
        found = bool(file) and epath.Path(file).is_file()
        text = epath.Path(file).read_text() if found else ""
    except (OSError, ValueError) as error:
        raise InputError(f"data.template: {file!r}: cannot be read: {' '.join(str(error).split())}") from error
    if not found:
        known = nearest(file, [*CHOICES, *BUILT_IN])
        raise InputError(f"data.template: {file!r}: neither a file nor a template{known}")
    return text


def dressed(tokenizer, name: str, end_of_turn: str = ""):
    """The tokenizer with the chat template that `data.template` names, and with the token that is to end a turn of the
    assistant ("": what the template writes): itself, where neither is another than its own. InputError for a token that
    it has not."""
    text = chosen(name)
    if text is None and not end_of_turn:
        return tokenizer
    other = copy.copy(tokenizer)
    if text is not None:
        other.chat_template = text
    if end_of_turn and end_of_turn not in tokenizer.get_vocab():
        raise InputError(
            f"data.end_of_turn: {end_of_turn!r} is no token of the model's tokenizer; expected one of its own"
        )
    setattr(other, END_OF_TURN, end_of_turn)
    return other


def written(tokenizer) -> str:
    """All text of the tokenizer's templates, and what the one in use makes of a short conversation: a control token
    that stands in neither is written nowhere. "" without a template."""
    if not has_template(tokenizer):
        return ""
    sources = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    asked = [{"role": "user", "content": _PROBE[0]}, {"role": "assistant", "content": _PROBE[1]}]
    with contextlib.suppress(Exception):  # a template that wants other turns: it is told where it meets the data
        sources += _apply(tokenizer, asked, None, {})
    return sources


def facts(tokenizer) -> Facts:
    """Of the tokenizer's template; of a tokenizer without one, its special tokens alone."""
    found = _facts(tokenizer, json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True))
    return dataclasses.replace(found, end=getattr(tokenizer, END_OF_TURN, "") or found.written)


@functools.lru_cache(maxsize=16)
def _facts(tokenizer, template: str) -> Facts:
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    if not has_template(tokenizer):
        return Facts("", "", "", tuple(sorted(special)), False)
    source = _source(tokenizer, None)
    end = lead = ""
    user = ""
    try:
        asked = [{"role": "user", "content": _PROBE[0]}]
        prompt = _apply(tokenizer, asked, None, {}, add_generation_prompt=True)
        whole = _apply(tokenizer, [*asked, {"role": "assistant", "content": _PROBE[1]}], None, {})
        lead = prompt.rpartition(_PROBE[0])[2] if _PROBE[0] in prompt else ""
        tail = whole.rpartition(_PROBE[1])[2] if _PROBE[1] in whole else ""
        user = _apply(tokenizer, asked, None, {})
        names = sorted((token.content for token in added if not token.content.isspace()), key=len, reverse=True)
        found = re.search("|".join(map(re.escape, names)), tail) if names else None
        end = found[0] if found else ""
    except Exception:  # a template that wants other turns: it is told where it meets the data
        pass
    # Added tokens that are not marked special count where the template writes them around a user's turn (some models'
    # <|im_start|>), and not where it writes them within a reply (<think>), since replies may hold those.
    around = {token.content for token in added if not token.content.isspace() and token.content in user}
    return Facts(end, end, lead, tuple(sorted(special | around)), "strftime_now" in source)


def render(
    chat: Chat, replies: Sequence[Turn], tokenizer, where: str = "prompt"
) -> tuple[str, list[str], tuple[str, ...]]:
    """A conversation and each of its possible last turns as (prompt, replies, marked).

    The prompt is the template's rendering with the generation prompt; a reply is what its rendering of the whole adds
    to that, without the end of turn, which the encoder writes. marked: () or, where a message spells out control
    tokens, prompt and replies with marks around those.

    Drop for an empty reply. InputError, beginning with `where`, if the template rejects the messages, or leaves out the
    tools, tool calls or system text that it was given.
    """
    known = facts(tokenizer)
    control = _pattern(known.control)
    options = json.loads(chat.options) if chat.options else {}
    tools = json.loads(chat.tools) if chat.tools else None
    messages = [_mark(turn.message(), control) for turn in chat.turns]
    try:
        prompt = _apply(tokenizer, messages, _mark(tools, control), options, add_generation_prompt=True)
        texts = []
        for reply in replies:
            message = _mark(reply.message(), control)
            if not message["content"].strip() and not reply.rest:
                raise Drop("empty reply")
            whole = _apply(tokenizer, [*messages, message], _mark(tools, control), options)
            text = whole[len(prompt) :] if whole.startswith(prompt) else message["content"]
            _calls_are_shown(reply, _unmarked(text), f"{where}, reply")
            texts.append(text.rstrip().removesuffix(known.written or tokenizer.eos_token))
    except (Drop, InputError):
        raise
    except Exception as error:  # jinja's TemplateError and whatever the template itself raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: the tokenizer's chat template rejects these messages: {reason}; data.template='plain' does "
            "without it, data.system='user' puts a system text into the first user's turn"
        ) from error
    _nothing_left_out(chat, prompt, where)
    all_texts = (prompt, *texts)
    if not any(mark in text for text in all_texts for mark in MARKS):
        return prompt, texts, ()
    return _unmarked(prompt), [_unmarked(text) for text in texts], all_texts


def _apply(tokenizer, messages: list[dict], tools, options: dict[str, Any], add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=_source(tokenizer, tools),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **options,
    )


def _source(tokenizer, tools) -> str:
    """The template's text. One that asks for the date is given `TODAY`, by a macro of the clock's own name."""
    source = tokenizer.get_chat_template(tools=tools)
    if "strftime_now" not in source:
        return source
    formats = sorted({found[1] for found in _CLOCK.findall(source)})
    if len(_CLOCK.findall(source)) < source.count("strftime_now("):
        raise InputError("the chat template asks for the date in a form that it computes; expected a constant one")
    days = "".join(
        f"{{%- if format == {form!r} %}}{{{{ {TODAY.strftime(form)!r} }}}}{{%- endif %}}" for form in formats
    )
    return f"{{%- macro strftime_now(format) %}}{days}{{%- endmacro %}}{{{{ '' }}}}{source}"


def _nothing_left_out(chat: Chat, prompt: str, where: str) -> None:
    """InputError where a template shows no trace of what it was given: some take no tools, others no system text."""
    shown = _unmarked(prompt)
    for place, turn in enumerate(chat.turns):
        _calls_are_shown(turn, shown, f"{where}, turn {place + 1}")
        if turn.role in ("system", "tool") and turn.content.strip() not in shown:
            remedy = (
                "data.system='user' puts it into the first user's turn" if turn.role == "system" else "remove such rows"
            )
            raise InputError(
                f"{where}, turn {place + 1}: the chat template leaves out the {turn.role}'s turn; {remedy}"
            )
    for tool in json.loads(chat.tools) if chat.tools else []:
        name = (tool.get("function") or tool).get("name", "") if isinstance(tool, dict) else ""
        if not name or name not in shown:
            raise InputError(
                f"{where}: column 'tools': the chat template leaves the tools out; data.ignore=('tools',) does without"
            )


def _calls_are_shown(turn: Turn, shown: str, where: str) -> None:
    for call in turn.message().get("tool_calls") or []:
        name = (call.get("function") or call).get("name", "") if isinstance(call, dict) else ""
        if not name or name not in shown:
            raise InputError(
                f"{where}: the chat template leaves out tool_calls; expected a template that shows them, or data "
                "without such rows"
            )


# Control tokens -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _pattern(control: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


def _mark(value, control: re.Pattern):
    from transformers.utils.chat_template_utils import mark_control_tokens

    return mark_control_tokens(value, control)


def _unmarked(text: str) -> str:
    return text.translate({ord(mark): None for mark in MARKS})


def marked_text(text: str, tokenizer) -> str | None:
    """A text without a template that spells out a control token which tokenizers make of any text, with marks around
    it and around all its like; None for any other text."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    control = facts(tokenizer).control
    if not any(token in text for token in control if token not in special):
        return None
    return _mark(text, _pattern(control))


def marked_ids(text: str, tokenizer) -> list[int]:
    """Token ids of a text with marks: what they enclose is text, the rest is read as a template's writing."""
    from transformers.utils.chat_template_utils import encode_marked_chat

    return encode_marked_chat(tokenizer, text)


def whole_ids(chat: Chat, reply: str, tokenizer) -> list[int]:
    """Token ids of a conversation with its last turn, all that the template writes; control tokens that a message
    spells out are text. A reward model's input: what `apply_chat_template` gives for the same messages.

    InputError if the template rejects the messages or leaves something out."""
    control = _pattern(facts(tokenizer).control)
    tools = json.loads(chat.tools) if chat.tools else None
    messages = [_mark(turn.message(), control) for turn in (*chat.turns, Turn("assistant", reply))]
    try:
        text = _apply(tokenizer, messages, _mark(tools, control), {})
    except InputError:
        raise
    except Exception as error:  # jinja's TemplateError and whatever the template itself raises
        raise InputError(f"its chat template rejects a conversation: {' '.join(str(error).split())[:200]}") from error
    _nothing_left_out(chat, text, "its chat template")
    if any(mark in text for mark in MARKS):
        return marked_ids(text, tokenizer)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
