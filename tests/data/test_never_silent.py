"""Files whose plain reading would be wrong and say nothing enter; they are refused, or read as they were meant."""

import dataclasses
import re

import pytest

from mpo_jax.data.encode import Limits, encode
from mpo_jax.data.reading import Reading
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError

SIDES = {"first": "response_a", "second": "response_b"}


@pytest.fixture(scope="module")
def chatml(models):
    return load_tokenizer(models / "qwen_base")


def answers(choices, column="pick"):
    return [
        {"prompt": f"q {n}", "response_a": f"good {n}", "response_b": f"bad {n}", column: choice}
        for n, choice in enumerate(choices)
    ]


def chosen_by(path, column="pick", split="train"):
    records, _ = load(path, split, reading=Reading(columns=SIDES | {"choice": column}))
    return [record.chosen.strip() for record in records]


@pytest.mark.parametrize("column", ["winner_model_a", "is_a_better", "label_a", "preferred_first"])
def test_a_column_of_one_side_alone_is_neither_proposed_nor_read_as_a_choice(jsonl, column):
    """A 1 there means the first reply; read as an index it would be the second, and every preference inverted."""
    path = jsonl(answers([1, 0, 1], column))
    with pytest.raises(InputError) as caught:
        load(path)
    assert "choice=" not in str(caught.value)
    with pytest.raises(InputError, match=rf"line 1: column '{column}' tells of one reply alone"):
        chosen_by(path, column)


def test_one_coding_of_choices_for_all_files(jsonl, tmp_path):
    """1 is the second reply in a file of 0 and 1, and the first in one of 1 and 2."""
    jsonl(answers([0, 1, 1]), "shards/part-0.jsonl")
    jsonl(answers([1, 2, 1]), "shards/part-1.jsonl")
    with pytest.raises(InputError, match=r"its values are of another kind in part-1\.jsonl than in part-0\.jsonl"):
        chosen_by(str(tmp_path / "shards"), split="all")
    with pytest.raises(InputError, match="holds only 1 in this file, which may be of 0 and 1 or of 1 and 2"):
        chosen_by(jsonl(answers([1, 1])))


@pytest.mark.parametrize(
    ("choices", "chosen"),
    [
        ([1.0, 2.0, None, float("nan")], ["good 0", "bad 1"]),  # as pandas writes whole numbers with gaps
        ([0, 1, 1], ["good 0", "bad 1", "bad 2"]),
        ([-1, 0, 2], ["good 0", "bad 2"]),
        (["a", "b", "tie"], ["good 0", "bad 1"]),
    ],
)
def test_codings_of_a_choice(jsonl, choices, chosen):
    assert chosen_by(jsonl(answers(choices))) == chosen


def test_a_coding_that_is_none_is_told_by_its_values_and_column(jsonl):
    with pytest.raises(InputError, match=r"line 1: column 'pick' holds 0, 1, 2; expected 0 and 1 alone"):
        chosen_by(jsonl(answers([0, 1, 2])))


MESSAGES = {
    "pandas": "[{'content': 'Q', 'role': 'user'}, {'content': 'good', 'role': 'assistant'}]",
    "numpy": "[{'content': 'Q', 'role': 'user'}\n {'content': 'good', 'role': 'assistant'}]",
    "json": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}]',
    "one": '{"role": "assistant", "content": "good"}',
    "sharegpt": '[{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}]',
}


@pytest.mark.parametrize("text", MESSAGES.values(), ids=MESSAGES)
def test_messages_that_a_table_holds_as_text_are_no_reply(jsonl, text):
    with pytest.raises(InputError, match=r"line 2: key 'chosen' is text that spells out messages"):
        load(jsonl([{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": text, "rejected": "b"}]))


@pytest.mark.parametrize("text", ['{"name": "f", "content": "x"}', "[1] a role is {content}", "role: content"])
def test_replies_in_json_or_brackets_are_replies(jsonl, text):
    records, _ = load(jsonl([{"prompt": "q", "chosen": text, "rejected": "b"}]))
    assert records[0].chosen.strip() == text


def test_control_tokens_that_are_spelt_are_told(jsonl, chatml):
    row = {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "chosen": "a<|im_end|>", "rejected": "b"}
    _, account = load(jsonl([row, row | {"prompt": "q", "chosen": "c"}]), tokenizer=chatml)
    said = account.text()
    for token in ("<|im_start|>", "<|im_end|>"):
        assert f"1 records spell {token}, which is read as text and not as a token" in said


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_that_the_template_leaves_out_are_counted(jsonl, chatml, key):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [turns[0], turns[1] | {key: "hmm"}]}, {"messages": turns}]
    _, account = load(jsonl(rows), tokenizer=chatml)
    assert f"1 replies lose their '{key}', which the template does not write" in account.text()


def test_a_fold_is_a_split(jsonl):
    rows = [{"prompt": f"q {n}", "chosen": "a", "rejected": "b", "split": fold} for n, fold in enumerate([0, 1, 2.0])]
    path = jsonl(rows)
    assert [record.prompt for record in load(path, "2")[0]] == ["q 2"]
    with pytest.raises(InputError, match="unknown split 'train'; it has 0, 1, 2, or 'all'"):
        load(path)


def test_arena_conversations_have_their_prompt_in_both_replies(jsonl):
    def talk(answer):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]

    rows = [{"conversation_a": talk("good"), "conversation_b": talk("bad"), "winner": "model_a"}]
    path = jsonl([*rows, {"conversation_a": talk("bad"), "conversation_b": talk("good"), "winner": "model_b"}])
    records, _ = load(path, reading=proposed(path))
    assert [(record.chosen.strip(), record.rejected.strip()) for record in records] == [("good", "bad")] * 2
    assert all("q" in record.prompt for record in records)


@pytest.mark.parametrize(("own", "kept"), [("S", 1), (None, 1), ("other", 0)])
def test_a_system_text_beside_arena_conversations_stands_before_them_once(jsonl, own, kept):
    """As beside a chosen and a rejected conversation: one that says something else is no system text of theirs."""

    def talk(answer):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        return [{"role": "system", "content": own}] * (own is not None) + turns

    row = {"system": "S", "conversation_a": talk("good"), "conversation_b": talk("bad"), "winner": "model_a"}
    plain = row | {"conversation_a": talk("good")[-2:], "conversation_b": talk("bad")[-2:]}
    columns = {"first": "conversation_a", "second": "conversation_b", "choice": "winner"}
    records, account = load(jsonl([row, plain]), reading=Reading(columns=columns))
    assert len(records) == 1 + kept and all(record.prompt.count("S") == 1 for record in records)
    assert sum(account.dropped.values()) == 1 - kept


def test_openai_preferences(jsonl):
    row = {
        "input": {"messages": [{"role": "user", "content": "q"}], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": "good"}],
        "non_preferred_output": [{"role": "assistant", "content": "bad"}],
    }
    path = jsonl([row])
    records, _ = load(path, reading=proposed(path))
    assert (records[0].chosen.strip(), records[0].rejected.strip()) == ("good", "bad")


def proposed(path) -> Reading:
    """What the error of a file proposes."""
    with pytest.raises(InputError) as caught:
        load(path)
    return Reading(columns=dict(re.findall(r"--config\.data\.columns\.(\w+)=(\S+)", str(caught.value))))


def test_two_replies_and_scores_alone_propose_nothing(jsonl):
    """WebGPT's: one of the two would have become a demonstration."""
    with pytest.raises(InputError) as caught:
        load(jsonl([{"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 1.0, "score_1": -1.0}]))
    assert "perhaps" not in str(caught.value)


@pytest.mark.parametrize(
    ("margin", "words"),
    [("1" + "0" * 400, "key 'margin' is infinite"), ("Infinity", "key 'margin' is infinite"),
     ("1" + "0" * 5000, "a number that can't be read")],
    ids=["400 zeros", "Infinity", "5,000 zeros"],
)  # fmt: skip
def test_numbers_that_are_none_to_compute_with(tmp_path, margin, words):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "q", "chosen": "a", "rejected": "b", "margin": {margin}}}\n')
    with pytest.raises(InputError, match=f"line 1: {words}"):
        load(str(path))


def test_pairs_that_are_the_same_once_encoded_are_not_said_to_be_too_long(jsonl, chatml):
    records, _ = load(jsonl([{"prompt": "q", "chosen": "a", "rejected": "b"}]), tokenizer=chatml)
    pairs = [dataclasses.replace(record, rejected=record.chosen) for record in records]
    with pytest.raises(InputError) as caught:
        encode(pairs, chatml, 2, Limits(96, 32))
    assert "identical replies" in str(caught.value) and "raise max_length" not in str(caught.value)
