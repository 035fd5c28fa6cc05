"""Texts enter, drawn by hypothesis and real ones; boundaries, BOS, EOS, masks, limits and the cache are checked."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from mpo_jax import artifacts
from mpo_jax.data.encode import Limits, cache_key, encode, encode_prompts, encode_replies, write
from mpo_jax.data.rows import tight_rows
from mpo_jax.data.schemas import TextRecord
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import check_vocabulary, conventions, load_tokenizer
from mpo_jax.errors import InputError

LIMITS = Limits(64, 16)


@pytest.fixture(scope="module")
def stories(shared):
    return load_tokenizer(shared / "models/stories260K")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """GPT-2's kind: no space in front, no BOS of its own, BOS = EOS = pad."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat. TL;DR: a cat, sitting; Assistant: yes"] * 4, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    backend.save(str(folder / "tokenizer.json"))
    names = {f"{kind}_token": "<|end|>" for kind in ("bos", "eos", "pad")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def _record(prompt="a prompt", chosen=" yes", rejected=" no", number=0, **kwargs):
    return TextRecord(prompt, chosen, rejected, number, "train", **kwargs)


_TEXT = st.text(min_size=1, max_size=60) | st.lists(
    st.sampled_from(["<s>", "</s>", "<|end|>", " ", "\n", "the", "cat", "TL;DR:", "é", "\U0001f600", "\ud83d"]),
    min_size=1,
    max_size=12,
).map("".join)
_property = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("name", ["stories", "byte_level"])
@_property
@given(prompt=_TEXT, reply=_TEXT)
def test_property_boundary_bos_and_eos(name, request, prompt, reply):
    tokenizer = request.getfixturevalue(name)
    known = conventions(tokenizer)
    (ids,) = encode_prompts([prompt], tokenizer, known, False)
    (response,) = encode_replies([reply], tokenizer, known, False)
    # at most one BOS and in front; one EOS and at the end; text that spells a special token stays text
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert (ids[:1] == [known.bos_id]) == (known.bos_id is not None)
    assert not special & set(ids[known.bos_id is not None :])
    assert response[-1] == known.eos_id and not special & set(response[:-1])
    # neither is changed by the other: a row is the two, side by side
    if not prompt.strip():
        return
    encoded = encode([_record(prompt, reply, None)], tokenizer, 1, Limits(4096, 2048))
    row_prompt, row_reply = (piece.tolist() for piece in encoded.row(0))
    assert (row_prompt, row_reply) == (ids, response)


def test_prompt_and_reply_never_merge_across_the_boundary(byte_level):
    whole = byte_level("the cat", add_special_tokens=False).input_ids
    encoded = encode([_record("the c", "at", None)], byte_level, 1, LIMITS)
    apart = encoded.row(0)[0].tolist() + encoded.row(0)[1].tolist()[:-1]
    assert apart != whole and byte_level.decode(apart) == "the cat"


def test_text_comes_back(stories):
    """The prompt and the reply of a SentencePiece tokenizer, joined, are the text: no space is added between them."""
    encoded = encode([_record("Tell me:", " I will", None)], stories, 1, LIMITS)
    prompt, reply = (piece.tolist() for piece in encoded.row(0))
    assert stories.decode(prompt[1:] + reply[:-1]) == "Tell me: I will"
    assert reply[0] == stories("I", add_special_tokens=False).input_ids[0]


def test_pad_is_eos_and_masks_come_from_lengths(stories):
    assert stories.pad_token_id == stories.eos_token_id
    encoded = encode([_record()], stories, 2, LIMITS)
    prompt, chosen, rejected = encoded.row(0)
    rows = tight_rows(encoded, np.array([0]), 64)
    real = rows["segments"][0] > 0
    total = len(prompt) + len(chosen) + len(rejected)
    assert real.sum() == total and real[:total].all()
    ends = [len(prompt) + len(chosen) - 1, total - 1]
    assert (rows["tokens"][0, ends] == stories.eos_token_id).all() and real[ends].all()
    assert (rows["tokens"][0, total:] == stories.eos_token_id).all() and not real[total:].any()


def test_double_bos_of_a_template_is_one(stories):
    known = conventions(stories)
    with_bos, without = encode_prompts(["<s><s>[user] a", "[user] a"], stories, known, True)
    assert with_bos[0] == known.bos_id and known.bos_id not in with_bos[1:]
    assert known.bos_id not in without  # the template's own convention holds
    (reply,) = encode_replies(["a</s>"], stories, known, True)
    assert reply.count(known.eos_id) == 1 and reply[-1] == known.eos_id


def test_long_prompts_lose_their_left_and_keep_bos(stories):
    text = "once upon a time there was a cat. " * 20
    encoded = encode([_record(text)], stories, 2, LIMITS)
    prompt, chosen, rejected = encoded.row(0)
    full = encode_prompts([text], stories, conventions(stories), False)[0]
    assert len(prompt) + len(chosen) + len(rejected) == 64
    assert prompt[0] == stories.bos_token_id and prompt[1:].tolist() == full[-(len(prompt) - 1) :]
    assert encoded.counts["prompts truncated"] == 1
    limited = encode([_record(text)], stories, 2, Limits(64, 16, max_prompt=10))
    assert len(limited.row(0)[0]) == 10


def test_a_cut_reply_has_no_eos(stories):
    encoded = encode([_record(chosen=" yes" * 50)], stories, 2, LIMITS)
    assert len(encoded.row(0)[1]) == 16 and stories.eos_token_id not in encoded.row(0)[1]
    assert encoded.row(0)[2][-1] == stories.eos_token_id and encoded.counts["replies truncated"] == 1


def test_rows_too_long_are_dropped_by_rule_and_counted(stories):
    rows = [_record(number=0), _record(chosen=" yes" * 50, number=1), _record(prompt="word " * 99, number=2)]
    encoded = encode(rows, stories, 2, dataclasses.replace(LIMITS, too_long="drop"))
    assert encoded.id.tolist() == [0]
    assert encoded.counts["dropped: reply too long"] == encoded.counts["dropped: prompt too long"] == 1


def test_replies_that_become_equal_are_dropped(stories):
    same = " yes" * 50
    encoded = encode([_record(), _record(chosen=same + " a", rejected=same + " b")], stories, 2, LIMITS)
    assert len(encoded) == 1 and encoded.counts["dropped: identical replies once encoded"] == 1


def test_fields_travel_with_the_rows(stories):
    rows = [_record(number=7, confidence=8.0, margin=0.0), _record("other", number=9)]
    encoded = encode(rows, stories, 0, LIMITS)
    assert encoded.id.tolist() == [7, 9] and encoded.replies == 0 and encoded.piece_lens.shape == (2, 1)
    assert encoded.confidence[0] == 8 and encoded.margin[0] == 0 and np.isnan(encoded.margin[1])


# Cache ----------------------------------------------------------------------------------------------------------------


def test_cache_is_memory_mapped_and_equal(shared, stories, tmp_path, monkeypatch):
    records = load(str(shared / "data/hh_rlhf"), "test")[0][:100]
    limits = Limits(512, 192)
    fresh = encode(records, stories, 2, limits)
    written = encode(records, stories, 2, limits, tmp_path)
    monkeypatch.setattr("mpo_jax.data.encode._encode", lambda *a: pytest.fail("tokenized twice"))
    mapped = encode(records, stories, 2, limits, tmp_path)
    assert isinstance(mapped.tokens, np.memmap) and mapped.counts == fresh.counts == written.counts
    for name in ("tokens", "offsets", "id", "prompt_id"):
        assert (getattr(mapped, name) == getattr(fresh, name)).all()
    assert mapped.conventions == fresh.conventions and mapped.key == fresh.key


def test_cache_key_changes_with_all_that_matters(shared, stories, byte_level):
    records = [_record(), _record("other")]
    base = cache_key(records, stories, 2, LIMITS)
    templated = load_tokenizer(shared / "models/stories260K")
    assert cache_key(records, templated, 2, LIMITS) == base
    templated.chat_template = "{{ messages }}"
    others = [
        cache_key(records, templated, 2, LIMITS),
        cache_key(records, byte_level, 2, LIMITS),
        cache_key(records[:1], stories, 2, LIMITS),
        cache_key([dataclasses.replace(records[0], margin=1.0), records[1]], stories, 2, LIMITS),
        cache_key(records, stories, 1, LIMITS),
        *(
            cache_key(records, stories, 2, dataclasses.replace(LIMITS, **change))
            for change in ({"max_length": 65}, {"max_response": 15}, {"max_prompt": 9}, {"too_long": "drop"})
        ),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_an_unfinished_cache_is_not_read(stories, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            encode([_record()], stories, 2, LIMITS, tmp_path)
    key = cache_key([_record()], stories, 2, LIMITS)
    assert (tmp_path / key / "tokens.npy").exists() and not (tmp_path / key / "manifest.json").exists()
    assert len(encode([_record()], stories, 2, LIMITS, tmp_path)) == 1
    # whoever comes second with the same key leaves the first's arrays in place
    write(encode([_record()], stories, 2, LIMITS), tmp_path / key)
    assert len(encode([_record()], stories, 2, LIMITS, tmp_path)) == 1


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(512, 256), "max_length 512 leaves no room"),
        (Limits(512, 0), "max_response 0"),
        (Limits(512, 10, too_long="cut"), "too_long 'cut'"),
        (Limits(512, 10, max_prompt=1), "max_prompt 1"),
    ],
)
def test_limits_that_cannot_be(stories, limits, words):
    with pytest.raises(InputError, match=words):
        encode([_record()], stories, 2, limits)


def test_a_missing_reply_is_named(stories):
    with pytest.raises(InputError, match="record 3 of split 'train' has no 'rejected'"):
        encode([_record(rejected=None, number=3)], stories, 2, LIMITS)


def test_nothing_left_is_an_error(stories):
    with pytest.raises(InputError, match="no row is left"):
        encode([_record("word " * 99)], stories, 2, Limits(64, 16, too_long="drop"))


def test_bad_tokenizers(shared, tmp_path, stories):
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    source = shared / "models/stories260K"
    shutil.copy(source / "tokenizer.json", tmp_path)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no eos_token"):
        load_tokenizer(tmp_path)
    check_vocabulary(stories, 512, "model")
    with pytest.raises(InputError, match="largest id is 511, the model's vocab_size 500"):
        check_vocabulary(stories, 500, "model")


def test_a_special_token_beyond_the_vocabulary_is_refused_only_where_something_writes_it(stories):
    """Those of a folder whose `transformers` class adds an unk_token, and those that people add and never use."""
    other = copy.deepcopy(stories)
    other.add_tokens([AddedToken("<|idle|>", special=True)])
    assert max(other.get_vocab().values()) == 512
    check_vocabulary(other, 512, "model")
    told = pytest.raises(InputError, match="largest id is 512, the model's vocab_size 512")
    for change in ({"pad_token": "<|idle|>"}, {"eos_token": "<|idle|>"}):
        used = copy.deepcopy(other)
        for name, token in change.items():
            setattr(used, name, token)
        with told:
            check_vocabulary(used, 512, "model")
    for source in ("{% for m in messages %}<|idle|>{{ m.content }}{% endfor %}",
                   "{% for m in messages %}{{ '<|' + 'idle' + '|>' + m.content }}{% endfor %}"):  # fmt: skip
        used = copy.deepcopy(other)
        used.chat_template = source
        with told:
            check_vocabulary(used, 512, "model")
    ordinary = copy.deepcopy(stories)
    ordinary.add_tokens(["a word of its own"])
    with told:
        check_vocabulary(ordinary, 512, "model")
