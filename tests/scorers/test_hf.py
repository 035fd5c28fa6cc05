"""Reward models of others, as `transformers` saves them, enter; they score real pairs as transformers itself does."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mpo_jax import artifacts
from mpo_jax.data import encode
from mpo_jax.errors import InputError
from mpo_jax.models import hf as folders
from mpo_jax.scorers import hf
from mpo_jax.stages import corpus, scores, split
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from tests.stages import ppo_job, split_job
from tests.tools import reward_models

pytestmark = pytest.mark.usefixtures("torch")


def split_by(folder, shared, scorer, **settings) -> Job:
    """A split of real HH pairs by another scorer, for a policy with the tokenizer of stories260K."""
    job = split_job.make_job(folder, shared, limit=330, score_batch=8, **settings)
    return ppo_job.replaced(job, {"scorer": scorer})


def scored(job: Job):
    """The pairs of the job's share, with their scores."""
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    with jax.set_mesh(job.mesh):
        encoded = corpus.share_pairs(job, model, tokenizer, job.settings.share)
        with scores.opened(job, "scorer", tokenizer, split.programs(job), 8) as score:
            return encoded, tokenizer, score(encoded)


def told(by: str, found: np.ndarray, expected: np.ndarray) -> None:
    """At most 1e-4 between 200 scores, which differ from each other."""
    assert found.size >= 200 and found.std() > 0.1
    furthest = np.abs(found.ravel()[:200] - expected).max()
    print(f"{by}: 200 scores of standard deviation {found.std():.3g} differ by {furthest:.3g} at most")
    assert furthest <= 1e-4


FAMILIES = [
    "llama", "qwen2", "gemma2", "gpt_neox",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gpt2", "mistral")),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_text_are_those_of_transformers(tmp_path, shared, family):
    """Another tokenizer, no chat template: prompt and reply are one text."""
    from transformers import AutoTokenizer

    folder = reward_models.make(tmp_path / "model", family)
    encoded, own, found = scored(split_by(tmp_path / "run", shared, f"hf:{folder}"))
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [
        own.decode([*prompt, *reply], skip_special_tokens=True)
        for prompt, *replies in map(encoded.row, range(100))
        for reply in replies
    ]
    assert "Assistant: " in texts[0], "the space between prompt and reply is there"
    told(family, found, np.array(reward_models.judged(folder, [theirs(text)["input_ids"] for text in texts])))


@pytest.mark.parametrize(("family", "pad"), [("llama", reward_models.END), ("qwen3", reward_models.PAD)])
def test_conversations_are_shown_by_the_model_s_own_template(tmp_path, shared, family, pad):
    """Where the pad token is the one that ends a turn, the score is that of the last token before it."""
    from transformers import AutoTokenizer

    folder = reward_models.make(tmp_path / "model", family, template=reward_models.CHATML, pad=pad)
    rows = tmp_path / "dialogues.jsonl"
    with rows.open("w") as file:
        for number, story in enumerate(ppo_job.STORIES):
            asked = f"\n\nHuman: Go on. {story}\n\nAssistant: They{'.' * (number % 5)}"
            file.write(json.dumps({"chosen": f"{asked} played all day.", "rejected": f"{asked} were sad."}) + "\n")
    job = split_by(tmp_path / "run", shared, f"hf:{folder}", data=rows)
    encoded, own, found = scored(job)
    theirs, said = AutoTokenizer.from_pretrained(folder), corpus.said(job, own)
    ids, ends = [], 0
    for row in range(100):
        _, *replies = encoded.row(row)
        messages = [turn.message() for turn in said[int(encoded.prompt_id[row])].chat.turns]
        for reply in replies:
            text = own.decode(reply.tolist(), skip_special_tokens=True).strip()
            whole = [*messages, {"role": "assistant", "content": text}]
            ids.append(theirs.apply_chat_template(whole, tokenize=True, return_dict=False))
            ends += ids[-1][-1] == theirs.convert_tokens_to_ids(pad)
    assert ends == (200 if pad == reward_models.END else 0)
    told(f"{family}, chat template", found, np.array(reward_models.judged(folder, ids)))


def test_an_exported_reward_model_scores_as_it_does_in_its_run(tmp_path, shared):
    """The tokens are the run's own, so that nothing is lost on the way through text."""
    job = split_job.make_job(tmp_path / "run", shared, limit=330, score_batch=8)
    model = jobs.model(job)
    with jax.set_mesh(job.mesh):
        weights = jobs.load_weights(job, job.inputs["reward"], model)
        folders.export_weights(tmp_path / "exported", model, weights, shared / "models/stories260K", head=True)
        tokenizer = jobs.load_tokenizer(job, model)
        encoded = corpus.share_pairs(job, model, tokenizer, job.settings.share)
        own = split.reward_scorer(job, model, split.programs(job), {})("score", encoded, job.settings.share)
    other = ppo_job.replaced(job, {"scorer": f"hf:{tmp_path / 'exported'}"})
    encoded, _, found = scored(other)
    np.testing.assert_allclose(found, own, atol=1e-5)
    ids = [[*prompt.tolist(), *reply.tolist()] for prompt, *both in map(encoded.row, range(100)) for reply in both]
    told("exported", found, np.array(reward_models.judged(tmp_path / "exported", ids)))


def test_rows_share_what_their_replies_begin_with():
    first, second = np.array([1, 2, 3, 4]), np.array([1, 2, 5])
    assert [each.tolist() for each in hf.shared([first, second])] == [[1, 2], [3, 4], [5]]
    assert [each.tolist() for each in hf.shared([first, first])] == [[1, 2, 3], [4], [4]], "a reply is never empty"
    assert [each.tolist() for each in hf.shared([np.array([7]), second])] == [[], [7], [1, 2, 5]]


def test_a_text_beyond_the_context_keeps_its_beginning_and_its_end(tmp_path, shared):
    folder = reward_models.make(tmp_path, "llama")
    found = hf.find(f"hf:{folder}")
    short = dataclasses.replace(found, architecture=dataclasses.replace(found.architecture, max_positions=7))
    job = split_job.make_job(tmp_path / "run", shared, limit=60)
    own = jobs.load_tokenizer(job, jobs.model(job))
    known = encode.encode(
        [ppo_job.TextRecord("Once there was", " a cat who slept.", " a dog.", 0, "t")], own, 2, encode.Limits(64, 16)
    )
    whole, cut = (hf.Reader(each, own, dict).rows(known) for each in (found, short))
    for reply in (1, 2):
        long = np.concatenate([whole.row(0)[0], whole.row(0)[reply]])
        assert len(long) > 7
        assert np.concatenate([cut.row(0)[0], cut.row(0)[reply]]).tolist() == [long[0], *long[-6:]]


def test_what_is_no_reward_model_is_told_in_a_line(tmp_path, shared):
    job = split_job.make_job(tmp_path / "run", shared, limit=60)
    two = reward_models.make(tmp_path / "two", "llama", labels=2)
    bad = reward_models.make(tmp_path / "bad", "llama")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"pad_token_id": "x"}))
    for folder, words in [
        (two, "it has 2 labels; expected a reward model, with one score"),
        (shared / "models/stories260K", "architectures: ['LlamaForCausalLM']; expected a reward model"),
        (tmp_path / "none", "no such folder"),
        (bad, "pad_token_id: 'x'; expected an integer"),
    ]:
        other = ppo_job.replaced(job, {"scorer": f"hf:{folder}"})
        with pytest.raises(InputError) as caught:
            split.check(other)
        line = str(caught.value)
        assert line.startswith(f"stages.split.scorer: 'hf:{folder}': ") and words in line and "\n" not in line


def test_a_split_by_a_model_of_another_tokenizer_needs_no_reward_stage(tmp_path, shared):
    folder = reward_models.make(tmp_path / "model", "gpt_neox")
    job = split_by(tmp_path / "run", shared, f"hf:{folder}", pair_source="both", labeller=f"hf:{folder}")
    job = ppo_job.replaced(job, {"reward": ""}, inputs={"policy": job.inputs["policy"]})
    split_job.run_split(job)
    table = artifacts.read_gaps(job.folder)
    assert len(table.gap) > 200 and np.isfinite(table.gap).all() and table.gap.std() > 0.1
