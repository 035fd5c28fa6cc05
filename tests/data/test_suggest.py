"""Rows with columns of any name enter; the flags that the error proposes are given, and the rows are read."""

import re

import pytest

from mpo_jax.data.reading import Reading
from mpo_jax.data.sources import load
from mpo_jax.errors import InputError

ROWS = {
    "an adjective after": {"question": "q", "answer_good": "a", "answer_bad": "b"},
    "an adjective before": {"task": 3, "prompt_text": "q", "better_reply": "a", "worse_reply": "b"},
    "positive and negative": {"query": "q", "positive": "a", "negative": "b"},
    "capitals": {"userQuestion": "q", "preferredAnswer": "a", "dispreferredAnswer": "b"},
    "two sides and a winner": {"ask": "q", "model_a_text": "m", "reply_a": "a", "reply_b": "b", "winner": "a"},
    "two sides and a label": {"problem": "q", "output_1": "a", "output_2": "b", "label": 0},
    "a reply and a label": {"user_request": "q", "assistant_reply": "a", "thumbs": True},
    "a reply": {"post": "q", "target_text": "a", "persona": ""},
}


@pytest.mark.parametrize("name", ROWS)
def test_what_is_proposed_reads_the_rows(jsonl, name):
    rows = [ROWS[name], {key: f"{value}!" if value in ("q", "b") else value for key, value in ROWS[name].items()}]
    path = jsonl(rows)
    with pytest.raises(InputError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    columns = dict(re.findall(r"--config\.data\.columns\.(\w+)=(\S+)", str(caught.value).rpartition("; perhaps ")[2]))
    ignore = ("model_a_text", "persona", "task")
    records, _ = load(path, reading=Reading(columns=columns, ignore=ignore))
    prompts = [record.prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:") for record in records]
    assert prompts == ["q", "q!"]
    assert {record.chosen.strip() for record in records} == {"a"}
    if "b" in ROWS[name].values():
        assert [record.rejected.strip() for record in records] == ["b", "b!"]


@pytest.mark.parametrize("row", [{"x": "a", "y": "b"}, {"prompt": "p", "rating": 3}, {"a": 1, "b": 2}])
def test_names_that_tell_too_little_give_no_proposal(jsonl, row):
    with pytest.raises(InputError) as caught:
        load(jsonl([row]))
    assert "perhaps" not in str(caught.value)
