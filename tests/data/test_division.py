"""Real prompts enter; that no prompt stands in two shares, and that ids are stable and unique, is checked."""

import dataclasses
import itertools

import numpy as np
import pytest

from mpo_jax.data import division
from mpo_jax.data.schemas import TextRecord
from mpo_jax.data.sources import load
from mpo_jax.errors import InputError


@pytest.fixture(scope="module")
def records(shared):
    return load(str(shared / "data/hh_rlhf"), "test")[0]


def test_no_prompt_in_two_shares(records):
    records = records + [dataclasses.replace(r, id=r.id + 10_000) for r in records[::3]]  # prompts that come twice
    parts = {name: division.select(records, name) for name in division.names()}
    prompts = {name: {r.prompt for r in part} for name, part in parts.items()}
    for one, other in itertools.combinations(prompts.values(), 2):
        assert not one & other
    assert sum(map(len, parts.values())) == len(records)
    fractions = {"sft_reward": 0.45, "policy": 0.45, "select": 0.05, "report": 0.05}
    for name, fraction in fractions.items():
        assert abs(len(parts[name]) / len(records) - fraction) < 0.05


def test_share_is_stable():
    assert [division.share(f"prompt {i}") for i in range(6)] == [
        "eval", "eval", "sft_reward", "sft_reward", "sft_reward", "policy",
    ]  # fmt: skip
    held = [f"prompt {i}" for i in range(300) if division.share(f"prompt {i}") == "eval"]
    halves = [division.share_or_half(prompt) for prompt in held]
    assert halves[:6] == ["select", "select", "select", "select", "select", "report"] and set(halves) == {
        "select",
        "report",
    }


def test_shares_must_add_up():
    with pytest.raises(InputError, match="add up to 1"):
        division.share("a", {"x": 0.5, "y": 0.4})
    with pytest.raises(InputError, match="unknown share 'z'"):
        division.select([], "z")
    with pytest.raises(InputError, match="unknown share 'eval'; expected one of sft_reward, policy, select, report"):
        division.select([], "eval")


def test_prompt_ids_are_equal_for_equal_prompts_alone(records):
    prompts = [r.prompt for r in records]
    ids = division.prompt_ids(prompts + prompts[:5])
    assert ids.dtype == np.int32 and ids.min() >= 0
    assert len(set(ids.tolist())) == len(set(prompts)) and (ids[-5:] == ids[:5]).all()
    assert (division.prompt_ids(prompts[::-1])[::-1] == ids[:-5]).all()


def test_colliding_prompt_ids_are_told_apart_whatever_the_order(monkeypatch):
    real = division._hash

    def narrow(prompt, purpose, size):  # 16 possible first ids for 40 prompts
        digest = real(prompt, purpose, size)
        return (digest[0] % 16).to_bytes(4) if purpose == b"id0" else digest

    monkeypatch.setattr(division, "_hash", narrow)
    prompts = [f"prompt {i}" for i in range(40)]
    ids = division.prompt_ids(prompts)
    assert len(set(ids.tolist())) == 40 and (ids >= 16).sum() >= 24
    assert (division.prompt_ids(prompts[::-1])[::-1] == ids).all()


def test_unique_prompts_keeps_the_first():
    rows = [TextRecord(p, c, None, i, "train") for i, (p, c) in enumerate([("a", "1"), ("b", "2"), ("a", "3")])]
    assert [r.id for r in division.unique_prompts(rows)] == [0, 1]
