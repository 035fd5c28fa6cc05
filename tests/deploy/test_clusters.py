"""GKE, SkyPilot and SLURM: what the scripts call and the manifests hold."""

import json
import os
import subprocess

import pytest
import yaml

from tests.deploy.scene import ROOT, make
from tests.tools.processes import PLAIN_SIGNALS

GKE = "run_scripts/gke.sh"
GIVEN = {"IMAGE": "eu-docker.pkg.dev/ours/images/mpo_jax", "BUCKET": "things", "NAME": "mine"}
TOKEN = "hf_do_not_show_me"


def head() -> str:
    return subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True).strip()


def test_a_jobset_is_of_one_commit_and_stops_are_no_failures(tmp_path):
    scene = make(tmp_path / "scene")
    done = scene.call(GKE, "start", **GIVEN)
    assert done.returncode == 0 and f"commit {head()}" in done.stderr
    jobset = yaml.safe_load((tmp_path / "scene/kubectl.given").read_text())
    assert jobset["metadata"] == {
        "name": "mine",
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
            "mpo-jax/commit": head(),
        },
    }
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    lost, stopped = job["podFailurePolicy"]["rules"]
    assert lost["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert stopped["onExitCodes"] == {"containerName": "mpo", "operator": "In", "values": [75, 143]}
    assert lost["action"] == stopped["action"] == "FailJob" and policy["rules"][0]["onJobFailureReasons"] == [
        "PodFailurePolicy"
    ]
    assert job["parallelism"] == job["completions"] == 8  # hosts of a v5e:4x8, 4 chips each
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    container = job["template"]["spec"]["containers"][0]
    assert container["image"] == f"{GIVEN['IMAGE']}:{head()}"
    assert container["command"][:5] == ["bash", "run_scripts/host.sh", "start", head(), "--distributed"]
    assert "--workdir=gs://things/mine" in container["command"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "mpo-hf"


def test_the_token_is_a_secret_that_nobody_sees(tmp_path):
    scene = make(tmp_path / "scene")
    done = scene.call(GKE, "secret", **GIVEN, HF_TOKEN=TOKEN)
    assert done.returncode == 0 and TOKEN in (tmp_path / "scene/kubectl.given").read_text(), done.stderr
    assert TOKEN not in done.stdout + done.stderr + (tmp_path / "scene/calls.jsonl").read_text()
    assert "HF_TOKEN: not set" in scene.call(GKE, "secret", **GIVEN).stderr
    assert "/nowhere: no such file" in scene.call(GKE, "secret", **GIVEN, HF_TOKEN_FILE="/nowhere").stderr


def test_the_image_is_built_from_the_commit_alone(tmp_path):
    scene = make(tmp_path / "scene")
    assert scene.call(GKE, "image", **GIVEN).returncode == 0
    build, push = scene.commands("docker")
    assert (
        f"COMMIT={head()}" in build
        and f"{GIVEN['IMAGE']}:{head()}" in build
        and push[-1] == f"{GIVEN['IMAGE']}:{head()}"
    )
    sent = subprocess.check_output(["git", "get-tar-commit-id"], input=(tmp_path / "scene/docker.given").read_bytes())
    assert sent.decode().strip() == head()


def test_the_other_calls_of_kubectl(tmp_path):
    scene = make(tmp_path / "scene")
    for command in ("status", "logs", "delete"):
        assert scene.call(GKE, command, **GIVEN).returncode == 0
    assert [call[1] for call in scene.calls] == ["get", "get", "logs", "delete"]
    assert "IMAGE: not set" in scene.call(GKE, "start", **{**GIVEN, "IMAGE": ""}).stderr


def test_skypilot_pins_the_commit_and_hides_the_token():
    task = yaml.safe_load((ROOT / "deploy/skypilot.yaml").read_text())
    assert task["secrets"] == {"HF_TOKEN": None} and "HF_TOKEN" not in task["envs"] and task["envs"]["COMMIT"] is None
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 143]
    assert 'host.sh start "$COMMIT"' in task["run"] and "gs://$BUCKET" in task["run"]
    assert "install.sh '.[tpu,gcs]'" in task["setup"]


SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLED"
trap 'exit "$STOPS"' TERM
[[ -n ${CODE_OF_RUN:-} ]] && exit "$CODE_OF_RUN"
echo $$ > "$CALLED.pid"
while :; do sleep 0.1; done
"""


@pytest.fixture
def slurm(tmp_path):
    """SLURM's programs: scancel signals the steps, as SLURM does; scontrol and sbatch are written down."""
    texts = {
        "srun": SRUN,
        "scancel": '#!/bin/sh\necho "scancel $*" >> "$CALLED"\nkill -TERM "$(cat "$CALLED.pid")"\n',
        "scontrol": '#!/bin/sh\necho "scontrol $*" >> "$CALLED"\n',
        "sbatch": '#!/bin/sh\necho "sbatch $*" >> "$CALLED"\necho "$COMMIT $CONFIG $WORKDIR" >> "$CALLED"\n',
    }
    for name, text in texts.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    given = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLED": str(tmp_path / "called"),
        "SLURM_JOB_ID": "7", "CODE": str(ROOT), "COMMIT": "c" * 40, "CONFIG": "configs/tldr.py",
        "WORKDIR": "/shared/run", "RESTARTS": "2",
    }  # fmt: skip

    def begin(**more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*PLAIN_SIGNALS, "bash", str(ROOT / "deploy/slurm.sh"), "--config.data.limit=9"],
            env={**given, **more}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    begin.called = lambda: (tmp_path / "called").read_text()  # type: ignore[attr-defined]
    begin.pid = tmp_path / "called.pid"  # type: ignore[attr-defined]
    return begin


def test_slurms_notice_reaches_the_steps_and_the_job_is_queued_again(slurm):
    begun = slurm(STOPS="75")
    while not slurm.pid.exists():
        assert begun.poll() is None
    begun.terminate()  # --signal=B:TERM@120
    said = begun.communicate(timeout=30)[0]
    assert begun.returncode == 75 and "queued again" in said
    called = slurm.called()
    assert "scancel --signal=TERM 7" in called and "scontrol requeue 7" in called
    assert (
        f"host.sh start {'c' * 40} --distributed --config=configs/tldr.py --workdir=/shared/run --config.data.limit=9"
        in called
    )


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [("0", "0", False), ("1", "0", False), ("75", "1", True), ("143", "0", True), ("75", "2", False)],
)
def test_slurm_queues_stops_again_and_nothing_else(slurm, code, restarts, again):
    begun = slurm(CODE_OF_RUN=code, SLURM_RESTART_COUNT=restarts)
    said = begun.communicate(timeout=30)[0]
    assert begun.returncode == int(code) and ("scontrol requeue 7" in slurm.called()) == again
    assert ("queued again 2 times already" in said) == (restarts == "2")


def test_slurm_submits_a_commit_that_later_edits_do_not_change(slurm, tmp_path):
    code = tmp_path / f"mpo_jax-{head()[:12]}"
    (code / ".venv/bin").mkdir(parents=True)
    (code / ".venv/bin/python").write_text("#!/bin/sh\necho Python 3.12.9\n")
    (code / ".venv/bin/python").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLED": str(tmp_path / "called"), "HOME": str(tmp_path),
        "PYTHON": str(code / ".venv/bin/python"), "WORKDIR": str(tmp_path / "run"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "deploy/slurm.sh"), "--nodes=4", "--", "--config.data.limit=9"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    submitted, known = (tmp_path / "called").read_text().splitlines()
    assert submitted.endswith(f"--nodes=4 {code}/deploy/slurm.sh --config.data.limit=9")
    assert known == f"{head()} configs/tldr.py {tmp_path / 'run'}" and (code / "COMMIT").read_text().strip() == head()
    empty = subprocess.run(
        ["bash", str(ROOT / "deploy/slurm.sh")],
        env={**environment, "WORKDIR": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert empty.returncode == 1 and "WORKDIR: not set" in empty.stderr


def test_what_slurm_is_told():
    lines = [line for line in (ROOT / "deploy/slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:TERM@120", "#SBATCH --ntasks-per-node=1"} <= set(lines)
    assert json.dumps(lines).count("--time=") == 1
