"""Files and limits enter; that the account of them tells every row and column, and survives JSON, is checked."""

import json

import pytest

from mpo_jax.data.account import Account, epochs
from mpo_jax.data.encode import Limits, encode
from mpo_jax.data.shares import Division, read_share
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def chatml(models):
    return load_tokenizer(models / "qwen_base")


def test_every_row_and_column_is_accounted_for(jsonl, chatml):
    rows = [{"question": f"q{n}?", "answer": "yes " * (40 * (n == 3) + 1), "source": "s"} for n in range(6)]
    rows += [{"question": "q?", "answer": "", "source": "s"}, {"question": None, "answer": "a", "source": "s"}]
    records, account = load(jsonl(rows), tokenizer=chatml)
    account = account.with_rows(encode(records, chatml, 1, Limits(128, 32)).counts)
    assert account.read == account.kept + sum(account.dropped.values()) == 8
    assert set(account.columns) == {"question", "answer", "source"}
    said = account.text().splitlines()
    path = account.source
    assert said == [
        f"{path} [train] (completion): 8 rows read, 6 kept; dropped: "
        "1 empty reply, 1 no 'question' (missing or null, expected text)",
        "  columns: question: prompt; answer: chosen; source: unread",
        "  prompts written as: 6 chat template",
        "  rows: 6 encoded, 6 kept, 1 replies cut at their end, without the token that ends a reply",
    ]
    assert account.first_dropped["empty reply"] == "a.jsonl, line 7"


def test_an_account_survives_json(jsonl, chatml):
    path = jsonl([{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(40)])
    records, account = read_share(Division(path), "policy", chatml)
    account = account.with_rows(encode(records, chatml, 2, Limits(64, 16)).counts)
    again = Account(**json.loads(json.dumps(account.as_json())))
    assert again == account and again.text() == account.text()
    assert f"share policy: {len(records)} records" in account.text() and 0 < len(records) < 40


def test_on_which_side_is_cut_is_told(shared):
    tokenizer = load_tokenizer(shared / "models/stories260K")
    records, account = load(str(shared / "data/hh_rlhf"), "test")
    encoded = encode(records, tokenizer, 2, Limits(256, 64))
    counts = encoded.counts
    assert counts["prompts truncated"] >= counts["prompts cut at a turn"] + counts["prompts cut within a turn"] > 0
    assert counts["rows"] == len(records) and counts["kept"] == len(encoded)
    assert counts["rows"] - counts["kept"] == sum(n for rule, n in counts.items() if rule.startswith("dropped"))
    cut = sum(int(encoded.row(row)[1][-1] != tokenizer.eos_token_id) for row in range(len(encoded)))
    cut += sum(int(encoded.row(row)[2][-1] != tokenizer.eos_token_id) for row in range(len(encoded)))
    assert counts["replies truncated"] == cut
    text = account.with_rows(counts).text()
    assert f"{cut} replies cut at their end" in text and f"{counts['prompts cut at a turn']} of these at a turn" in text


def test_epochs_in_words():
    assert epochs(60, 32, 5000) == "60 steps of 32 see 1,920 of 5,000 rows: 0.38 epochs"
    assert epochs(1000, 16, 1600) == "1,000 steps of 16 see 1,600 rows: 10.00 epochs"
