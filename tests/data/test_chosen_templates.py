"""Templates, ends of turns and texts that the settings name enter; how records are shown by them is checked, beside
`transformers` with the same template."""

import pytest

from mpo_jax.data import template
from mpo_jax.data.encode import Limits, encode
from mpo_jax.data.reading import Reading
from mpo_jax.data.sources import load
from mpo_jax.data.templates import BUILT_IN
from mpo_jax.data.tokenizer import fingerprint, load_tokenizer, stop_ids
from mpo_jax.errors import InputError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What floats?"},
    {"role": "assistant", "content": "A leaf."},
]
PAIR = {"prompt": "What floats?", "chosen": "A leaf.", "rejected": "A stone."}


@pytest.fixture(scope="module")
def tokenizers(models):
    return {name: load_tokenizer(models / name) for name in ("qwen_base", "llama3", "zephyr")}


def shown(tokenizer, name: str, row, jsonl, end: str = ""):
    """The one record of a row, with the tokenizer that shows it."""
    dressed = template.dressed(tokenizer, name, end)
    (record,), _ = load(jsonl([row]), tokenizer=dressed, reading=Reading(template=name))
    return record, dressed


@pytest.mark.parametrize("family", ["qwen_base", "llama3", "zephyr"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_shows_what_transformers_shows_with_it(tokenizers, jsonl, name, family):
    record, _ = shown(tokenizers[family], name, {"messages": TURNS}, jsonl)
    whole = tokenizers[family].apply_chat_template(TURNS, chat_template=BUILT_IN[name], tokenize=False)
    said = record.prompt + record.chosen
    assert whole.startswith(said) and record.chosen.startswith("A leaf.") and record.templated
    assert record.prompt.index("Be brief.") < record.prompt.index("What floats?")


@pytest.mark.parametrize(("family", "name"), [("qwen_base", "chatml"), ("zephyr", "zephyr"), ("llama3", "llama3")])
def test_a_model_s_own_template_is_the_built_in_one_of_its_name(tokenizers, jsonl, family, name):
    turns = [turn for turn in TURNS if turn["role"] != "system"]
    one, dressed = shown(tokenizers[family], name, {"messages": turns}, jsonl)
    own, _ = shown(tokenizers[family], "auto", {"messages": turns}, jsonl)
    assert (one.prompt, one.chosen) == (own.prompt, own.chosen)
    limits = Limits(128, 32)
    rows = [encode([record], tokenizer, 1, limits).row(0) for record, tokenizer in
            ((one, dressed), (own, tokenizers[family]))]  # fmt: skip
    assert [piece.tolist() for piece in rows[0]] == [piece.tolist() for piece in rows[1]]


def test_a_text_and_a_file_are_templates_and_plain_prompts_are_a_user_s_turn(tokenizers, jsonl, tmp_path):
    text = (
        "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
    )
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    for name in (text, str(file)):
        record, _ = shown(tokenizers["zephyr"], name, PAIR, jsonl)
        assert record.prompt == "(user) What floats?\n> "
        assert (record.chosen.strip(), record.rejected.strip()) == ("A leaf.", "A stone.")


def test_the_tokenizer_itself_is_left_as_it_is(tokenizers):
    own = tokenizers["zephyr"].chat_template
    dressed = template.dressed(tokenizers["zephyr"], "chatml")
    assert tokenizers["zephyr"].chat_template == own != dressed.chat_template
    assert template.dressed(tokenizers["zephyr"], "chat") is tokenizers["zephyr"]
    assert len({fingerprint(each) for each in (tokenizers["zephyr"], dressed)}) == 2


def test_the_token_that_is_named_ends_a_reply_in_data_and_in_samples(tokenizers, jsonl):
    own = tokenizers["llama3"]
    record, dressed = shown(own, "auto", {"messages": TURNS[1:]}, jsonl, end="<|end_of_text|>")
    asked, written = own.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert encode([record], own, 1, Limits(128, 32)).row(0)[1][-1] == written
    reply = encode([record], dressed, 1, Limits(128, 32)).row(0)[1]
    assert reply[-1] == asked and written not in reply
    assert asked in stop_ids(dressed) and fingerprint(dressed) != fingerprint(own)


@pytest.mark.parametrize(
    ("name", "end", "told"),
    [
        ("chatmll", "", "data.template: 'chatmll': neither a file nor a template; did you mean 'chatml'?"),
        ("{% for %}", "", "data.template: line 1: no Jinja template"),
        ("auto", "<|nothing|>", "data.end_of_turn: '<|nothing|>' is no token of the model's tokenizer"),
    ],
)
def test_what_is_told_of_a_template(tokenizers, name, end, told):
    with pytest.raises(InputError) as caught:
        template.dressed(tokenizers["zephyr"], name, end)
    assert str(caught.value).startswith(told)


# Constants ------------------------------------------------------------------------------------------------------------


def test_a_system_text_that_all_rows_have_is_a_turn_and_told(tokenizers, jsonl):
    path = jsonl([PAIR])
    reading = Reading(constants={"system": "Be brief."})
    (record,), account = load(path, tokenizer=tokenizers["qwen_base"], reading=reading)
    own = jsonl([PAIR | {"system": "Be brief."}], "own.jsonl")
    (expected,), _ = load(own, tokenizer=tokenizers["qwen_base"])
    assert record == expected and "Be brief." in record.prompt
    assert account.columns["system (constant)"] == "system turn"
    (record,), account = load(own, tokenizer=tokenizers["qwen_base"], reading=Reading(constants={"system": "Other."}))
    assert "Other." in record.prompt and "Be brief." not in record.prompt
    assert account.columns["system"] == "unread, since data.constants has a text for it"


def test_a_prompt_that_all_rows_have(jsonl):
    rows = [{"completion": "Tom ran."}, {"completion": "Lily sat."}]
    records, _ = load(jsonl(rows), reading=Reading(constants={"prompt": "Tell a story."}))
    assert [(record.prompt, record.chosen) for record in records] == [
        ("Tell a story.", "Tom ran."), ("Tell a story.", "Lily sat.")
    ]  # fmt: skip


def test_a_text_and_a_column_for_one_role_are_refused():
    with pytest.raises(InputError, match=r"^data\.constants\.system: data\.columns\.system names a column too"):
        Reading(constants={"system": "a"}, columns={"system": "b"})
