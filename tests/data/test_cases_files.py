"""Files and folders as users bring them enter; that they are read as they mean, or refused by name, is checked."""

import csv
import gzip
import io
import json
import os

import pyarrow
import pytest

from mpo_jax import artifacts
from mpo_jax.data import division, sources
from mpo_jax.data.records import TextRecord
from mpo_jax.data.shares import Division, names, read_share, share_of
from mpo_jax.data.sources import load
from mpo_jax.errors import InputError
from mpo_jax.lines import split_lines

ROWS = [{"prompt": f"p{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(4)]
SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def table(rows, **how) -> bytes:
    """Rows as the standard library writes CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **({"lineterminator": "\n"} | how))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _texts(records):
    return [(record.prompt, record.chosen, record.rejected) for record in records]


EXPECTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]


# Bytes and wrappers ---------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_and_a_wrapper_are_read(cases):
    for name in ("bom_array.json", "wrapped.json"):
        records, _ = load(str(cases / "bytes_and_wrappers" / name))
        assert len(records) == 40 and records[3].prompt == "Name 3 things that float on a pond."


def test_a_git_lfs_pointer_and_utf16_are_named(cases, fails):
    fails(cases / "bytes_and_wrappers/lfs.jsonl", "lfs.jsonl", "Git LFS pointer", "git lfs pull")
    fails(cases / "bytes_and_wrappers/utf16.jsonl", "utf16.jsonl", "UTF-16", "UTF-8")


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
READ = {
    "bom lines": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "bom lines, zipped": ("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + LINES.encode())),
    "zipped without its suffix": ("a.jsonl", gzip.compress(LINES.encode())),
    "zstd": ("a.jsonl.zst", zstd(LINES.encode())),
    "zstd without its suffix": ("a.jsonl", zstd(LINES.encode())),
    "zstd of several frames": ("a.jsonl.zst", zstd(LINES[:40].encode()) + zstd(LINES[40:].encode())),
    "an array in zstd": ("a.json.zst", zstd(json.dumps(ROWS).encode())),
    "csv": ("a.csv", table(ROWS)),
    "csv, bom and line breaks of Windows": ("a.csv", b"\xef\xbb\xbf" + table(ROWS, lineterminator="\r\n")),
    "csv, all quoted, zipped": ("a.csv.gz", gzip.compress(table(ROWS, quoting=csv.QUOTE_ALL))),
    "tsv": ("a.tsv", table(ROWS, delimiter="\t")),
    "tsv, zstd": ("a.tsv.zst", zstd(table(ROWS, delimiter="\t"))),
    "an array in a .jsonl": ("a.jsonl", json.dumps(ROWS).encode()),
    "an array over several lines in a .jsonl": ("a.jsonl", json.dumps(ROWS, indent=2).encode()),
    "lines in a .json": ("a.json", LINES.encode()),
    "line breaks of Windows": ("a.jsonl", LINES.replace("\n", "\r\n").encode()),
    "blank lines": ("a.jsonl", ("\n" + LINES.replace("\n", "\n\n")).encode()),
    "no line break at the end": ("a.jsonl", LINES.rstrip().encode()),
    "wrapped in one line": ("a.json", json.dumps({"version": 1, "data": ROWS}).encode()),
    "wrapped with words about it": ("a.json", json.dumps({"meta": {"by": "me"}, "data": ROWS}, indent=1).encode()),
    "wrapped as rows, bom": ("a.json", b"\xef\xbb\xbf" + json.dumps({"rows": ROWS}).encode()),
}


@pytest.mark.parametrize("kind", READ)
def test_files_that_are_read_by_their_content(tmp_path, kind):
    name, content = READ[kind]
    (tmp_path / name).write_bytes(content)
    assert _texts(load(str(tmp_path / name))[0]) == EXPECTED


def test_a_table_s_texts_have_line_breaks_and_its_empty_cells_say_nothing(tmp_path):
    rows = [
        {"prompt": 'Say "hi",\nplease.', "chosen": "hi\n\nhi", "rejected": SEPARATORS, "margin": "2.5"},
        {"prompt": "p", "chosen": "", "rejected": "b", "margin": ""},
        {"prompt": "é" * 200_000, "chosen": "a", "rejected": "b", "margin": ""},
    ]
    (tmp_path / "a.csv").write_bytes(table(rows, quoting=csv.QUOTE_ALL))
    records, account = load(str(tmp_path / "a.csv"))
    assert _texts(records) == [(row["prompt"], row["chosen"], row["rejected"]) for row in (rows[0], rows[2])]
    assert [record.margin for record in records] == [2.5, None]
    assert account.first_dropped == {"no 'chosen' (missing or null, expected text)": "a.csv, line 6"}


def test_a_table_s_labels_and_choices_are_read(tmp_path):
    rows = [{"prompt": "p", "completion": "a", "label": "True"}, {"prompt": "p", "completion": "b", "label": "false"}]
    (tmp_path / "a.csv").write_bytes(table(rows))
    (record,), account = load(str(tmp_path / "a.csv"))
    assert (record.chosen, record.rejected, account.schema) == ("a", "b", "unpaired")
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": "1"}
    (tmp_path / "b.tsv").write_bytes(table([row], delimiter="\t"))
    (record,), _ = load(str(tmp_path / "b.tsv"))
    assert (record.chosen.strip(), record.rejected.strip()) == ("b", "a")


def test_one_object_over_several_lines_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=1))
    assert _texts(load(str(tmp_path / "a.json"))[0]) == EXPECTED[:1]


REFUSED = {
    "lfs parquet": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "lfs in a .gz": ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "utf-16 without a mark": ("a.jsonl", LINES.encode("utf-16-le"), "UTF-16"),
    "utf-16, other order": ("a.jsonl", LINES.encode("utf-16-be"), "UTF-16"),
    "utf-16 array": ("a.json", json.dumps(ROWS).encode("utf-16"), "UTF-16"),
    "utf-32": ("a.jsonl", LINES.encode("utf-32"), "UTF-"),
    "utf-16, zipped": ("a.jsonl.gz", gzip.compress(LINES.encode("utf-16")), "UTF-16"),
    "latin-1": ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), "line 1: not UTF-8"),
    "a web page": ("a.json", b"<!DOCTYPE html><html></html>", "HTML"),
    "a zip": ("a.jsonl", b"PK\x03\x04 etc", "zip archive"),
    "not zipped": ("a.jsonl.gz", LINES.encode(), "gzip"),
    "not zstd": ("a.jsonl.zst", LINES.encode(), "no zstd file"),
    "zstd, cut": ("a.jsonl.zst", zstd(LINES.encode() * 50)[:-60], "damaged or truncated zstd"),
    "csv, a field more": ("a.csv", table(ROWS) + b"p,a,b,c\n", "a.csv, line 6: 4 fields; expected 3: prompt"),
    "csv, a quote that is not closed": ("a.csv", table(ROWS) + b'p,a,"b\n', "a.csv, line 6: no CSV row"),
    "csv, a column twice": ("a.csv", b"prompt,prompt\na,b\n", "line 1: columns 'prompt', 'prompt'; expected"),
    "csv, not utf-8": ("a.csv", table(ROWS) + b"p,\xff,b\n", "line 6: not UTF-8"),
    "csv without a row": ("a.csv", b"prompt,chosen,rejected\n", "is empty"),
    "parquet by another name": ("a.jsonl", b"PAR1" + bytes(20), ".parquet"),
    "columns": ("a.json", json.dumps({"prompt": ["p", "q"], "chosen": ["a", "b"]}).encode(), "orient='records'"),
    "columns of pandas": ("a.json", b'{"prompt": {"0": "p", "1": "q"}, "id": {"0": 1, "1": 2}}', "orient='records'"),
    "several sets": ("a.json", json.dumps({"train": ROWS, "test": ROWS}).encode(), "expected one file for each"),
    "an array of lists": ("a.json", b"[[1, 2], [3, 4]]", "record 1: expected a JSON object, found list"),
    "a number": ("a.jsonl", b"12\n", "line 1: expected a JSON object, found int"),
    "nested for ever": ("a.jsonl", b'{"prompt": ' + b"[" * 200_000 + b"\n{}\n", "line 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_refused_by_name(tmp_path, fails, kind):
    name, content, words = REFUSED[kind]
    (tmp_path / name).write_bytes(content)
    fails(tmp_path / name, name, words)


def test_a_broken_first_line_is_named_though_the_rest_is_good(tmp_path, fails):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", \n' + LINES)
    fails(tmp_path / "a.jsonl", "a.jsonl, line 1: invalid JSON")


def test_metadata_beside_data_is_no_data(cases):
    for name in ("hubfolder", "lffolder"):
        records, _ = load(str(cases / "metadata_beside_data" / name))
        assert len(records) == 40


@pytest.mark.parametrize(
    "name", ["dataset_info.json", "config.json", ".cache/x.jsonl", "__pycache__/y.json", ".hidden.jsonl"]
)
def test_hidden_files_and_metadata_are_no_data(jsonl, tmp_path, name):
    jsonl(ROWS, "folder/data.jsonl")
    jsonl([{"features": 1}], f"folder/{name}")
    assert _texts(load(str(tmp_path / "folder"))[0]) == EXPECTED


# Pipes, devices, what the system refuses ------------------------------------------------------------------------------


def test_pipes_and_devices_are_refused(tmp_path, fails):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    fails(pipe, "pipe.jsonl", "a pipe or device")
    fails("/dev/zero", "/dev/zero", "a pipe or device")
    fails(tmp_path, "pipe.jsonl", "a pipe or device")
    for path in (pipe, "/dev/zero", tmp_path):
        with pytest.raises(InputError, match="a pipe or device"):
            sources.fingerprint(str(path))


def test_what_the_system_refuses_is_one_line(tmp_path, fails, monkeypatch):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    fails(tmp_path / "loop.jsonl", "loop.jsonl")
    fails(tmp_path / ("x" * 300 + ".jsonl"), ".jsonl")
    fails("a\0b.jsonl", "jsonl")
    (tmp_path / "a.jsonl").write_text(LINES)

    def refused(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mpo_jax.data.files._head", refused)
    fails(tmp_path / "a.jsonl", "a.jsonl", "cannot be read", "Permission denied")


# Line separators ------------------------------------------------------------------------------------------------------


def test_line_separators_within_texts_are_text(cases, jsonl):
    records, _ = load(str(cases / "line_separators/pairs.jsonl"))
    assert len(records) == 160 and records[0].prompt == "Once upon a time, there was a \u2028little girl named Lily."
    (record,), _ = load(jsonl([{"prompt": SEPARATORS, "completion": SEPARATORS}]))
    assert record.prompt == record.chosen == SEPARATORS


def test_lines_end_at_line_feeds_alone():
    assert split_lines(f"{SEPARATORS}\n\nx\n") == [SEPARATORS, "", "x"]
    assert split_lines("") == [] and split_lines("x") == ["x"]


def test_every_reader_of_our_own_lines_keeps_separators(tmp_path):
    from mpo_jax import metrics
    from mpo_jax.evaluation import judge

    line = {"prompt": "p", "replies": {"a": SEPARATORS, "b": "x"}}
    (tmp_path / "replies.jsonl").write_text(json.dumps(line, ensure_ascii=False).replace("\\r", "\\r") + "\n", "utf-8")
    assert judge.read_replies(tmp_path / "replies.jsonl") == [line]
    (tmp_path / artifacts.METRICS).write_text(
        json.dumps({"step": 1, "text": SEPARATORS}, ensure_ascii=False) + "\n", "utf-8"
    )
    assert metrics.read(tmp_path) == [{"step": 1, "text": SEPARATORS}]


def test_no_reader_of_json_lines_splits_elsewhere():
    """`splitlines` stands only where text is no JSON: the plan reads the compiler's."""
    from tests.test_layers import FILES

    found = {path.name for path in FILES if ".splitlines(" in path.read_text()}
    assert found <= {"hlo.py"}


# Splits ---------------------------------------------------------------------------------------------------------------


def test_splits_by_file_name(cases):
    folder = str(cases / "split_by_file_name/folder")
    assert len(load(folder, "train")[0]) == 30 and len(load(folder, "test")[0]) == 10
    assert len(load(folder, "all")[0]) == 40


LAYOUTS = [
    ["prefs_train.jsonl", "prefs_test.jsonl"],
    ["train.jsonl", "valid.jsonl", "my-eval-set.jsonl"],
    ["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"],
    ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/extra-00000-of-00001.jsonl"],
    ["training.jsonl", "testing.jsonl"],
    ["part1.jsonl", "part2.jsonl"],
    ["trainer.jsonl", "contest.jsonl"],
    ["a_train_1.jsonl", "a_train_2.jsonl", "b.test.jsonl", "notes.jsonl"],
    ["prefs.train.jsonl", "prefs.val.jsonl"],
    ["set-2/train.jsonl", "set-2/evaluation.jsonl"],
    ["my_test_set/a.jsonl", "b.jsonl"],
]


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_splits_are_those_of_datasets(jsonl, tmp_path, names):
    """`datasets` itself is the judge of every layout."""
    import datasets

    for place, name in enumerate(names):
        jsonl([{"prompt": f"{name} {n}"} for n in range(place + 1)], f"folder/{name}")
    theirs = datasets.load_dataset("json", data_dir=str(tmp_path / "folder"), cache_dir=str(tmp_path / "cache"))
    for split, table in theirs.items():
        records, _ = load(str(tmp_path / "folder"), split)
        assert sorted(record.prompt for record in records) == sorted(table["prompt"]), split


def test_files_left_out_are_told(jsonl, tmp_path):
    jsonl(ROWS, "folder/train.jsonl")
    jsonl(ROWS, "folder/notes.jsonl")
    records, account = load(str(tmp_path / "folder"))
    assert len(records) == 4 and account.notes == {"files left out, since their names tell no split: notes.jsonl": 1}


def test_a_single_file_is_train_unless_its_whole_name_is_a_split(jsonl, fails):
    assert len(load(jsonl(ROWS, "prefs_eval.jsonl"))[0]) == 4
    fails(jsonl(ROWS, "test.jsonl"), "unknown split 'train'; it has test")
    assert len(load(jsonl(ROWS, "valid.jsonl"), "valid")[0]) == 4


# Shares ---------------------------------------------------------------------------------------------------------------


def test_splits_that_overlap_leave_the_training_side(cases):
    data = Division(str(cases / "splits_that_overlap/folder"), "train", "test")
    halves = [read_share(data, half) for half in ("select", "report")]
    heldout = [record for records, _ in halves for record in records]
    assert len(heldout) == 20 and [account.overlap for _, account in halves] == [0, 0]
    assert not {record.first_turn for record in halves[0][0]} & {record.first_turn for record in halves[1][0]}
    parts = {name: read_share(data, name) for name in ("sft_reward", "policy")}
    prompts = {record.prompt for records, _ in parts.values() for record in records}
    assert not prompts & {record.prompt for record in heldout}
    assert len(prompts) == 20 and {account.overlap for _, account in parts.values()} == {20}
    assert "20 left out, since their prompts are held out too" in parts["policy"][1].text()
    train, _ = load(data.path, "train")
    firsts = {record.first_turn for record in heldout}
    assert [share_of(record, data, firsts) for record in train].count("") == 20
    assert {share_of(record, data, firsts) for record in heldout} == {"select", "report"}


def test_splits_that_are_the_same_leave_nothing_to_train_on(jsonl, tmp_path):
    jsonl(ROWS, "folder/train.jsonl")
    jsonl(ROWS, "folder/test.jsonl")
    with pytest.raises(InputError, match="every prompt of split 'train' is in split 'test' too"):
        read_share(Division(str(tmp_path / "folder"), "train", "test"), "policy")


@pytest.mark.parametrize(("name", "prompts"), [("one", 1), ("three", 3), ("same_prompt", 1)])
def test_few_prompts_say_how_many_there_are_and_what_helps(cases, name, prompts):
    data = Division(str(cases / f"few_prompts/{name}.jsonl"))
    errors = []
    for share in names(data):
        try:
            read_share(data, share)
        except InputError as error:
            errors.append(str(error))
    assert errors
    for error in errors:
        assert f"{prompts} distinct prompt{'s' * (prompts > 1)} " in error and "data.eval_split" in error


def test_a_prefix_and_its_continuation_lie_in_one_share(shared):
    """By the texts themselves: a prompt of HH that another one begins with."""
    records, _ = load(str(shared / "data/hh_rlhf"), "test")
    shares = {record.prompt: division.share(record.first_turn) for record in records}
    prefixes = 0
    for prompt, share in shares.items():
        for end in (at for at in range(len(prompt) - 1) if prompt.startswith("\n\nHuman:", at) and at):
            shorter = prompt[:end].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:"
            prefixes += shorter in shares
            assert shares.get(shorter, share) == share
    assert prefixes > 60


def test_shares_of_prompts_without_turns_are_what_they_were(shared):
    """The quickstart's prompts: their shares and ids are hashes of the text alone."""
    record = TextRecord("Once upon a time", " there", None, 0, "train")
    assert record.prompt_key == record.first_turn == "Once upon a time"
    plain, _ = load(str(shared / "data/tldr/posts_250x18.jsonl.gz"))
    assert all(record.first_turn == record.prompt for record in plain)


def test_shares_do_not_depend_on_how_prompts_are_shown(cases, models):
    from mpo_jax.data.tokenizer import load_tokenizer

    path = str(cases / "messages_and_pair_objects/pairs.jsonl")
    shown = [
        load(path, tokenizer=tokenizer)[0]
        for tokenizer in (None, *(load_tokenizer(models / name) for name in ("qwen_base", "gemma")))
    ]
    assert len({records[0].prompt for records in shown}) == 3
    keys = [[(record.first_turn, record.prompt_key) for record in records] for records in shown]
    assert keys[0] == keys[1] == keys[2]
    ids = [division.prompt_ids([record.prompt_key for record in records]).tolist() for records in shown]
    assert ids[0] == ids[1] == ids[2] and len(set(ids[0])) == 40
