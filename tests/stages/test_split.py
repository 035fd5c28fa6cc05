"""The split stage on real pairs of HH and TL;DR: scores, buckets, flipped pairs, sampled pairs, cross-fitting."""

import dataclasses
import itertools
import json
import re
import shutil

import jax
import ml_collections
import numpy as np
import pytest

from mpo_jax import artifacts, graph, metrics, recipes, sharding
from mpo_jax import settings as declared
from mpo_jax.artifacts import REWARD
from mpo_jax.data import division, encode
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.ops import masks
from mpo_jax.run import as_json
from mpo_jax.scorers import sentiment
from mpo_jax.stages import buckets, corpus, kinds, reward, rows, split
from mpo_jax.stages import job as jobs
from mpo_jax.types import BUCKETS, GapTable
from tests.stages import ppo_job
from tests.stages.ppo_job import part
from tests.stages.split_job import make_job, reward_model, run_split, write_comparisons


@pytest.fixture(scope="module")
def job(tmp_path_factory, shared):
    return make_job(tmp_path_factory.mktemp("split"), shared)


@pytest.fixture(scope="module")
def whole(job):
    """The artifact of a split of HH pairs in two halves."""
    return run_split(job)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, job, shared):
    """Of every two of three replies of the policy's own."""
    settings = {"pair_source": "sampled", "pairing": "all", "inputs": job.inputs}
    return run_split(make_job(tmp_path_factory.mktemp("sampled"), shared, **settings))


def table_of(artifact) -> GapTable:
    return artifacts.read_gaps(artifact.folder)


def made_table(*gaps: float) -> GapTable:
    gap = np.array(gaps, np.float32)
    ids = np.arange(len(gap), dtype=np.int32)
    return GapTable(ids, ids, gap, np.zeros_like(gap), gap, buckets.buckets(gap, 1.0))


def test_buckets_by_hand():
    names = [BUCKETS[index] for index in made_table(1.5, 1.0, 0.99, 0.0, -0.99, -1.0, -3.0).bucket]
    assert names == ["easy", "easy", "hard", "hard", "hard", "flipped", "flipped"]
    gap = np.array([-4.0, 1.0, 2.0, 3.0])
    assert buckets.gap_threshold(gap, 1.5) == 1.5
    assert buckets.gap_threshold(gap, 1.5, quantile=0.5) == 2.5


def test_buckets_partition_the_ids(job, whole):
    table = table_of(whole)
    every = buckets.pairs(whole)
    assert len(every) == len(table.id) == len(set(table.id.tolist())) > 20
    np.testing.assert_array_equal(table.gap, table.score_chosen - table.score_rejected)
    np.testing.assert_array_equal(table.id, every.id)
    np.testing.assert_array_equal(table.prompt_id, every.prompt_id)
    parts = [set(buckets.pairs(part(whole, name)).id.tolist()) for name in ("easy", "hard")]  # flipped are hard here
    assert parts[0] | parts[1] == set(table.id.tolist()) and not parts[0] & parts[1]
    assert set(buckets.pairs(part(whole, "flipped")).id.tolist()) < parts[1]
    threshold = json.loads((job.folder / artifacts.REPORT).read_text())["threshold"]
    assert np.median(np.abs(table.gap)) == pytest.approx(threshold)  # quantile 0.5
    np.testing.assert_array_equal(buckets.buckets(table.gap, threshold), table.bucket)


@pytest.mark.parametrize("half", ["select", "report"])
def test_held_out_pairs_are_of_the_eval_share(job, whole, half):
    model, tokenizer = jobs.model(job), load_tokenizer(job.config.model.path)
    expected = corpus.share_pairs(job, model, tokenizer, half)
    heldout = buckets.heldout(whole, half)
    assert encode.rows_fingerprint(heldout) == encode.rows_fingerprint(expected)
    assert not set(heldout.prompt_id.tolist()) & set(buckets.pairs(whole).prompt_id.tolist())


@pytest.mark.parametrize("half", ["select", "report"])
def test_held_out_pairs_are_divided_by_the_same_scorer_and_threshold(job, whole, half):
    heldout = buckets.heldout(whole, half)
    table = artifacts.read_gaps(whole.folder / artifacts.HELDOUT / half)
    np.testing.assert_array_equal(table.id, heldout.id)
    threshold = json.loads((job.folder / artifacts.REPORT).read_text())["threshold"]
    np.testing.assert_array_equal(buckets.heldout_buckets(whole, half), buckets.buckets(table.gap, threshold))
    model = jobs.model(job)
    with jax.set_mesh(job.mesh):
        weights = jobs.load_weights(job, job.inputs["reward"], model)
        scores = rows.compute(job, split.programs(job)["score"], weights, heldout, 8)
    np.testing.assert_allclose(table.gap, scores[:, 0] - scores[:, 1], atol=1e-5)


def test_held_out_pairs_without_margins_are_not_divided(job, whole):
    given = dataclasses.replace(job, settings=job.settings.model_copy(update={"gap": "given"}))
    heldout = buckets.heldout(whole, "select")
    scored = split.Scored(heldout, np.zeros((len(heldout), 2), np.float32))
    assert split.heldout_table(given, jobs.model(job), {}, {}, scored, 1.0) is None
    known = dataclasses.replace(scored, encoded=dataclasses.replace(heldout, margin=np.arange(len(heldout)) / 2.0))
    table = split.heldout_table(given, jobs.model(job), {}, {}, known, 1.0)
    assert [BUCKETS[index] for index in table.bucket[:4]] == ["hard", "hard", "easy", "easy"]


def test_scores_and_buckets_for_any_batch_size_and_device_count(job, whole, shared, tmp_path):
    table = table_of(whole)
    threshold = json.loads((job.folder / artifacts.REPORT).read_text())["threshold"]
    eight = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    for mesh, settings in ((None, {"score_batch": 3}), (eight, {"score_batch": 16})):
        settings |= {"quantile": 0.0, "threshold": threshold, "inputs": job.inputs}
        found = table_of(run_split(make_job(tmp_path / str(settings["score_batch"]), shared, mesh=mesh, **settings)))
        np.testing.assert_array_equal(found.id, table.id)
        for name in ("score_chosen", "score_rejected", "gap"):
            np.testing.assert_allclose(getattr(found, name), getattr(table, name), atol=1e-5, rtol=0)
        near = np.abs(np.abs(table.gap) - threshold) < 1e-5
        np.testing.assert_array_equal(found.bucket[~near], table.bucket[~near])


def test_no_prompt_of_a_part_appears_twice(sampled):
    hard = part(sampled, "hard")
    repeated, prompts = buckets.pairs(hard), buckets.prompts(hard)
    assert len(set(repeated.prompt_id.tolist())) < len(repeated)  # several pairs of one prompt
    assert len(set(prompts.prompt_id.tolist())) == len(prompts) and prompts.replies == 0
    assert set(prompts.prompt_id.tolist()) == set(repeated.prompt_id.tolist())
    texts = {tuple(prompts.row(row)[0].tolist()) for row in range(len(prompts))}
    assert len(texts) == len(prompts)
    heldout = buckets.heldout_prompts(hard, "report", 5)
    assert len(heldout) == len(set(heldout.prompt_id.tolist())) == 5


def test_flipped_pairs_go_where_the_settings_say(whole, tmp_path):
    table = table_of(whole)
    ids = {name: set(table.id[table.bucket == index].tolist()) for index, name in enumerate(BUCKETS)}
    assert all(ids.values())
    divided = {}
    for routed in ("hard", "drop", "swap"):
        folder = tmp_path / routed
        shutil.copytree(whole.folder, folder)
        config = artifacts.read_json(folder / artifacts.CONFIG)
        config["stages"]["split"]["flipped"] = routed
        artifacts.write_json(folder / artifacts.CONFIG, config)
        moved = dataclasses.replace(whole, folder=whole.folder.parent.__class__(folder))
        divided[routed] = {name: buckets.pairs(part(moved, name)) for name in ("easy", "hard", "flipped")}
    found = {routed: {name: set(each.id.tolist()) for name, each in parts.items()} for routed, parts in divided.items()}
    assert found["hard"] == ids | {"hard": ids["hard"] | ids["flipped"]}
    assert found["drop"] == ids
    assert found["swap"] == ids | {"easy": ids["easy"] | ids["flipped"]}
    labelled = buckets.pairs(whole)
    place = {int(number): row for row, number in enumerate(labelled.id)}
    swapped = divided["swap"]["easy"]
    for row, number in enumerate(swapped.id.tolist()):
        prompt, chosen, rejected = labelled.row(place[number])
        expected = (prompt, rejected, chosen) if number in ids["flipped"] else (prompt, chosen, rejected)
        for got, wanted in zip(swapped.row(row), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_report_is_complete(job, whole):
    table, encoded = table_of(whole), buckets.pairs(whole)
    report = json.loads((job.folder / artifacts.REPORT).read_text())
    assert report["counts"] == {name: int((table.bucket == i).sum()) for i, name in enumerate(BUCKETS)}
    assert report["agreement"] == pytest.approx(np.mean(table.gap > 0))
    deciles = report["agreement_by_gap_decile"]
    assert len(deciles) == 10 and sum(row["pairs"] for row in deciles) == len(table.gap) == report["pairs"]
    assert all(a["to"] <= b["from"] for a, b in itertools.pairwise(deciles))
    right = sum(row["agreement"] * row["pairs"] for row in deciles)
    assert right == pytest.approx(report["agreement"] * report["pairs"])
    lens = encoded.piece_lens[table.bucket == BUCKETS.index("easy")]
    told = report["lengths"]["easy"]
    assert told["chosen"]["mean"] == pytest.approx(lens[:, 1].mean())
    assert told["rejected"]["median"] == np.median(lens[:, 2])
    longer = np.mean((lens[:, 1] > lens[:, 2]) + 0.5 * (lens[:, 1] == lens[:, 2]))
    assert told["chosen_longer"] == pytest.approx(longer)
    assert {path.name for path in job.folder.glob("*.png")} == {"gaps.png", "easy_share.png", "agreement.png"}
    samples = json.loads((job.folder / artifacts.SAMPLE_PAIRS).read_text())
    for index, name in enumerate(BUCKETS):
        count = min(5, report["counts"][name])
        assert [row["id"] for row in samples[name]] == table.id[table.bucket == index][:count].tolist()
        assert {"id", "gap", "prompt", "chosen", "rejected"} == set(samples[name][0])


def test_agreement_by_confidence_of_tldr_comparisons(job, shared, tmp_path):
    data = write_comparisons(tmp_path / "comparisons.jsonl", shared)
    job = make_job(tmp_path / "run", shared, data=data, limit=0, inputs=job.inputs)
    whole = run_split(job)
    table, confidence = table_of(whole), np.asarray(buckets.pairs(whole).confidence)
    lines = json.loads((job.folder / artifacts.REPORT).read_text())["scores"]["by_confidence"]
    assert [line["confidence"] for line in lines] == np.unique(confidence).tolist() and len(lines) > 5
    for row in lines:
        here = table.gap[confidence == row["confidence"]]
        assert (row["pairs"], row["accuracy"]) == (len(here), pytest.approx(np.mean(here > 0)))
    assert (job.folder / "confidence.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("gaps", "flipped"),
    [((0.5, 0.1, -0.2), "hard"), ((3.0, 4.0, 5.0), "hard"), ((3.0, -4.0), "drop"), ((-0.3, 0.2, -0.2), "swap"),
     ((1.23456, 1.23459), "drop"), ((3.0, 1.0, -2.0), "drop")],
)  # fmt: skip
def test_an_empty_bucket_is_an_error_that_suggests_a_threshold_that_works(gaps, flipped):
    table = made_table(*gaps)
    with pytest.raises(InputError, match=r"stages\.halves\.threshold: at 1 no pair is (easy|hard)") as caught:
        buckets.check_buckets("halves", table, 1.0, flipped)
    text = str(caught.value)
    suggested = re.search(r"--config\.stages\.halves\.threshold=(\S+) --config\.stages\.halves\.quantile=0", text)
    if suggested is None:
        assert "no threshold divides them" in text and gaps == (3.0, -4.0)
        return
    threshold = float(suggested[1])
    buckets.check_buckets(
        "halves", dataclasses.replace(table, bucket=buckets.buckets(table.gap, threshold)), threshold, flipped
    )


def test_the_stage_refuses_an_empty_bucket(job, whole, tmp_path):
    high = ppo_job.replaced(job, {"threshold": 1e6, "quantile": 0.0}, folder=job.workdir / "empty")
    with pytest.raises(InputError, match=r"no pair is easy; .* try --config\.stages\.split\.threshold="):
        run_split(high)


def test_every_two_sampled_replies_by_reward(sampled):
    table, encoded = table_of(sampled), buckets.pairs(sampled)
    assert (table.gap >= 0).all()  # the reward model labels
    found = {}
    for row in range(len(encoded)):
        chosen, rejected = (ids.tolist() for ids in encoded.row(row)[1:])
        assert chosen != rejected
        found.setdefault(int(encoded.prompt_id[row]), set()).add(frozenset([tuple(chosen), tuple(rejected)]))
    counts = {len(pairs) for pairs in found.values()}
    assert counts <= {1, 2, 3} and 3 in counts  # of three replies, fewer where some are equal


def test_best_against_worst_and_the_labeller(job, sampled, shared, tmp_path):
    """The same replies (the same keys), paired by VADER's compound score, without noise: highest against lowest."""
    settings = {"pair_source": "sampled", "labeller": "vader", "label_temperature": 0.0}
    found = run_split(make_job(tmp_path, shared, inputs=job.inputs, **settings))
    tokenizer = load_tokenizer(str(shared / "models/stories260K"))

    def texts(artifact):
        replies, encoded = {}, buckets.pairs(artifact)
        for row in range(len(encoded)):
            pair = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in encoded.row(row)[1:]]
            replies.setdefault(int(encoded.prompt_id[row]), []).append(pair)
        return replies

    every, pairs = texts(sampled), texts(found)
    assert all(len(each) == 1 for each in pairs.values()) and len(pairs) > 10
    apart = 0
    for prompt, ((chosen, rejected),) in pairs.items():
        scores = sentiment.vader([], sorted({text for pair in every[prompt] for text in pair}))
        high, low = sentiment.vader([], [chosen, rejected])
        assert (high, low) == (max(scores), min(scores))
        apart += high > low
    assert apart > 3
    assert (table_of(found).gap < 0).any()  # the scores are still the reward model's


def test_both_sources_in_one_table(job, whole, shared, tmp_path):
    found = run_split(make_job(tmp_path, shared, inputs=job.inputs, pair_source="both"))
    table, own = table_of(found), table_of(whole)
    np.testing.assert_allclose(table.gap[: len(own.gap)], own.gap, atol=1e-5)
    np.testing.assert_array_equal(table.id, np.arange(len(table.id)))
    assert len(own.id) < len(table.id) <= 2 * len(own.id)
    assert (table.gap[len(own.id) :] >= 0).all()
    assert set(table.prompt_id[len(own.id) :].tolist()) <= set(own.prompt_id.tolist())


def test_cross_fitted_pairs_are_scored_by_the_model_that_never_saw_them(job, whole):
    stages = ml_collections.ConfigDict(as_json(job.config)["stages"])
    recipes.crossfit(stages, "reward", "split", folds=3)
    assert stages.split.reward == ("reward_fold_0", "reward_fold_1", "reward_fold_2")
    run = kinds.read(as_json(job.config) | {"stages": stages.to_dict()}, from_json=True)
    with jax.set_mesh(job.mesh):
        models = [reward_model(job, f"reward_fold_{fold}", seed=10 + fold) for fold in range(3)]
    crossed = dataclasses.replace(
        job, config=run, settings=run.stages["split"], folder=job.workdir / "crossed",
        inputs=job.inputs | {"reward": models},
    )  # fmt: skip
    split.STAGE.check(crossed)
    artifacts.write_json(crossed.folder / artifacts.CONFIG, as_json(run))
    found = table_of(run_split(crossed))
    model, tokenizer = jobs.model(job), load_tokenizer(job.config.model.path)
    encoded = corpus.share_pairs(crossed, model, tokenizer, "sft_reward")
    fold_of = division.folds(encoded.prompt_id, 3)
    assert set(fold_of.tolist()) == {0, 1, 2} and len(found.id) == len(encoded)
    with jax.set_mesh(job.mesh):
        score = split.programs(crossed)["score"]
        for fold, artifact in enumerate(models):
            seen = reward.without_fold(encoded, 3, fold)
            here = fold_of == fold
            assert not set(seen.prompt_id.tolist()) & set(found.prompt_id[here].tolist())
            assert len(seen) + here.sum() == len(encoded)
            weights = jobs.load_weights(job, artifact, model)
            scores = rows.compute(crossed, score, weights, encoded, 8)
            np.testing.assert_allclose(found.score_chosen[here], scores[here, 0], atol=1e-5)
            np.testing.assert_allclose(found.score_rejected[here], scores[here, 1], atol=1e-5)


def refused(job, message, settings=None, **fields) -> None:
    """The stage's check of its job, with other settings and inputs, ends in one line before anything is compiled."""
    before = metrics.compiles()
    with pytest.raises(InputError, match=message) as caught:
        split.STAGE.check(ppo_job.replaced(job, settings, **fields))
    assert "\n" not in str(caught.value) and metrics.compiles() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair_source": "sampled", "samples": 1}, r"stages\.split\.samples: 1; expected 2 or more"),
        ({"pair_source": "sampled", "labeller": "human"}, "labeller: 'human'; expected one of an empty text, vader"),
        ({"pair_source": "sampled", "pairing": "some"}, "pairing: 'some'; expected one of best_worst, all"),
        ({"pair_source": "sampled", "label_temperature": -1.0}, "label_temperature: -1.0"),
        ({"pair_source": "sampled", "policy": ""}, r"stages\.split\.policy: empty"),
        ({"pair_source": "mixed"}, "pair_source: 'mixed'; expected one of dataset, sampled, both"),
        ({"flipped": "keep"}, "flipped: 'keep'; expected one of hard, drop, swap"),
        ({"quantile": 1.0}, "quantile: 1.0; expected"),
        ({"quantile": 0.0, "threshold": 0.0}, "threshold: 0; expected above 0"),
    ],
)
def test_bad_settings(job, changes, message):
    ppo_job.refused(job, changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair_source": "both", "temperature": 0.0}, "temperature: 0 is greedy, so n = 3"),
        ({"pair_source": "sampled", "max_new_tokens": 500}, "32 prompt tokens and 500 .* context of 512"),
        ({"pair_source": "sampled", "max_new_tokens": 20}, r"32 .* two replies of 20 make 72, .*max_prompt=24"),
        ({"share": "sft_reward"}, "'reward' is trained on the share 'sft_reward' itself"),
    ],
)
def test_settings_that_the_model_or_the_graph_forbids(job, changes, message):
    refused(job, message, changes)


def test_bad_inputs(job, monkeypatch):
    two = [job.inputs["reward"], job.inputs["reward"]]
    refused(job, "reward, reward; expected the 2 models of cross-fitting", inputs={"reward": two})
    monkeypatch.setattr(jobs, "stop_ids", lambda job: (2, 600))
    refused(job, r"stop_ids: \[600\] outside the vocabulary; expected ids below 512", {"pair_source": "sampled"})


def test_a_reward_model_without_a_head(job):
    headless = dataclasses.replace(job.inputs["policy"], name="reward", produces=REWARD)
    with pytest.raises(InputError, match=r"sft/weights: head/.* is expected, but not in the checkpoint"):
        run_split(dataclasses.replace(job, inputs={"reward": headless}))


def test_rows_beyond_the_models_context(job):
    with pytest.raises(InputError, match=r"data\.max_length: 1024 is above the model's context of 512"):
        jobs.check(ppo_job.replaced(job, {"data.max_length": 1024}))


def test_a_split_without_a_reward_model(job):
    """There is none by the reward model; another scorer needs none."""
    changes = {"stages.reward.init": "base", "stages.split.policy": "base", "stages.split.reward": ""}
    with pytest.raises(InputError, match=r"stages\.split\.reward: empty, but gap=reward needs it"):
        declared.replaced(job.config, changes)
    run = declared.replaced(job.config, {"stages.split.scorer": "vader"} | changes)
    by_vader, by_reward = run.stages["split"], job.config.stages["split"]
    assert (by_vader.scored_by, by_vader.gap_unit) == ("the scorer", "the scorer's units")
    assert (by_reward.scored_by, by_reward.gap_unit) == ("the reward model", "reward units")
    assert graph.connections(run)["split"]["reward"] == ()


def test_segments_of_a_swapped_pair_stay_in_order(whole):
    """What DPO reads as chosen is the first response segment."""
    assert masks.FIRST_RESPONSE_SEGMENT == 2
    encoded = buckets.pairs(whole)
    turned = encode.take(encoded, np.arange(2), np.array([True, False]))
    np.testing.assert_array_equal(turned.row(0)[1], encoded.row(0)[2])
    np.testing.assert_array_equal(turned.row(1)[1], encoded.row(1)[1])
