"""Finished stages that are made up enter; how long stages to come take is worked out by hand beside them."""

import json

import pytest
from etils import epath

from mpo_jax import artifacts, eta, heading, recipes, settings, sharding
from mpo_jax.eta import Eta, Measured
from mpo_jax.stages import kinds

ON = "8 x TPU v5 lite"


def run_of(**stages):
    """A run whose stages are given as kind -> settings by name."""
    config = recipes.config()
    config.model.path = config.data.path = "somewhere"
    for name, (kind, given) in stages.items():
        config.stages[name] = recipes.stage(kind, **given)
    return kinds.read(config.to_dict())


def measured(name, run, seconds, on=ON):
    return Measured(name, settings.plain(run), seconds, on)


def of(run, *known, names=("new",), on=ON) -> Eta:
    return eta.of_stages(names, run, known, on)


def test_a_training_takes_its_steps_by_the_seconds_of_one():
    before = run_of(old=("sft", {"steps": 40}))
    run = run_of(new=("sft", {"steps": 100, "learning_rate": 1e-4}))
    assert of(run, measured("old", before, 60.0)).seconds == 150.0  # 1.5 s a step


@pytest.mark.parametrize(
    "given", [{"batch_size": 8}, {"microbatch": 4}, {"eval_every": 7}, {"steps": 0, "epochs": 2.0}], ids=str
)
def test_steps_of_another_size_say_nothing(given):
    before = run_of(old=("sft", {"steps": 40}))
    run = run_of(new=("sft", {"steps": 100} | given))
    assert of(run, measured("old", before, 60.0)) == Eta(None, ("new",))


def test_another_kind_model_or_device_says_nothing():
    before, run = run_of(old=("reward", {"steps": 40})), run_of(new=("sft", {"steps": 40}))
    assert of(run, measured("old", before, 60.0)).seconds is None
    before = run_of(old=("sft", {"steps": 40}))
    assert of(run, measured("old", before, 60.0), on="16 x TPU v5 lite").seconds is None
    other = before.model_copy(update={"model": before.model.model_copy(update={"path": "larger"})})
    assert of(run, measured("old", other, 60.0)).seconds is None
    assert of(run, measured("old", before, 60.0)).seconds == 60.0


def test_a_stage_without_steps_takes_what_it_took_before():
    before, run = run_of(new=("split", {"threshold": 1.0})), run_of(new=("split", {"threshold": 2.0}))
    assert of(run, measured("new", before, 30.0)).seconds == 30.0
    assert of(run_of(other=("split", {})), measured("new", before, 30.0), names=("other",)).seconds is None, (
        "another split may have other rows"
    )
    epochs = run_of(new=("sft", {"epochs": 1.0}))
    assert of(epochs, measured("new", epochs, 30.0)).seconds == 30.0
    assert of(run_of(new=("sft", {"epochs": 2.0})), measured("new", epochs, 30.0)).seconds is None


def test_the_stage_of_the_same_name_counts_before_others_and_the_latest_before_older_ones():
    run = run_of(new=("sft", {"steps": 10}), old=("sft", {"steps": 10}))
    known = [measured("old", run, 5.0), measured("new", run, 7.0), measured("new", run, 9.0)]
    assert of(run, *known).seconds == 7.0


def test_a_sum_names_what_it_leaves_out():
    run = run_of(a=("sft", {"steps": 10}), b=("reward", {"steps": 10}), c=("sft", {"steps": 20}))
    found = of(run, measured("a", run, 3900.0), names=("a", "b", "c"))
    assert found == Eta(3 * 3900.0, ("b",)) and str(found) == "3 h 15 min, without b"
    assert str(Eta(60.0, tuple("abcd"))) == "1 min, without 4 stages"
    assert str(Eta(None, ("a",))) == "unknown" and str(Eta(None, ())) == "0 s"


def test_stages_that_were_never_measured_are_estimated_by_what_they_compute():
    """In 60 s 300 were computed: 2,000 take 400 s. Nothing is known of c, and split says nothing of this run."""
    run = run_of(a=("sft", {"steps": 10}), b=("reward", {}), c=("judge", {"evaluate": "a"}), d=("sft", {"steps": 20}))
    amounts = {("a", 500): 300.0, ("b", 500): 2000.0}
    plain = settings.plain(run)
    known = [
        Measured("a", plain, 60.0, ON, pairs=500),
        Measured("a", plain, 999.0, ON, pairs=500),  # an older making
        Measured("b", settings.plain(run_of(b=("reward", {"batch_size": 3}))), 999.0, ON, pairs=900),
        Measured("a", plain, 999.0, "16 x TPU v5 lite", pairs=900),
    ]
    found = eta.of_stages(("b", "c", "d"), run, known, ON, lambda name, pairs: amounts.get((name, pairs)))
    assert found == Eta(400.0 + 120.0, ("c",), ("b",))
    assert str(found) == "8 min 40 s, estimated for b, without c"
    assert eta.of_stages(("b",), run, known[2:], ON, lambda name, pairs: 1.0) == Eta(None, ("b",))
    unread = [Measured("a", plain, 60.0, ON)]
    assert eta.of_stages(("b",), run, unread, ON, lambda name, pairs: 1.0).unknown == ("b",), "how many rows?"


def test_measured_reads_finished_stages_and_passes_over_what_says_nothing(tmp_path):
    run = run_of(a=("sft", {"steps": 10}))
    for folder, seconds in (("a-1", 4.0), ("a-2", None), ("a-3", 6.0)):
        artifacts.write_json(tmp_path / folder / artifacts.CONFIG, settings.plain(run))
        read = [{"kept": 7}, {"kept": 9}]
        artifacts.write_manifest(tmp_path / folder, {"name": "a", "seconds": seconds, "devices": ON, "data": read})
    (tmp_path / "a-3" / artifacts.MANIFEST).write_text(json.dumps({"name": "a", "seconds": 1.0}))  # without its seal
    artifacts.write_manifest(tmp_path / "a-4", {"name": "a"})  # of an earlier version
    assert [(each.name, each.seconds, each.pairs) for each in eta.measured(epath.Path(tmp_path))] == [("a", 4.0, 9)]


def test_the_first_screen_is_short_and_fits_80_columns(tmp_path):
    names = [f"a_stage_of_a_long_name_{number}" for number in range(9)]
    mesh = sharding.make_mesh(data=8, fsdp=1)
    shown = heading.of_run(run_of(), epath.Path("runs/x"), mesh, names[:3], names[3:], Eta(120.0, (names[4],)))
    lines = shown.split("\n")
    assert len(lines) <= 12 and all(len(line) <= 80 for line in lines)
    assert lines[0] == "run mpo in runs/x"
    assert lines[1] == "  devices  8 x cpu, mesh data 8, fsdp 1, tensor 1"
    assert f"  ETA      2 min, without {names[4]}" in lines and lines[-1] == "  report   runs/x/report.html"
    assert all(name in shown for name in names)


def test_the_first_screen_tells_the_memory_of_a_device_that_says_it(monkeypatch):
    class Device:
        process_index, device_kind, platform = 0, "TPU v5 lite", "tpu"

        def memory_stats(self):
            return {"bytes_limit": 16_900_000_000}

    import types

    import numpy as np

    mesh = types.SimpleNamespace(size=2, devices=np.array([Device(), Device()]), shape={"data": 1, "fsdp": 2})
    shown = heading.of_run(run_of(), epath.Path("x"), mesh, [], ["a"], Eta(None, ("a",)))
    assert "  devices  2 x TPU v5 lite of 16.9 GB each, mesh data 1, fsdp 2" in shown.split("\n")
