"""Models of the hub, against a fake one on loopback: downloaded once per host, of one revision on all hosts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_jax.models import hub
from tests.tools import fake_hub, processes

FETCH = "from mpo_jax.models import hub; print(hub.resolve(hub_name))"


@pytest.fixture
def server(stories):
    with fake_hub.Server(stories) as serving:
        yield serving


def environment(server, home: Path, token: str = fake_hub.TOKEN) -> dict[str, str]:
    return {
        **os.environ, "HF_ENDPOINT": server.address, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip


def start(server, home: Path, code: str, token: str = fake_hub.TOKEN) -> subprocess.Popen:
    code = f"hub_name = {fake_hub.NAME!r}\n{code}"
    given = {"env": environment(server, home, token), "cwd": processes.ROOT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_processes_of_one_host_download_once_and_again_what_broke_off(server, stories, tmp_path):
    server.cut = "model.safetensors"
    both = [start(server, tmp_path, FETCH) for _ in range(2)]
    output = [each.communicate(timeout=300)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], output
    (found,) = {text.strip().split("\n")[-1] for text in output}
    wanted = {file.name: file.read_bytes() for file in stories.iterdir() if hub._is_model_file(file.name)}
    assert files(Path(found)) == wanted
    assert server.served == dict.fromkeys(wanted, 1) | {"model.safetensors": 2}  # that broke off, and all of it


def test_all_hosts_take_the_revision_that_the_first_one_finds(server, tmp_path, monkeypatch):
    server.moving = True
    script = tmp_path / "pinned.py"
    script.write_text(
        "import os, sys\n"
        "index = sys.argv[-1].removeprefix('--process=')\n"
        "os.environ['HF_HOME'] = os.path.join(os.environ['HF_HOME'], index)\n"
        "from mpo_jax import processes\n"
        "from mpo_jax.models import hub\n"
        "value = {a.split('=')[0]: a.split('=')[1] for a in sys.argv[1:]}\n"
        "processes.start(value['--coordinator'], int(value['--processes']), int(value['--process']), False)\n"
        f"hub.pin({fake_hub.NAME!r})\n"
        f"print(hub.resolve({fake_hub.NAME!r}).rpartition('/')[2])\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{processes.PATH}")
    for name, value in environment(server, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(processes.ENVIRONMENT, "HF_HUB_OFFLINE", "0")
    log = tmp_path / "log"
    processes.run(2, [], log, script="pinned")
    revisions = [log.with_suffix(f".{index}").read_text().strip().split("\n")[-1] for index in range(2)]
    assert revisions[0] == revisions[1] and revisions[0] in server.revisions


def test_a_token_that_is_refused_is_never_printed(server, tmp_path):
    wrong = start(server, tmp_path, FETCH, token="hf_wrong_and_secret")
    output = wrong.communicate(timeout=300)[0]
    assert wrong.returncode == 1 and "owner/model: no such folder, and it can't be downloaded from the hub" in output
    assert "hf_wrong_and_secret" not in output and fake_hub.TOKEN not in output


def test_a_model_in_an_object_store(gcs, stories, monkeypatch):
    monkeypatch.setattr(hub, "_fetched", {})
    for file in stories.iterdir():
        gcs.put(f"models/stories/{file.name}", file.read_bytes())
    gcs.put("models/stories/pytorch_model.bin", b"not wanted")
    name = "gs://bucket/models/stories"
    assert not hub.at_hand(name)
    found = files(Path(hub.resolve(name)))
    assert {file: content for file, content in found.items() if not file.startswith(".")} == {
        file.name: file.read_bytes() for file in stories.iterdir() if hub._is_model_file(file.name)
    }
    assert hub.at_hand(name)
