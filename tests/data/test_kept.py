"""Columns of a file that functions are told of: kept as they stand, in the account, or refused by name."""

import json

import pytest

from mpo_jax.data import sources
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import records_fingerprint
from mpo_jax.errors import InputError

ROWS = [
    {"ask": f"What is {n} + 1?", "chosen": str(n + 1), "rejected": "no", "answer": n + 1, "info": {"level": [n, "é"]}}
    for n in range(3)
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_kept_columns_stand_in_the_record_as_in_the_file(file):
    """By the file's name, also if it is mapped; `answer`, which looks like a reply, needs no data.ignore then."""
    reading = Reading(columns={"prompt": "ask"}, keep=("answer", "info", "ask"))
    records, account = sources.load(file, "train", None, None, reading)
    for record, row in zip(records, ROWS, strict=True):
        assert json.loads(record.kept) == {name: row[name] for name in ("answer", "info", "ask")}
        assert record.prompt == row["ask"]
    assert account.columns["answer"] == account.columns["info"] == "kept for scorers"
    assert account.columns["ask (as prompt)"].endswith("; kept for scorers")
    plain, _ = sources.load(file, "train", None, None, Reading(columns={"prompt": "ask"}, ignore=("answer",)))
    assert {record.kept for record in plain} == {""} and plain == records
    assert records_fingerprint(plain) == records_fingerprint(records), "tokens do not depend on them"


def test_what_cannot_be_kept(file):
    with pytest.raises(InputError, match=r"^data\.keep: 'anwser' is no column of .*rows\.jsonl; did you mean 'answer'"):
        sources.load(file, "train", None, None, Reading(columns={"prompt": "ask"}, keep=("anwser",)))
    with pytest.raises(InputError, match=r"data\.keep: 'answer' is in data\.ignore too"):
        Reading(keep=("answer",), ignore=("answer",))
    with pytest.raises(InputError, match="'answer' would not be read"):
        sources.load(file, "train", None, None, Reading(columns={"prompt": "ask"}))
