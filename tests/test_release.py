"""What a release is made of enters: archives with faults, citation, forms of issues, images; each is as it should be.

`run_scripts/release_check.sh` itself is run under the marker `slow`.
"""

import io
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
import yaml

from tests.tools.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GOOD = {
    "mpo_jax/mpo.py": b"",
    "mpo_jax/configs/quickstart.py": b"",
    "mpo_jax/assets/tiny_stories/model.safetensors": b"",
    "mpo_jax/evaluation/templates/model_card.md": b"",
    "mpo_jax-0.1.0.dist-info/METADATA": b"",
}
FAULTS = {
    "tests/test_x.py": (b"", "does not belong there"),
    "mpo_jax/tests/x.py": (b"", "does not belong there"),
    "mpo_jax/__pycache__/x.pyc": (b"", "does not belong there"),
    "pairs.jsonl": (b"", "does not belong there"),
    "mpo_jax/key.py": (b'token = "hf_' + b"a" * 34 + b'"', "looks like a key"),
    "mpo_jax/place.py": (b'"/home/' + b'somebody/data"', "looks like a key or somebody's folder"),
    "mpo_jax/large.bin": (bytes(9 * 2**20), "expected at most"),
}


def contents(archive) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "run_scripts/release_contents.py", archive]
    return subprocess.run(command, capture_output=True, text=True)


def wheel(folder, files: dict[str, bytes]):
    with zipfile.ZipFile(folder / "mpo_jax-0.1.0.whl", "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return folder / "mpo_jax-0.1.0.whl"


def test_a_good_wheel_passes(tmp_path):
    done = contents(wheel(tmp_path, GOOD))
    assert done.returncode == 0 and "5 files" in done.stdout, done.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_not_be_in_a_wheel_is_named(tmp_path, name):
    content, told = FAULTS[name]
    done = contents(wheel(tmp_path, GOOD | {name: content}))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and f": {name}: " in done.stderr
    assert told in done.stderr and "a" * 20 not in done.stderr, "a key is not told whole"


def test_what_is_missing_is_named(tmp_path):
    done = contents(wheel(tmp_path, {name: b"" for name in GOOD if "safetensors" not in name}))
    assert done.returncode == 1 and "model.safetensors: is missing" in done.stderr
    with tarfile.open(tmp_path / "mpo_jax-0.1.0.tar.gz", "w:gz") as file:
        member = tarfile.TarInfo("mpo_jax-0.1.0/tests/test_x.py")
        file.addfile(member, io.BytesIO())
    done = contents(tmp_path / "mpo_jax-0.1.0.tar.gz")
    assert "tests/test_x.py: does not belong there" in done.stderr and "CITATION.cff: is missing" in done.stderr


def test_the_citation_is_of_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert found["version"] == PROJECT["version"] and found["license"] == PROJECT["license"]
    assert "2403.19443" in found["references"][0]["url"]


FORMS = sorted(set((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"})


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_forms_of_issues_are_what_the_forge_takes(form):
    found = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(found) <= {"name", "description", "body", "labels", "title"}
    asked = [part for part in found["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked) > 0
    for part in found["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert "value" in part["attributes"] if part["type"] == "markdown" else part["attributes"]["label"]


def test_every_image_installs_extras_that_there_are():
    text = (ROOT / "deploy/Dockerfile").read_text()
    assert re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE) == ["base", "cpu", "cuda", "tpu"]
    wanted = re.findall(r"install\.sh '\.\[([\w,]+)\]'", text)
    assert {extra for group in wanted for extra in group.split(",")} <= set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_the_release_check_passes(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "run_scripts/release_check.sh", tmp_path, "--no-deps"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("PASSED") == 2 and len(list(tmp_path.iterdir())) == 2
