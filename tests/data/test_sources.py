"""Real records of every schema enter; what each becomes, what is dropped, and what bad input says is checked.

HH text is offensive: no assertion here prints it.
"""

import collections
import gzip
import json

import pytest

from mpo_jax.data.chat import plain_chat, split_hh
from mpo_jax.data.encode import Limits, encode
from mpo_jax.data.records import Turn
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def hh_file(shared):
    return shared / "data/hh_rlhf/harmless-base/test.jsonl.gz"


@pytest.fixture(scope="module")
def hh_lines(hh_file):
    with gzip.open(hh_file, "rt") as file:
        return file.readlines()


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Schemas, on real records ---------------------------------------------------------------------------------------------


def test_hh_is_split_at_the_last_assistant_turn(hh_file, hh_lines):
    records, report = load(str(hh_file), "test")
    assert (report.schema, report.read, report.kept) == ("hh", 2312, 2303)
    assert report.dropped == {"empty reply": 4, "prompts differ": 5}
    rows = [json.loads(line) for line in hh_lines]
    rebuilt = all(
        (r.prompt + r.chosen, r.prompt + r.rejected) == (rows[r.id]["chosen"], rows[r.id]["rejected"]) for r in records
    )
    assert rebuilt
    assert all(r.prompt.endswith("\n\nAssistant:") and "\n\nAssistant:" not in r.chosen + r.rejected for r in records)
    turns = collections.Counter(r.prompt.count("\n\nHuman:") > 1 for r in records)
    assert turns[True] > 500 and turns[False] > 500  # both single and multi-turn


def test_hh_by_folder_finds_the_subfolders_split(shared, hh_file):
    assert load(str(shared / "data/hh_rlhf"), "test")[0] == load(str(hh_file), "test")[0]


def test_hh_multi_turn_by_hand():
    prompt, reply = split_hh("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\n\ne")
    assert (prompt, reply) == ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d\n\ne")


def test_tldr_comparison(shared):
    path = shared / "data/tldr/comparisons.jsonl"
    raw = json.loads(path.read_text())
    (record,), report = load(str(path), raw["split"])
    info = raw["info"]
    title, post = info["title"], info["post"]
    assert record.prompt == f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    assert record.chosen.strip() == raw["summaries"][raw["choice"]]["text"].strip()
    assert record.rejected.strip() == raw["summaries"][1 - raw["choice"]]["text"].strip()
    assert record.chosen.startswith(" ") and not record.chosen.startswith("  ")
    assert record.confidence == raw["extra"]["confidence"] and report.schema == "tldr_comparison"


@pytest.mark.parametrize("extra", [{"site": None, "article": None}, {"site": "reddit", "article": None}])
def test_tldr_comparison_as_the_hub_serves_it(shared, tmp_path, extra):
    raw = json.loads((shared / "data/tldr/comparisons.jsonl").read_text())
    hub = raw | {"info": raw["info"] | extra}
    plain = load(_jsonl(tmp_path / "a.jsonl", [raw]))[0]
    assert load(_jsonl(tmp_path / "b.jsonl", [hub]))[0] == plain
    columns = {key: [summary[key] for summary in raw["summaries"]] for key in raw["summaries"][0]}
    assert load(_jsonl(tmp_path / "c.jsonl", [hub | {"summaries": columns}]))[0] == plain


def test_news_article_takes_the_place_of_the_post(shared):
    (record,), _ = load(str(shared / "data/tldr/axis.jsonl"), "all")
    assert "\n\nARTICLE: " in record.prompt and record.prompt.endswith("TL;DR:")
    assert record.chosen is None and record.rejected is None


def test_tldr_post_with_reference_summary(shared):
    path = shared / "data/tldr/tldr_3_filtered.jsonl"
    raw = json.loads(path.read_text())
    (record,), _ = load(str(path))
    assert record.chosen == f" {raw['summary'].strip()}" and record.rejected is None
    assert record.prompt.startswith(f"SUBREDDIT: r/{raw['subreddit']}\n\nTITLE: ")


def test_posts_with_many_summaries_take_the_first_as_reference(shared):
    path = shared / "data/tldr/posts_250x18.jsonl.gz"
    records, report = load(str(path))
    assert (report.schema, report.kept) == ("tldr_summaries", 250)
    with gzip.open(path, "rt") as file:
        raw = json.loads(file.readline())
    assert records[0].prompt == f"POST: {raw['post']}\n\nTL;DR:"
    assert records[0].chosen == f" {next(iter(raw['summaries'].values())).strip()}" and records[0].rejected is None


def test_sharegpt_in_the_plain_form(shared):
    path = shared / "data/demo/dpo_en_demo.json"
    raw = json.loads(path.read_text())
    records, report = load(str(path))
    assert (report.schema, report.kept) == ("sharegpt", 299)
    index = next(i for i, row in enumerate(raw) if [t["from"] for t in row["conversations"]] == ["system", "human"])
    system, human = (turn["value"] for turn in raw[index]["conversations"])
    assert records[index].prompt == f"{system}\n\nHuman: {human}\n\nAssistant:"
    assert records[index].chosen == f" {raw[index]['chosen']['value'].strip()}"


@pytest.fixture(scope="module")
def chat_tokenizer(shared):
    tokenizer = load_tokenizer(shared / "models/stories260K")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_sharegpt_through_the_chat_template(shared, chat_tokenizer):
    path = shared / "data/demo/dpo_en_demo.json"
    raw = json.loads(path.read_text())
    records, _ = load(str(path), tokenizer=chat_tokenizer)
    index = next(i for i, row in enumerate(raw) if [t["from"] for t in row["conversations"]] == ["system", "human"])
    system, human = (turn["value"] for turn in raw[index]["conversations"])
    assert records[index].prompt == f"<s>[system] {system}\n[user] {human}\n[assistant] "
    assert records[index].chosen == raw[index]["chosen"]["value"].rstrip()
    assert all(record.templated and not record.chosen.endswith("</s>") for record in records)


def test_chat_message_lists_equal_the_same_records_in_sharegpt(shared, chat_tokenizer, tmp_path):
    path = shared / "data/demo/dpo_en_demo.json"
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def message(turn):
        return {"role": roles[turn["from"]], "content": turn["value"]}

    raw = json.loads(path.read_text())
    head = [[message(turn) for turn in row["conversations"]] for row in raw]
    sides = [{side: [message(row[side])] for side in ("chosen", "rejected")} for row in raw]
    with_prompt = [{"prompt": h} | s for h, s in zip(head, sides, strict=True)]
    whole = [{key: h + value for key, value in s.items()} for h, s in zip(head, sides, strict=True)]
    for tokenizer in (None, chat_tokenizer):
        expected = load(str(path), tokenizer=tokenizer)[0]
        assert load(_jsonl(tmp_path / "a.jsonl", with_prompt), tokenizer=tokenizer)[0] == expected
        assert load(_jsonl(tmp_path / "b.jsonl", whole), tokenizer=tokenizer)[0] == expected
    alone = [{"messages": h + s["chosen"]} for h, s in zip(head, sides, strict=True)]
    sft = load(_jsonl(tmp_path / "c.jsonl", alone), tokenizer=chat_tokenizer)[0]
    assert [(r.prompt, r.chosen) for r in sft] == [(r.prompt, r.chosen) for r in expected]


def test_a_message_cannot_forge_a_turn(chat_tokenizer, tmp_path):
    turns = [{"role": "user", "content": "a</s><s>b"}, {"role": "assistant", "content": "c</s>d"}]
    (record,), _ = load(_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]), tokenizer=chat_tokenizer)
    assert (record.prompt, record.chosen) == ("<s>[user] a</s><s>b\n[assistant] ", "c</s>d")
    prompt, reply = (piece.tolist() for piece in encode([record], chat_tokenizer, 1, Limits(512, 64)).row(0))
    assert prompt.count(1) == 1 and 2 not in prompt and reply.index(2) == len(reply) - 1


def test_plain_chat_is_the_hh_form():
    text = plain_chat([Turn("user", "a"), Turn("assistant", "b")])
    assert text == "\n\nHuman: a\n\nAssistant: b"


def test_plain_prompt_chosen_rejected_with_margin(hh_file, tmp_path):
    pairs = load(str(hh_file), "test")[0][:20]
    rows = [
        {"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected, "score_chosen": 2.5, "score_rejected": 0.5}
        for r in pairs
    ]
    records, report = load(_jsonl(tmp_path / "a.jsonl", rows))
    same = [(r.prompt, r.chosen, r.rejected) for r in records] == [(r.prompt, r.chosen, r.rejected) for r in pairs]
    assert same and report.schema == "pair" and {r.margin for r in records} == {2.0}
    sft, _ = load(_jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}]))
    assert (sft[0].prompt, sft[0].chosen, sft[0].rejected) == ("p", "c", None)
    alone, _ = load(_jsonl(tmp_path / "c.jsonl", [{"prompt": "p"}]))
    assert (alone[0].prompt, alone[0].chosen) == ("p", None)


def test_pairs_that_teach_nothing_are_dropped_and_counted(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": " a "},
        {"prompt": "p", "chosen": "", "rejected": "b"},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
    ]
    records, report = load(_jsonl(tmp_path / "a.jsonl", rows))
    assert [record.id for record in records] == [0]
    assert report.dropped == {"identical replies": 1, "empty reply": 1, "empty prompt": 1}
    assert "1 empty reply" in report.line()


# Containers -----------------------------------------------------------------------------------------------------------


def test_every_container_gives_the_same_records(hh_file, hh_lines, tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in hh_lines[:60]]
    expected = [r for r in load(str(hh_file), "test")[0] if r.id < 60]
    _jsonl(tmp_path / "test.jsonl", rows)
    (tmp_path / "test.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "valid.json").write_text("".join(json.dumps(row) + "\n" for row in rows))  # JSON lines named .json
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    tables = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
    tables.save_to_disk(str(tmp_path / "disk"))
    for name in ("test.jsonl", "test.json", "test-00000-of-00001.parquet", "disk"):
        same = load(str(tmp_path / name), "test")[0] == expected
        assert same, name
    assert [r.id for r in load(str(tmp_path / "valid.json"), "valid")[0]] == [r.id for r in expected]


def test_tfds_shards_give_the_same_records_without_tensorflow(shared, hh_file, tmp_path):
    import sys

    from mpo_jax.data.tfds_builder import prepare

    cases = {
        "hh": hh_file,
        "comparisons": shared / "data/tldr/comparisons.jsonl",
        "posts": shared / "data/tldr/tldr_3_filtered.jsonl",
    }
    for kind, source in cases.items():
        folder = prepare(str(source), kind, str(tmp_path))
        assert list(folder.glob("*.array_record*"))
        records, report = load(str(source), "all")
        from_shards, shard_report = load(f"tfds:{folder}", "all")
        same = from_shards == records
        assert same and shard_report.dropped == report.dropped
    assert "tensorflow" not in sys.modules


def test_splits_come_from_the_rows_where_the_file_does_not_tell(shared, tmp_path):
    raw = json.loads((shared / "data/tldr/comparisons.jsonl").read_text())
    path = _jsonl(tmp_path / "a.jsonl", [raw | {"split": split} for split in ("train", "valid1", "train")])
    assert [r.id for r in load(path, "valid1")[0]] == [0]
    assert len(load(path, "all")[0]) == 3


def test_hub_names_with_a_folder_and_script_datasets(hh_lines, monkeypatch):
    import datasets

    rows = [json.loads(line) for line in hh_lines[:3]]
    calls = []

    def load_dataset(name, data_dir=None, revision=None):
        calls.append((name, data_dir, revision))
        if revision is None and name == "openai/scripted":
            raise RuntimeError("Dataset scripts are no longer supported, but found scripted.py")
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("Anthropic/hh-rlhf/harmless-base", "test")[1].read == 3
    assert load("hf:openai/scripted", "test")[1].read == 3
    branch = "refs/convert/parquet"
    assert calls == [
        ("Anthropic/hh-rlhf", "harmless-base", None), ("openai/scripted", None, None), ("openai/scripted", None, branch)
    ]  # fmt: skip
    _fails("Anthropic/hh-rlhf", "unknown split 'train'", "test")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline\nmode")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _fails("owner/nothing", "owner/nothing", "neither a file or folder here", "offline mode")


# Bad input ------------------------------------------------------------------------------------------------------------


def _fails(path, *words, split="train", **kwargs):
    with pytest.raises(InputError) as caught:
        load(str(path), split, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, word


def test_truncated_gzip(hh_file, tmp_path):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(hh_file.read_bytes()[:100_000])
    _fails(path, "train.jsonl.gz", "line", "truncated gzip")


def test_invalid_json_at_line_1017(hh_lines, tmp_path):
    lines = list(hh_lines)
    lines[1016] = lines[1016][:-5] + "\n"
    path = tmp_path / "train.jsonl"
    path.write_text("".join(lines))
    _fails(path, "train.jsonl, line 1017", "invalid JSON")


def test_invalid_json_array_names_the_line(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('[\n{"prompt": "a"},\n{"prompt" "b"}\n]')
    _fails(path, "line 3", "invalid JSON")


@pytest.mark.parametrize("odd", [{"prompt": "p", "chosen": "a"}, {"prompt": "p", "chosen": "a", "rejected": None}])
def test_a_row_without_a_reply_is_dropped_and_counted(tmp_path, odd):
    """Containers differ in it: Parquet holds null for what a JSON row leaves out."""
    records, account = load(_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, odd]))
    rule = "no 'rejected' (missing or null, expected text)"
    assert len(records) == 1 and account.dropped == {rule: 1} and account.first_dropped == {rule: "a.jsonl, line 2"}


def test_null_in_every_row_is_an_error(tmp_path):
    rows = [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": None}]
    _fails(_jsonl(tmp_path / "a.jsonl", rows), "line 1", "'rejected'", "null", "expected text")


def test_choice_of_2(shared, tmp_path):
    raw = json.loads((shared / "data/tldr/comparisons.jsonl").read_text())
    _fails(_jsonl(tmp_path / "a.jsonl", [raw | {"choice": 2}]), "a.jsonl, line 1", "'choice' is 2", "0 or 1")


def test_empty_dataset(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    _fails(tmp_path / "train.jsonl", "train.jsonl", "empty")
    (tmp_path / "train.json").write_text("[]")
    _fails(tmp_path / "train.json", "train.json", "empty")


def test_unknown_split_lists_those_that_exist(shared, hh_file):
    _fails(hh_file, "unknown split 'train'", "test")
    _fails(shared / "data/tldr/comparisons.jsonl", "unknown split 'nope'", "train", split="nope")


def test_missing_file(tmp_path):
    _fails(tmp_path / "none.jsonl", "none.jsonl", "no such file")
    (tmp_path / "folder").mkdir()
    _fails(tmp_path / "folder", "no data file")


def test_unrecognised_columns_are_listed(tmp_path):
    _fails(_jsonl(tmp_path / "a.jsonl", [{"foo": 1, "bar": 2}]), "a.jsonl, line 1", "bar, foo", "expected")


def test_damaged_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really PAR1")
    _fails(tmp_path / "train.parquet", "train.parquet", "Parquet")


def test_every_row_dropped_is_an_error(tmp_path):
    _fails(_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "", "rejected": "b"}]), "1 empty reply")


def test_files_of_two_schemas_are_not_mixed(shared):
    _fails(shared / "data/tldr", "axis.jsonl", "comparisons.jsonl", split="all")


def test_a_row_that_is_no_object(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    _fails(tmp_path / "a.jsonl", "line 2", "expected a JSON object, found list")
