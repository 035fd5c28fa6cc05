"""Rows of TL;DR and of its relatives enter; prompts with the post, and summaries, leave."""

from collections.abc import Callable, Mapping

from mpo_jax.data.forms.base import Form, Plan, Said
from mpo_jax.data.row import Drop, Row
from mpo_jax.errors import InputError


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


def _read_comparison(row: Row) -> Said:
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
    return Said(_info_prompt(row), texts[choice], texts[1 - choice], None if confidence is None else float(confidence))


def _read_axis(row: Row) -> Said:
    return Said(_info_prompt(row))  # the rated summary is a sample of unknown quality, not a reference


def _post(row: Row) -> str:
    return tldr_prompt(row.get("subreddit", optional=True), row.get("title", optional=True), row.text("post"))


def _read_post(row: Row) -> Said:
    return Said(_post(row), _summary(row.text("summary")))


def _read_summaries(row: Row) -> Said:
    """A post with the summaries of several models, unlabelled: the first of them is the reference."""
    summaries = row.get("summaries", dict)
    if not summaries:
        raise Drop("no summary")
    return Said(_post(row), _summary(Row(summaries, row.where).get(next(iter(summaries)))))


def _form(name: str, columns: str, needs: tuple[str, ...], read: Callable[[Row], Said], uses: dict, known=()) -> Form:
    """Of rows that have the columns `needs`, and no pair of replies beside them."""

    def matches(found, rows) -> bool:
        return found.has(*needs) and not found.has("chosen", "rejected")

    def plan(found, rows, reading) -> Plan:
        return Plan(read, {column: what for column, what in uses.items() if column in found.kinds}, frozenset(known))

    return Form(name, columns, matches, plan)


_POST = {"subreddit": "prompt", "title": "prompt", "post": "prompt"}
FORMS = (
    _form(
        "tldr_comparison",
        "info/summaries/choice",
        ("info", "summaries"),
        _read_comparison,
        {"info": "prompt", "summaries": "replies", "choice": "which is chosen", "extra": "confidence"},
    ),
    _form("tldr_axis", "info/summary", ("info", "summary"), _read_axis, {"info": "prompt"}, ("summary",)),
    _form("tldr_post", "post/summary", ("post", "summary"), _read_post, _POST | {"summary": "chosen"}),
    _form(
        "tldr_summaries",
        "post/summaries",
        ("post", "summaries"),
        _read_summaries,
        _POST | {"summaries": "chosen (the first of each row; the others unread)"},
    ),
)
POSTS = _form("tldr_prompt", "post", ("post",), lambda row: Said(_post(row)), _POST)
"""Posts alone; after every other form, since a post may stand beside a prompt."""
