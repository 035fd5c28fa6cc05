"""The tutorial and the cookbook enter; their configs and commands run as they stand, but for the reader's own paths.

The ordinary suite checks the graphs of all runs and looks at the data; `-m slow` runs everything, the tutorial
literally and the cookbook with few steps. The cookbook's table for users of TRL is held against TRL.
"""

import ast
import gzip
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_jax import mpo, recipes
from mpo_jax.stages import kinds
from tests import test_docs
from tests.tools import guides
from tests.tools.processes import ENVIRONMENT, PATH, ROOT

PAGES = ("tutorial.md", "cookbook.md")
PLACES = {"MODEL": recipes.MODELS["tiny"], "TINY": recipes.MODELS["tiny"]}
FEW = {
    "dpo": ["steps=2", "batch_size=4", "microbatch=2", "eval_batches=1"],
    "ppo": ["steps=2", "batch_size=4", "eval_prompts=4", "max_new_tokens=8"],
}
"""Stage -> settings of a run that is only to end well."""
PREPARING = ("show", "run")
"""Commands that can be tried before a run is made."""


def write_pairs(folder: Path, count: int) -> None:
    """`pairs.jsonl` in the tutorial's form, `own.jsonl` in the cookbook's: endings of the package's own stories."""
    with gzip.open(recipes.STORIES, "rt", encoding="utf-8") as file:
        stories = [json.loads(line) for line, _ in zip(file, range(count + 1), strict=False)]
    rows = [(a["prompt"], a["chosen"], b["chosen"]) for a, b in itertools.pairwise(stories)]
    for name, columns in {"pairs": ("opening", "liked", "disliked"), "own": ("ask", "good", "bad")}.items():
        lines = [json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def folder(tmp_path, request) -> Path:
    """A clean folder with what a page tells its reader to write."""
    write_pairs(tmp_path, 240)
    if request.param == "cookbook.md":  # its pairs are in a form that is known
        text = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8")
        for name, known in {"opening": "prompt", "disliked": "rejected", "liked": "chosen"}.items():
            text = text.replace(f'"{name}":', f'"{known}":')
        (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    for name, text in guides.files(request.param).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def run(folder: Path, lines: list[list[str]]) -> list[dict]:
    """What came of command lines of `mpo`, run in a folder as the console command runs them."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.tools.commands"],  # -P: the folder is not on the path by itself
        cwd=folder, env=os.environ | ENVIRONMENT | {"PYTHONPATH": PATH},
        input=json.dumps([{"arguments": line} for line in lines]).encode(), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("page", "folder"), [(page, page) for page in PAGES], indirect=["folder"], ids=PAGES)
def test_the_data_can_be_looked_at_and_every_run_can_begin(page, folder):
    chosen = [
        command
        for command in guides.commands(page)
        if command.words[0] == "mpo" and command.words[1] in PREPARING and not command.needs
    ]
    lines = [command.replaced(PLACES)[1:] for command in chosen]
    lines = [[*line, "--dry_run"] if line[0] == "run" and "--dry_run" not in line else line for line in lines]
    for command, found in zip(chosen, run(folder, lines), strict=True):
        assert found["code"] == command.fails, f"{command.words}\n{found['output']}"
        assert not command.fails or "--config.data.columns.chosen=liked" in found["output"]
        assert command.words[1] == "show" or "missing (never run)" in found["output"]


def test_every_command_is_run_or_says_what_it_needs():
    found = [command for page in PAGES for command in guides.commands(page)]
    assert len(found) >= 25
    for command in found:
        ours = command.words[0] == "mpo" and command.words[1] in mpo.COMMANDS
        script = command.words[:2] == ("python", "run_scripts/story_pairs.py")
        assert command.needs in ("a pod", "a GPU") if command.needs else ours or script, command.words


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tutorial.md"], indirect=True)
def test_the_tutorial_literally(folder):
    (folder / "pairs.jsonl").unlink()
    for command in guides.commands("tutorial.md"):
        if command.needs:
            continue
        words = command.replaced(PLACES)
        start = ["-m", "mpo_jax.mpo", *words[1:]] if words[0] == "mpo" else [str(ROOT / words[1]), *words[2:]]
        done = subprocess.run(
            [sys.executable, *start],
            cwd=folder, env=plain(), capture_output=True, text=True,
        )  # fmt: skip
        print(" ".join(command.words), *done.stdout.splitlines()[-3:], sep="\n")
        assert (done.returncode != 0) == command.fails, f"{words}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    assert (folder / "runs/mine/report.html").exists()
    card = (folder / "exported/README.md").read_text()
    assert "## Results" in card and "| **mpo** |" in card
    (own,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    for text in [*guides.snippets("tutorial.md"), own.replace("FOLDER", "exported")]:
        said = subprocess.run([sys.executable, "-c", text], cwd=folder, env=plain(), capture_output=True, text=True)
        assert said.returncode == 0 and said.stdout.strip(), said.stderr[-2000:]


def plain() -> dict[str, str]:
    """The environment of a reader: compiled with all optimisation."""
    known = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")}
    return known | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["cookbook.md"], indirect=True)
def test_the_cookbook_with_few_steps(folder):
    chosen = [command for command in guides.commands("cookbook.md") if not command.needs]
    lines = []
    for command in chosen:
        line = command.replaced(PLACES)[1:]
        stage = next((name for name in FEW if f"--config={name}" in line or f"--config={name}.py" in line), "dpo")
        small = [f"--config.stages.{stage}.{each}" for each in FEW[stage]]
        lines.append([*line, *small] if line[0] == "run" else line)
    for command, found in zip(chosen, run(folder, lines), strict=True):
        assert found["code"] == 0, f"{command.words}\n{found['output']}"
    assert (folder / "exported/adapter/adapter_config.json").exists()


def test_the_first_score_of_the_cookbook_is_what_it_says(tmp_path):
    (tmp_path / "brevity.py").write_text(guides.files("cookbook.md")["brevity.py"])
    spec = importlib.util.spec_from_file_location("brevity", tmp_path / "brevity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.score(["a"] * 3, ["word " * 20, "word", " "], [{}] * 3) == [0, -19, None]


TABLE = re.compile(r"^### (\w+Config)$(.*?)(?=^##|\Z)", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)` \| (?:`([\w.]+)`)? ?\| (.*?) ?\|$", re.MULTILINE)


def rows() -> list[tuple[str, str, str, str]]:
    """(class of TRL, its argument, our setting or "", note)."""
    page = (ROOT / "docs/cookbook.md").read_text(encoding="utf-8")
    return [(name, *row) for name, text in TABLE.findall(page) for row in ROW.findall(text)]


def section(setting: str) -> list[str]:
    """The dotted key of a setting, a stage's behind `stages`."""
    kind = setting.split(".")[0]
    return ["stages", *setting.split(".")] if kind in kinds.KINDS else setting.split(".")


def test_the_table_for_users_of_trl_names_what_there_is():
    trl = pytest.importorskip("trl")
    found = rows()
    assert len(found) > 50 and {name for name, *_ in found} == {"DPOConfig", "RewardConfig", "PPOConfig"}
    for name, argument, setting, note in found:
        assert not setting or test_docs.known(section(setting)), f"{setting}: no such setting"
        if setting.split(".")[0] in kinds.KINDS:
            kind, key = setting.split(".")
            assert key in kinds.KINDS[kind].settings.model_fields, setting
        if name == "PPOConfig":  # which TRL has dropped
            assert not hasattr(trl, "PPOConfig")
            continue
        field = getattr(trl, name).__dataclass_fields__.get(argument)
        assert field is not None, f"{name} has no {argument}"
        if told := re.search(r"TRL's default is (\S+), ours (\S+)", note):
            kind, key = setting.split(".")
            if re.fullmatch(r"[\d.e-]+", told[1]):
                ours = kinds.KINDS[kind].settings.model_fields[key].default
                assert (field.default, ours) == (ast.literal_eval(told[1]), ast.literal_eval(told[2])), argument
