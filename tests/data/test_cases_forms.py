"""Rows in the forms that data sets have enter; that each is read as it means, or refused with help, is checked.

The files lie in ../shared/cases/data; beside each kind stand variants that are not there.
"""

import json

import pytest

from mpo_jax.data.encode import Limits, check_margins, encode
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import labelled
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from tests.data.conftest import BAD, GOOD, QUESTION

HUMAN = "\n\nHuman: {}\n\nAssistant:"
PAIR = {"chosen": "yes", "rejected": "no"}


@pytest.fixture(scope="module")
def chatml(models):
    return load_tokenizer(models / "qwen_base")


def _asked(number: int) -> str:
    return HUMAN.format(QUESTION.format(number))


def _check_pairs(records, count=40, prompt=_asked, chosen=f" {GOOD}", rejected=f" {BAD}"):
    assert len(records) == count
    for number, record in enumerate(records):
        assert record.prompt == prompt(number)
        assert (record.chosen, record.rejected) == (chosen.format(number), rejected.format(number))


# Messages -------------------------------------------------------------------------------------------------------------


def test_messages_are_the_prompt_of_pairs_of_message_objects(cases, chatml):
    path = str(cases / "messages_and_pair_objects/pairs.jsonl")
    _check_pairs(load(path)[0], prompt=lambda n: f"Answer in one line.{_asked(n)}")
    records, account = load(path, tokenizer=chatml)
    assert all(record.prompt.startswith("<|im_start|>system\nAnswer in one line.<|im_end|>\n") for record in records)
    assert account.columns == {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}
    assert account.shown == {"chat template": 40}


def test_a_text_prompt_of_message_replies_is_the_users_turn(cases):
    _check_pairs(load(str(cases / "text_prompt_message_replies/pairs.jsonl"))[0])


@pytest.mark.parametrize("name", ["pairs", "prompter"])
def test_role_names_are_known(cases, name):
    _check_pairs(load(str(cases / f"role_names/{name}.jsonl"))[0])


@pytest.mark.parametrize(
    ("user", "assistant"), [("HUMAN", "ChatGPT"), ("Prompter", "Bot"), ("customer", "AI"), ("user ", "model")]
)
def test_role_names_in_any_letters(jsonl, user, assistant):
    turns = [{"from": user, "value": "q"}, {"from": assistant, "value": "a"}]
    (record,), _ = load(jsonl([{"conversations": turns}]))
    assert (record.prompt, record.chosen) == (HUMAN.format("q"), " a")


def test_an_unknown_role_is_an_error_with_line_and_name(jsonl, fails):
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    odd = [{"role": "user", "content": "q"}, {"role": "narrator", "content": "a"}]
    fails(jsonl([{"messages": good}, {"messages": odd}]), "a.jsonl, line 2", "messages[1]", "'narrator'", "assistant")


@pytest.mark.parametrize(("name", "replies"), [("prompt_completion", 1), ("conversations_sft", 1), ("post_pair", 2)])
def test_message_lists_everywhere(cases, name, replies):
    records, _ = load(str(cases / f"message_lists_everywhere/{name}.jsonl"))
    assert len(records) == 40 and all((r.rejected is not None) == (replies == 2) for r in records)
    assert QUESTION.format(7) in records[7].prompt and records[7].chosen.strip() == GOOD.format(7)


def test_parts_of_a_message_are_joined_and_pictures_refused(jsonl, fails):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]
    (record,), _ = load(jsonl([{"messages": turns}]))
    assert record.prompt == HUMAN.format("ab")
    turns[0]["content"] = [{"type": "image", "image": "x.png"}, *parts]
    fails(jsonl([{"messages": turns}]), "line 1", "messages[0].content", "image", "only text")


def test_conversations_that_repeat_the_prompt_column(jsonl):
    """ultrafeedback_binarized: the prompt stands in a column and in both replies, and once more in `messages`."""
    sides = {
        name: [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}]
        for name in ("chosen", "rejected")
    }
    rows = [{"prompt": "q", "prompt_id": "1", "messages": sides["chosen"]} | sides] * 2
    records, account = load(jsonl(rows))
    assert (records[0].prompt, records[0].chosen) == (HUMAN.format("q"), " chosen")
    assert account.columns["messages"] == "unread (the same as 'chosen')"


def test_a_prompt_list_repeated_or_continued_in_the_replies(jsonl):
    head = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    sides = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    whole = {name: head + turns for name, turns in sides.items()}
    expected = load(jsonl([{"prompt": head} | sides]))[0]
    assert expected[0].prompt == f"s{HUMAN.format('q')}"
    assert load(jsonl([{"prompt": head} | whole]))[0] == expected
    assert load(jsonl([{"messages": head} | whole]))[0] == expected
    assert load(jsonl([whole]))[0] == expected


def test_a_prompt_column_that_repeats_the_last_question(jsonl):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    sides = {name: [*turns, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (record,), _ = load(jsonl([{"prompt": "r"} | sides]))
    assert record.prompt == "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:" and record.chosen == " chosen"


def test_a_prompt_column_that_says_something_else_than_the_conversation(jsonl):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "q", "chosen": turns, "rejected": other}, {"prompt": "x", "chosen": turns, "rejected": other}]
    records, account = load(jsonl(rows))
    assert len(records) == 1 and account.dropped == {"the prompt column and the conversation differ": 1}


# Questions, system texts, past turns ----------------------------------------------------------------------------------


def test_question_columns(cases):
    folder = cases / "question_columns"
    _check_pairs(
        load(str(folder / "alpaca.jsonl"))[0],
        prompt=lambda n: HUMAN.format(f"{QUESTION.format(n)}\nOnly small things."),
    )
    for name in ("pairs", "input"):
        _check_pairs(load(str(folder / f"{name}.jsonl"))[0], prompt=lambda n: f"You are terse.{_asked(n)}")
    assert {record.margin for record in load(str(folder / "input.jsonl"))[0]} == {2.0}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, HUMAN.format("i"), " o"),
        ({"instruction": "i", "input": "x", "output": "o"}, HUMAN.format("i\nx"), " o"),
        ({"question": "q", "answer": "a"}, HUMAN.format("q"), " a"),
        ({"query": "q", "response": "a", "id": 3}, HUMAN.format("q"), " a"),
        ({"prompt": "p", "response": "a", "response_model": "m"}, "p", "a"),
        ({"prompt": "p", "label": " l"}, "p", " l"),
        ({"system": None, "question": "q", "answer": "a"}, HUMAN.format("q"), " a"),
    ],
)
def test_demonstrations_by_their_columns(jsonl, row, prompt, chosen):
    (record,), _ = load(jsonl([row]))
    assert (record.prompt, record.chosen, record.rejected) == (prompt, chosen, None)


def test_system_and_history_are_turns(cases, chatml):
    folder = cases / "system_tools_history"
    _check_pairs(load(str(folder / "pairs.jsonl"))[0], prompt=lambda n: f"Speak like a pirate.{_asked(n)}")
    past = "\n\nHuman: Hello\n\nAssistant: Hi there"
    _check_pairs(load(str(folder / "history.jsonl"))[0], prompt=lambda n: past + _asked(n))
    records, _ = load(str(folder / "history.jsonl"), tokenizer=chatml)
    assert [turn.role for turn in records[0].chat.turns] == ["user", "assistant", "user"]
    assert records[0].prompt.count("<|im_start|>user\n") == 2


def test_a_system_column_beside_a_conversation_with_its_own(jsonl):
    def row(column, own):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        return {"system": column, "messages": [{"role": "system", "content": own}, *turns] if own else turns}

    records, account = load(jsonl([row("s", "s"), row("s", ""), row("", "s"), row("s", "t")]))
    assert [record.prompt for record in records] == [f"s{HUMAN.format('q')}"] * 3
    assert account.dropped == {"the system column and the conversation differ": 1}


def test_a_system_column_beside_conversations_in_the_replies(jsonl):
    sides = {
        name: [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}]
        for name in ("chosen", "rejected")
    }
    (record,), account = load(jsonl([{"system": "s", "history": [["h", "i"]]} | sides]))
    assert record.prompt == f"s\n\nHuman: h\n\nAssistant: i{HUMAN.format('q')}"
    assert account.columns["system"] == "system turn" and account.columns["history"] == "earlier turns"


def test_tools_are_shown_or_an_error_says_how_to_ignore_them(cases, fails, chatml):
    path = cases / "system_tools_history/sharegpt.jsonl"
    for tokenizer in (None, chatml):
        fails(path, "sharegpt.jsonl, line 1", "'tools'", "data.ignore=('tools',)", tokenizer=tokenizer)
    records, account = load(str(path), reading=Reading(ignore=("tools",)))
    _check_pairs(records, prompt=lambda n: f"Speak like a pirate.{_asked(n)}")
    assert account.columns["tools"] == "ignored (data.ignore)"


TOOLS = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def with_tools(models):
    tokenizer = load_tokenizer(models / "qwen_base")
    tokenizer.chat_template = TOOLS
    return tokenizer


def test_tools_and_tool_calls_go_through_a_template_that_knows_them(cases, with_tools):
    records, account = load(str(cases / "tool_turns/toolcalls_empty.jsonl"), tokenizer=with_tools)
    assert len(records) == 40 and account.columns["tools"] == "tools of the template"
    assert all(
        '<call>{"name": "count"' in record.prompt and "<|im_start|>tool\n3<|im_end|>" in record.prompt
        for record in records
    )
    records, _ = load(str(cases / "tool_turns/tools.jsonl"), tokenizer=with_tools)
    assert len(records) == 40 and "None" not in records[0].prompt.split("<|im_start|>tool")[0]
    records, _ = load(str(cases / "system_tools_history/sharegpt.jsonl"), tokenizer=with_tools)
    assert records[0].prompt.startswith('<|im_start|>tools\n{"name": "count"}')


@pytest.mark.parametrize("name", ["tools", "toolcalls_empty"])
def test_tool_turns_are_never_empty_turns(cases, fails, chatml, name):
    fails(cases / f"tool_turns/{name}.jsonl", "line 1", "tool")
    fails(cases / f"tool_turns/{name}.jsonl", "line 1, turn 2", "tool_calls", tokenizer=chatml)


def test_a_reply_that_is_a_tool_call(jsonl, fails, with_tools, chatml):
    call = {"type": "function", "function": {"name": "count", "arguments": {"what": "ducks"}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    path = jsonl([{"messages": turns}])
    (record,), _ = load(path, tokenizer=with_tools)
    assert record.chosen.strip() == '<call>{"name": "count", "arguments": {"what": "ducks"}}</call>'
    fails(path, "line 1", "turn 2 holds tool_calls")
    fails(path, "line 1, reply", "leaves out tool_calls", tokenizer=chatml)


def test_calls_in_sharegpts_form(jsonl, fails, with_tools):
    def rows(call):
        turns = [("human", "q"), ("function_call", call), ("observation", "3"), ("gpt", "a")]
        return [{"conversations": [{"from": role, "value": text} for role, text in turns]}]

    (record,), _ = load(jsonl(rows('{"name": "count", "arguments": {}}')), tokenizer=with_tools)
    assert '<call>{"name": "count", "arguments": {}}</call>' in record.prompt
    fails(jsonl(rows("count()")), "line 1", "conversations[1]", "function_call", tokenizer=with_tools)


def test_messages_as_an_object_of_lists(jsonl):
    """As `datasets` and TFDS keep them."""
    (record,), _ = load(jsonl([{"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}]))
    assert (record.prompt, record.chosen) == (HUMAN.format("q"), " a")


def test_null_content_without_a_tool_call_is_an_error(jsonl, fails):
    turns = [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]
    fails(jsonl([{"messages": turns}]), "line 1", "messages[0]", "null")


def test_an_empty_turn_is_dropped_and_counted(jsonl):
    def row(text):
        return {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "q"},
            ]
        }

    records, account = load(jsonl([row("x"), row("")]))
    assert len(records) == 1 and account.dropped == {"empty turn": 1}


def test_a_template_that_leaves_the_system_text_out_is_an_error(jsonl, fails, models):
    tokenizer = load_tokenizer(models / "qwen_base")
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    path = jsonl([{"system": "Be kind.", "prompt": "q"} | PAIR])
    fails(path, "line 1", "leaves out the system's turn", "data.system='user'", tokenizer=tokenizer)
    (record,), _ = load(path, tokenizer=tokenizer, reading=Reading(system="user"))
    assert record.prompt.startswith("user: Be kind.\n\nq\n")


def test_a_template_that_rejects_a_system_turn_says_what_helps(jsonl, fails, models):
    tokenizer = load_tokenizer(models / "gemma")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    path = jsonl([{"system": "s", "prompt": "q"} | PAIR])
    fails(path, "line 1", "System role not supported", "data.system='user'", tokenizer=tokenizer)
    assert len(load(path, tokenizer=tokenizer, reading=Reading(system="user"))[0]) == 1


# Labels, ranks, choices -----------------------------------------------------------------------------------------------


def test_unpaired_replies_give_demonstrations_of_the_good_and_pairs(cases, models):
    records, account = load(str(cases / "unpaired_kto/kto.jsonl"))
    _check_pairs(records, prompt=QUESTION.format)
    assert account.read == 80 and account.schema == "unpaired" and sum(account.notes.values()) == 40
    encoded = encode(records, load_tokenizer(models / "zephyr"), 1, Limits(128, 64))
    assert len(encoded) == 40


def test_unpaired_replies_without_a_bad_one_are_demonstrations_alone(jsonl, models):
    rows = [
        {"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "b", "label": 0},
        {"prompt": "q", "completion": "c", "label": 1}, {"prompt": "r", "completion": "d", "label": False},
    ]  # fmt: skip
    records, account = load(jsonl(rows))
    assert [(r.prompt, r.chosen, r.rejected, r.id) for r in records] == [("p", "a", "b", 0), ("q", "c", None, 2)]
    assert account.dropped == {"labelled bad, and no good reply to pair it with": 1}
    tokenizer = load_tokenizer(models / "zephyr")
    assert len(encode(records, tokenizer, 1, Limits(64, 16))) == 2
    pairs = encode(records, tokenizer, 2, Limits(64, 16))
    assert len(pairs) == 1 and pairs.counts["dropped: no 'rejected' reply"] == 1
    with pytest.raises(InputError, match=r"unpaired: prompt/completion/label.*no 'rejected' reply"):
        encode(records[1:], tokenizer, 2, Limits(64, 16))


def test_labelled_replies_stay_single_where_they_are_asked_for(cases, models):
    records, account = load(str(cases / "unpaired_kto/kto.jsonl"), reading=Reading(labelled=True))
    assert (account.read, account.kept, account.notes) == (80, 80, {})
    assert [record.label for record in records] == [True, False] * 40
    assert all(record.rejected is None for record in records)
    encoded = encode(labelled(records), load_tokenizer(models / "zephyr"), 1, Limits(128, 64))
    assert encoded.replies == 1 and encoded.label.tolist() == [1, 0] * 40


def test_pairs_are_labelled_replies_too_and_others_are_refused(cases, jsonl, models):
    row = {"prompt": [{"role": "user", "content": "p <|im_end|>"}], "chosen": "a <|im_end|>", "rejected": "b"}
    (pair,), _ = load(jsonl([row]), tokenizer=load_tokenizer(models / "qwen_base"))
    single = labelled([pair, pair])
    assert [(r.id, r.label, r.chosen) for r in single[:2]] == [(0, True, pair.chosen), (1, False, pair.rejected)]
    assert [r.marked for r in single[:2]] == [pair.marked[:2], (pair.marked[0], pair.marked[2])]
    assert [r.id for r in single] == [0, 1, 2, 3]
    (alone,), _ = load(jsonl([{"prompt": "p", "completion": "a"}]))
    with pytest.raises(InputError, match=r"^record 0 of split 'train' \(completion: .*\) has no label and no pair"):
        labelled([alone])


def test_a_label_that_is_neither_true_nor_false(jsonl, fails):
    rows = [{"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "b", "label": 3}]
    fails(jsonl(rows), "line 2", "'label' is 3")


@pytest.mark.parametrize("name", ["pku", "helpsteer", "nectar", "shp"])
def test_published_forms_of_other_reply_columns(cases, name):
    """The better reply of each row is chosen, wherever it stands."""
    records, account = load(str(cases / f"other_reply_columns/{name}.jsonl"))
    assert len(records) == 40 and account.kept == 40
    for record in records:
        assert "Name " in record.prompt and record.prompt.endswith("\n\nAssistant:")
        assert {record.chosen[:2], record.rejected[:2]} == {" A", " S"}


@pytest.mark.parametrize(
    ("row", "first"),
    [
        ({"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 0}, True),
        ({"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 1}, False),
        ({"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": -1}, True),
        ({"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": 3}, False),
        ({"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 1}, True),
        ({"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 0}, False),
        ({"instruction": "p", "input": "", "output_1": "x", "output_2": "y", "preference": 1}, True),
        ({"instruction": "p", "output_1": "x", "output_2": "y", "preference": 2}, False),
        ({"prompt": "p", "answers": [{"answer": "y", "rank": 3.0}, {"answer": "x", "rank": 1}]}, True),
        (
            {
                "instruction": "p",
                "completions": [{"response": "x", "overall_score": 8}, {"response": "y", "overall_score": 2}],
            },
            True,
        ),
    ],
)
def test_which_reply_is_the_better(jsonl, row, first):
    (record,), _ = load(jsonl([row]))
    assert record.prompt == HUMAN.format("p")
    assert (record.chosen, record.rejected) == ((" x", " y") if first else (" y", " x"))


def test_ties_are_dropped_and_counted(jsonl):
    rows = [{"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": n} for n in (0, 2)]
    records, account = load(jsonl(rows))
    assert len(records) == 1 and records[0].margin == 2 and account.dropped == {"tie": 1}


def test_replies_in_the_middle_of_a_ranking_are_told(jsonl):
    answers = [{"answer": str(n), "rank": n} for n in (2, 1, 4, 3)]
    (record,), account = load(jsonl([{"prompt": "p", "answers": answers}]))
    assert (record.chosen, record.rejected) == (" 1", " 4")
    assert account.notes == {"replies between the best and the worst, unread": 2}


@pytest.mark.parametrize(
    ("ranked", "pairs", "left"),
    [
        ("best_worst", [("1", "4")], 2),
        ("adjacent", [("2", "4"), ("1", "3")], 1),
        ("all", [("2", "4"), ("3", "4"), ("1", "4"), ("1", "2"), ("1", "3")], 1),
    ],
)
def test_ranked_replies_become_the_pairs_that_are_asked_for(jsonl, ranked, pairs, left):
    """Two replies share the second rank: of them no pair is made."""
    answers = [{"answer": str(n), "rank": rank} for n, rank in ((2, 2), (1, 1), (4, 4), (3, 2))]
    rows = [{"prompt": "p", "answers": answers}, {"prompt": "q", "answers": answers[:2]}]
    records, account = load(jsonl(rows), reading=Reading(ranked=ranked))
    made = [(record.chosen.strip(), record.rejected.strip()) for record in records[:-1]]
    assert sorted(made) == sorted(pairs)
    assert (records[-1].prompt, records[-1].chosen, records[-1].rejected) == (HUMAN.format("q"), " 1", " 2")
    assert [record.id for record in records] == list(range(len(pairs) + 1))
    assert (account.read, account.kept, sum(account.notes.values())) == (2, len(pairs) + 1, left)


def test_a_ranking_of_equals_is_a_tie(jsonl, fails):
    answers = [{"answer": str(n), "rank": 1} for n in range(3)]
    fails(jsonl([{"prompt": "p", "answers": answers}]), "tie", reading=Reading(ranked="all"))


@pytest.mark.parametrize(
    ("choice", "first"), [(0, True), ("b", False), ("Model_A", True), ("response_b", False), ("first", True)]
)
def test_two_replies_and_a_choice_by_a_column_map(jsonl, choice, first):
    columns = {"prompt": "ask", "first": "response_a", "second": "response_b", "choice": "winner"}
    row = {"ask": "p", "response_a": "x", "response_b": "y", "winner": choice}
    (record,), account = load(jsonl([row]), reading=Reading(columns=columns))
    assert (record.chosen, record.rejected) == ((" x", " y") if first else (" y", " x"))
    assert account.columns["winner (as choice)"] == "which is chosen"


def test_a_choice_below_and_above_zero_is_a_strength(jsonl):
    rows = [{"prompt": "p", "a": "x", "b": "y", "best": n} for n in (-2, 1, 0)]
    records, account = load(jsonl(rows), reading=Reading(columns={"first": "a", "second": "b", "choice": "best"}))
    assert [(record.chosen, record.margin) for record in records] == [(" x", 2), (" y", 1)]
    assert account.dropped == {"tie": 1}


def test_a_choice_of_one_or_two_is_told_by_all_rows(jsonl):
    rows = [{"prompt": "p", "a": "x", "b": "y", "best": n} for n in (1, 2, 2)]
    records, _ = load(jsonl(rows), reading=Reading(columns={"first": "a", "second": "b", "choice": "best"}))
    assert [record.chosen for record in records] == [" x", " y", " y"]


# Prompts within replies -----------------------------------------------------------------------------------------------


def test_prompt_repeated_in_replies_is_taken_off_and_counted(cases):
    records, account = load(str(cases / "prompt_repeated_in_replies/pairs.jsonl"))
    _check_pairs(records, prompt=QUESTION.format)
    assert account.notes == {"prompts that both replies repeated, removed from them": 40}
    assert "40 prompts that both replies repeated, removed from them" in account.text()


def test_a_reply_that_happens_to_begin_as_its_prompt_is_left(jsonl):
    rows = [{"prompt": "Once", "chosen": "Once upon a time", "rejected": "Once or twice"}]
    rows += [{"prompt": f"Say {n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    records, account = load(jsonl(rows))
    assert records[0].chosen == "Once upon a time" and account.notes == {}


def test_prompt_repeated_beside_a_system_text_and_in_demonstrations(jsonl):
    rows = [{"system": "s", "prompt": "q?", "chosen": "q? yes", "rejected": "q? no"}]
    assert load(jsonl(rows))[0][0].chosen == " yes"
    assert load(jsonl([{"prompt": "q?", "completion": "q? yes"}]))[0][0].chosen == " yes"


@pytest.mark.parametrize("prompt", ["q", "\n\nHuman: q\n\nAssistant:", [{"role": "user", "content": "q"}]])
def test_prompt_beside_replies_that_are_whole_dialogues(jsonl, prompt):
    sides = {name: f"\n\nHuman: q\n\nAssistant: {name}" for name in ("chosen", "rejected")}
    (record,), _ = load(jsonl([{"prompt": prompt} | sides]))
    assert (record.prompt, record.chosen, record.rejected) == (HUMAN.format("q"), " chosen", " rejected")


def test_implicit_prompt_is_read_where_asked_for_and_offered_otherwise(cases, fails):
    path = cases / "implicit_prompt/implicit.jsonl"
    fails(path, "implicit.jsonl, line 1", "'chosen'", "data.common_prompt=True", "data.columns.prompt")
    records, account = load(str(path), reading=Reading(common_prompt=True))
    _check_pairs(records, prompt=QUESTION.format)
    assert account.notes == {"prompts taken from the replies' common beginning": 40}


@pytest.mark.parametrize(
    ("one", "other", "prompt"),
    [
        ("Q: why?\nA: Because of rain.", "Q: why?\nA: Because I say so.", "Q: why?\nA:"),
        ("Tell me. Yesterday it rained", "Tell me. Yes", "Tell me."),
        ("Tell me. No", "Tell me. No, never", "Tell me."),
    ],
)
def test_a_common_beginning_ends_at_a_turn_or_a_word(jsonl, one, other, prompt):
    (record,), _ = load(jsonl([{"chosen": one, "rejected": other}]), reading=Reading(common_prompt=True))
    assert record.prompt == prompt and record.prompt + record.chosen == one


def test_a_reply_that_is_null_in_every_row_is_told(jsonl, fails):
    fails(jsonl([{"chosen": None, "rejected": "no"}]), "a.jsonl, line 1", "without a prompt column")


def test_replies_with_nothing_in_common_are_dropped(jsonl):
    rows = [{"chosen": "abc", "rejected": "xyz"}, {"chosen": "a b c", "rejected": "a b d"}]
    records, account = load(jsonl(rows), reading=Reading(common_prompt=True))
    assert len(records) == 1 and account.dropped == {"no beginning in common": 1}


# Margins, odd rows ----------------------------------------------------------------------------------------------------


def test_margins_are_rating_differences_and_numbers_written_as_text(cases):
    assert {record.margin for record in load(str(cases / "margins/margin_text.jsonl"))[0]} == {2.5}
    records, account = load(str(cases / "margins/ratings.jsonl"))
    assert {record.margin for record in records} == {3.0}
    assert account.columns["chosen_rating"] == "margin (minus the other rating)"


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_avg_rating", "rejected_avg_rating"),
        ("rewardChosen", "rewardRejected"),
    ],
)
def test_margins_by_any_name_of_the_ratings(jsonl, better, worse):
    (record,), _ = load(jsonl([{"prompt": "p", better: 4, worse: "1.5"} | PAIR]))
    assert record.margin == 2.5


def test_margins_that_are_asked_for_and_missing_are_an_error(jsonl, models):
    tokenizer = load_tokenizer(models / "zephyr")
    rows = [{"prompt": "p", "score_chosen": 2, "score_rejected": n} | PAIR for n in (1, None)]
    encoded = encode(load(jsonl(rows))[0], tokenizer, 2, Limits(64, 16))
    with pytest.raises(InputError, match=r"stages\.reward\.margin: 1 of 2 pairs have no margin"):
        check_margins(encoded, "stages.reward.margin")
    check_margins(encode(load(jsonl(rows[:1]))[0], tokenizer, 2, Limits(64, 16)), "stages.reward.margin")


def test_a_margin_that_is_no_number_is_an_error_with_its_line(jsonl, fails):
    rows = [{"prompt": "p", "margin": 1.0} | PAIR, {"prompt": "p", "margin": "much"} | PAIR]
    fails(jsonl(rows), "line 2", "'margin'", "'much'", "expected a number")


def test_odd_first_row_is_dropped_and_counted(cases):
    records, account = load(str(cases / "odd_first_row/missing_col_first.jsonl"))
    assert len(records) == 39 and records[0].id == 1 and sum(account.dropped.values()) == 1
    assert account.first_dropped == {
        "no 'rejected' (missing or null, expected text)": "missing_col_first.jsonl, line 1"
    }


def test_nan_is_null(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "p", "chosen": "a", "rejected": NaN}\n' + json.dumps({"prompt": "p"} | PAIR)
    )
    records, account = load(str(tmp_path / "a.jsonl"))
    assert len(records) == 1 and account.dropped == {"no 'rejected' (missing or null, expected text)": 1}


@pytest.mark.parametrize("place", [0, 1, 7])
def test_a_column_that_only_some_rows_have_decides_too(jsonl, fails, place):
    rows = [{"prompt": f"p{n}"} | PAIR for n in range(8)]
    rows[place] = rows[place] | {"system_prompt": "Be kind."}
    fails(jsonl(rows), f"line {place + 1}", "'system_prompt'", "data.columns.ROLE='system_prompt'", "data.ignore")


# Columns that would vanish --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        "system_prompt", "functions", "context", "response_2", "reference_answer", "human_rating", "preferenceLabel",
        "chosen_summary", "conversation_history", "is_better", "helpfulness", "desirable", "images",
    ],
)  # fmt: skip
def test_unread_columns_that_look_meaningful_are_errors(jsonl, fails, column):
    fails(jsonl([{"prompt": "p", column: "x"} | PAIR]), "line 1", repr(column), "data.columns.ROLE", "data.ignore")
    records, account = load(jsonl([{"prompt": "p", column: "x"} | PAIR]), reading=Reading(ignore=(column,)))
    assert len(records) == 1 and account.columns[column] == "ignored (data.ignore)"


@pytest.mark.parametrize(
    "column",
    [
        "id",
        "prompt_id",
        "source",
        "chosen_model",
        "rejected-policy",
        "category",
        "num_responses",
        "response_sha256",
        "url",
    ],
)
def test_columns_about_the_data_are_told_as_unread(jsonl, column):
    _, account = load(jsonl([{"prompt": "p", column: "x"} | PAIR]))
    assert account.columns[column] == "unread"


def test_a_meaningful_name_that_says_nothing_is_no_error(jsonl):
    _, account = load(jsonl([{"prompt": "p", "system": None, "tools": [], "rating": ""} | PAIR]))
    assert account.columns["rating"] == "empty" and account.columns["tools"] == "empty"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "a"},
        {"prompt": "p", "better": "x", "worse": "y"},
        {"prompt": "p", "candidates": ["x", "y"], "ranking": [0, 1]},
        {"question": "p", "answer_0": "x", "answer_1": "y", "score_0": 1, "score_1": -1},
    ],
)
def test_unmapped_replies_are_never_prompts_alone(jsonl, fails, row):
    message = fails(jsonl([row]), "line 1", "data.columns.ROLE=")
    assert all(repr(name) in message for name in row if name not in ("prompt", "question"))


REPLIES = [f"It is a long way to {place}, and uphill." for place in ("Rome", "Oslo", "Lima", "Bern")]


@pytest.mark.parametrize(
    "columns",
    [
        {"y_w": str, "y_l": str.upper},
        {"A": str, "B": str.upper},
        {"pos": lambda text: [text], "neg": lambda text: [text.upper()]},
        {"turn": lambda text: {"role": "assistant", "content": text}},
        {"nach": lambda text: "罗马在意大利的中部，" + text[20:24]},
    ],
    ids=["the literature's names", "letters", "lists", "messages", "no spaces"],
)
def test_texts_under_any_name_are_never_left_beside_prompts_alone(jsonl, fails, columns):
    rows = [
        {"prompt": f"p{n}"} | {name: made(text) for name, made in columns.items()} for n, text in enumerate(REPLIES)
    ]
    message = fails(jsonl(rows), "line 1", "data.columns.ROLE=", "data.ignore=")
    assert all(repr(name) in message for name in columns)
    records, _ = load(jsonl(rows), reading=Reading(ignore=tuple(columns)))
    assert [record.prompt for record in records] == ["p0", "p1", "p2", "p3"]


def test_what_is_said_about_prompts_alone_is_left(jsonl):
    about = {
        "topic": "geography of the old world",  # the same in most rows
        "uuid": lambda n: f"b0-{n}",
        "link": lambda n: f"https://example.org/{n}",
        "seen": lambda n: f"2024-01-0{n} 10:00",
        "source": lambda n: f"the book of roads, page {n}",
        "difficulty": lambda n: n,
        "note": lambda n: "a long text in one row alone" if n == 1 else None,
    }
    rows = [
        {"prompt": f"p{n}"} | {name: made(n) if callable(made) else made for name, made in about.items()}
        for n in range(4)
    ]
    records, account = load(jsonl(rows))
    assert len(records) == 4 and {account.columns[name] for name in about} == {"unread"}


def test_a_column_map_reads_any_names(jsonl):
    row = {"ask": "p", "good": "x", "bad": "y", "persona": "s", "gap": 2, "prompt": "not this"}
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", "system": "persona", "margin": "gap"}
    (record,), account = load(jsonl([row]), reading=Reading(columns=columns))
    assert (record.prompt, record.chosen, record.rejected, record.margin) == (f"s{HUMAN.format('p')}", " x", " y", 2)
    assert account.columns["ask (as prompt)"] == "prompt"
    assert account.columns["prompt"] == "unread, since data.columns names 'ask' in its place"


def test_a_column_map_of_whole_conversations(jsonl, fails):
    row = {"dialog_turns": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    fails(jsonl([row]), "line 1", "unrecognised columns dialog_turns", "data.columns.ROLE")
    (record,), _ = load(jsonl([row]), reading=Reading(columns={"messages": "dialog_turns"}))
    assert (record.prompt, record.chosen) == (HUMAN.format("q"), " a")


def test_a_column_map_with_wrong_names(jsonl, fails):
    fails(
        jsonl([{"prompt": "p"}]),
        "data.columns.prompt: 'ask' is no column of a.jsonl",
        "expected one of prompt",
        reading=Reading(columns={"prompt": "ask"}),
    )
    with pytest.raises(InputError, match="unknown role 'promt'"):
        Reading(columns={"promt": "ask"})
    with pytest.raises(InputError, match="twice"):
        Reading(columns={"prompt": "ask", "chosen": "ask"})
    with pytest.raises(InputError, match=r"data\.template: 'chatmll': neither a file nor"):
        Reading(template="chatmll")


def test_rows_of_another_form_within_a_file_are_told_with_their_line(jsonl, fails):
    rows = [{"prompt": "p"} | PAIR, {"prompt": "p", "chosen": ["a", "b"], "rejected": "x"}]
    fails(jsonl(rows), "line 2", "'chosen")
