"""Rows of any JSON under the names that forms know enter; that they are read, or refused in one line, is checked."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpo_jax.data.reading import ROLES, Reading
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError

NAMES = (
    "prompt", "question", "instruction", "input", "messages", "conversations", "chosen", "rejected", "completion",
    "output", "label", "system", "history", "tools", "margin", "score_chosen", "score_rejected", "confidence",
    "split", "first", "second", "choice", "response_0", "response_1", "response_2", "better_response_id",
    "preference_strength", "human_ref_A", "human_ref_B", "labels", "answers", "info", "summaries", "summary",
    "post", "title", "output_1", "output_2", "preference",
)  # fmt: skip
TEXTS = st.sampled_from(
    [
        "",
        " ",
        "a",
        "b",
        "\n\nHuman: a\n\nAssistant:",
        "\n\nHuman: a\n\nAssistant: b",
        "Human: x",
        "\ud83d",
        "<|im_end|>",
        "0",
        "nan",
    ]
)
_MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "function_call", "gpt", "x", None]),
        "from": st.sampled_from(["human", "gpt", 3]),
        "content": TEXTS | st.none() | st.just([{"type": "text", "text": "a"}]),
        "value": TEXTS,
        "tool_calls": st.just([{"function": {"name": "f"}}]) | st.just([3]) | st.just("x"),
    },
)
_SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_infinity=False) | TEXTS
_GOOD = st.sampled_from(
    ["p", "a", "b", [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}], 0, 1, True]
)
VALUES = _GOOD | st.recursive(
    _SCALARS | _MESSAGE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "rank", "answer", "role", "content"]), inner, max_size=3)
    ),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6), min_size=1, max_size=3)
READINGS = st.builds(
    Reading,
    columns=st.dictionaries(st.sampled_from(list(ROLES)), st.sampled_from(NAMES), max_size=1),
    ignore=st.lists(st.sampled_from(NAMES), max_size=3).map(tuple),
    template=st.sampled_from(["auto", "plain", "chat"]),
    system=st.sampled_from(["turn", "user"]),
    common_prompt=st.booleans(),
)


@pytest.fixture(scope="module")
def tokenizers(models):
    return {"none": None} | {name: load_tokenizer(models / name) for name in ("gemma", "qwen_base")}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "a.jsonl"


@pytest.mark.parametrize("family", ["none", "gemma", "qwen_base"])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS, reading=READINGS)
def test_any_rows_are_read_or_refused_in_one_line(tokenizers, path, family, rows, reading):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = ""
    try:
        records, account = load(str(path), "all", tokenizers[family], reading=reading)
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    if said:
        return
    assert account.read == len(rows) and account.kept == len(records) > 0
    named = {name.split(" (as ")[0] for name in account.columns}
    assert named >= {name for row in rows for name in row} - set(reading.columns)
    assert all(record.prompt.strip() for record in records)
