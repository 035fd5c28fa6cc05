"""tpu_pod.sh in a fake cloud: what it calls is in the public reference, and `watch` goes on after what is no error."""

import re
import stat

import pytest

from tests.deploy.scene import make

TOKEN = "hf_do_not_show_me"
SCRIPT = "run_scripts/tpu_pod.sh"
GIVEN = {"BUCKET": "things", "NAME": "mine", "ZONE": "us-west4-a", "PROJECT": "ours"}
SAVED = {"code": 75, "object": "gs://things/mine/sft/checkpoints/10", "state": "SUSPENDED"}


def watch(scene, **more):
    return scene.call(SCRIPT, "watch", **GIVEN, **more)


def runs(scene):
    return scene.commands("ssh", "host.sh run")


def test_a_run_from_nothing_to_its_end(tmp_path):
    scene = make(tmp_path / "scene")
    done = watch(scene, HF_TOKEN=TOKEN, FLAGS="--config.data.limit=9")
    assert done.returncode == 0, done.stderr
    create = scene.commands("create")[0]
    assert {"--node-id=mine", "--zone=us-west4-a", "--project=ours", "--spot"} <= set(create)
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 2, "both hosts ran"
    for line in said:
        assert (
            '"--distributed", "--config=configs/tldr.py", "--workdir=gs://things/mine", "--config.data.limit=9"' in line
        )
        assert '"token": true' in line
    hosts = tmp_path / "scene/hosts"
    for host in ("0", "1"):
        file = hosts / host / ".mpo/hf_token"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.read_text().strip() == TOKEN
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert len(set(re.findall(r"commit ([0-9a-f]{40})", done.stderr + (hosts / "1/.mpo/run.log").read_text()))) == 1


@pytest.mark.slow
def test_no_command_line_and_no_output_has_the_token(tmp_path):
    scene = make(tmp_path / "scene", runs=[SAVED, {}])
    done = watch(scene, HF_TOKEN=TOKEN)
    assert done.returncode == 0
    told = done.stdout + done.stderr + (tmp_path / "scene/calls.jsonl").read_text()
    told += (tmp_path / "scene/hosts/0/.mpo/run.log").read_text()
    assert TOKEN not in told and TOKEN not in scene.call(SCRIPT, "--dry_run", "watch", **GIVEN, HF_TOKEN=TOKEN).stdout


def test_after_a_preemption_the_slice_is_made_again_and_the_run_goes_on(tmp_path):
    scene = make(tmp_path / "scene", **{"runs-0": [SAVED, {}], "runs-1": [SAVED, {}]})
    done = watch(scene)
    assert done.returncode == 0 and "done after 2 starts" in done.stderr
    assert len(scene.commands("create")) == 2 and len(scene.commands("delete")) == 1 and len(runs(scene)) == 2
    assert scene.waits == [30]


@pytest.mark.slow
@pytest.mark.parametrize("code", [75, -15, 143, 255])
def test_codes_of_a_stop_are_no_failures(tmp_path, code):
    stops = [{"code": code}] * 5
    scene = make(tmp_path / "scene", **{"runs-0": [*stops, {}], "runs-1": [*stops, {}]})
    done = watch(scene)
    assert done.returncode == 0 and len(runs(scene)) == 6, done.stderr
    assert scene.waits == [30, 60, 120, 240, 480], "nothing new in the workdir: waits grow"
    assert len(scene.commands("create")) == 1, "the slice stayed"


@pytest.mark.slow
def test_a_lost_node_is_no_failure_whatever_the_code(tmp_path):
    lost = {"code": 134, "state": "FAILED"}
    scene = make(tmp_path / "scene", **{"runs-0": [lost] * 4 + [{}], "runs-1": [{"code": 0}] * 5})
    done = watch(scene, FAILURES="2")
    assert done.returncode == 0 and len(scene.commands("create")) == 5, done.stderr


def test_a_command_that_fails_is_tried_a_few_times_and_then_told(tmp_path):
    scene = make(tmp_path / "scene", runs=[{"code": 1}])
    done = watch(scene, FAILURES="3")
    assert done.returncode == 1 and len(runs(scene)) == 3
    assert "error: code 1, 3 times in a row with nothing new in the workdir" in done.stderr
    assert "costs as long as it is there" in done.stderr


@pytest.mark.slow
def test_failures_with_progress_between_them_do_not_add_up(tmp_path):
    steps = [{"code": 1, "object": f"gs://things/mine/sft/checkpoints/{step}"} for step in range(4)]
    scene = make(tmp_path / "scene", **{"runs-0": [*steps, {}], "runs-1": [{"code": 1}] * 4 + [{}]})
    done = watch(scene, FAILURES="2")
    assert done.returncode == 0 and scene.waits == [30] * 4, done.stderr
    programs = [{"code": 1, "object": f"gs://things/mine/compiled/{step}"} for step in range(4)]
    scene = make(tmp_path / "other", **{"runs-0": programs, "runs-1": [{"code": 1}]})
    assert watch(scene, FAILURES="2").returncode == 1 and len(runs(scene)) == 2, "compiled programs are no progress"


@pytest.mark.slow
def test_stops_without_end_have_one(tmp_path):
    scene = make(tmp_path / "scene", runs=[{"code": 75}])
    done = watch(scene, ATTEMPTS="10")
    assert done.returncode == 1 and "not done after 10 starts" in done.stderr and len(runs(scene)) == 10
    assert max(scene.waits) == 1800


@pytest.mark.slow
def test_a_slice_that_never_becomes_active_is_given_back(tmp_path):
    scene = make(tmp_path / "scene", create=["WAITING_FOR_RESOURCES"])
    done = scene.call(SCRIPT, "create", **GIVEN, WAIT="3")
    assert done.returncode == 1 and "is WAITING_FOR_RESOURCES after 3 minutes; the request is deleted" in done.stderr
    assert (tmp_path / "scene/state").read_text() == "NONE" and scene.waits == [30] * 6
    watched = make(tmp_path / "watched", create=["WAITING_FOR_RESOURCES"])
    assert watch(watched, WAIT="3", FAILURES="2").returncode == 1 and len(watched.commands("create")) == 2


@pytest.mark.slow
def test_a_slice_that_can_not_be_created_is_told(tmp_path):
    scene = make(tmp_path / "scene", create=[1])
    assert watch(scene, FAILURES="2").returncode == 1 and len(scene.commands("create")) == 2 and not runs(scene)


@pytest.mark.slow
def test_a_state_that_can_not_be_asked_for_a_while_deletes_nothing(tmp_path):
    scene = make(tmp_path / "scene", describe=["UNKNOWN"] * 4 + [""])
    (tmp_path / "scene/state").write_text("ACTIVE")
    for host in ("0", "1"):
        (tmp_path / f"scene/hosts/{host}").mkdir(parents=True)
    done = watch(scene)
    assert done.returncode == 0 and not scene.commands("delete") and not scene.commands("create")
    assert scene.waits == [30] * 4


@pytest.mark.slow
def test_a_connection_that_drops_leaves_the_run_alone(tmp_path):
    """The second `run` follows the first one's process: each host started once."""
    scene = make(tmp_path / "scene", runs=[{"seconds": 8}], drop=[True, False])
    done = watch(scene)
    assert done.returncode == 0 and len(runs(scene)) == 2, done.stderr
    assert "stopped with code 255" in done.stderr
    assert len([call for call in scene.calls if call[0] == "python" and "mpo_jax.main" in call]) == 2


@pytest.mark.slow
def test_another_commit_on_a_host_is_not_run(tmp_path):
    scene = make(tmp_path / "scene")
    assert scene.call(SCRIPT, "create", **GIVEN).returncode == 0
    assert scene.call(SCRIPT, "install", **GIVEN).returncode == 0
    folder = next((tmp_path / "scene/hosts/1").glob("mpo_jax-*"))
    (folder / "COMMIT").write_text("0" * 40 + "\n")
    done = scene.call(SCRIPT, "run", **GIVEN)
    assert done.returncode == 1 and "has commit 0000" in done.stdout and "install it again" in done.stdout


@pytest.mark.slow
def test_two_slices_are_one_request(tmp_path):
    scene = make(tmp_path / "scene")
    assert watch(scene, SLICES="2", FLAGS="--config.mesh.data=2").returncode == 0
    create = scene.commands("create")[0]
    assert "--node-count=2" in create and "--node-prefix=mine" in create and "--node-id=mine" not in create
    assert all("--node=all" in call and "--batch-size=all" in call for call in runs(scene))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"BUCKET": ""}, "error: BUCKET: not set"),
        ({"COMMIT": "nowhere"}, "error: COMMIT: 'nowhere' is no commit of this checkout"),
        ({"FAILURES": "many"}, "error: FAILURES: 'many'; expected a number above 0"),
        ({"SPOT": "yes"}, "error: SPOT: 'yes'; expected a number\n"),
        (
            {"HF_TOKEN_FILE": "/nowhere", "FAILURES": "1"},
            "error: HF_TOKEN_FILE: /nowhere: no such file, or it is empty",
        ),
    ],
)
def test_what_is_wrong_is_told(tmp_path, given, words):
    done = make(tmp_path / "scene").call(SCRIPT, "watch", **{**GIVEN, **given})
    assert done.returncode == 1 and words in done.stderr
