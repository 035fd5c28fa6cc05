"""The command line `mpo_jax.show` enters; what it prints of a real record, and of bad input, is checked."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _show(*arguments, **environment):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-m", "mpo_jax.show", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_show_marks_bos_eos_and_padding(shared, tmp_path):
    config, comparisons = tmp_path / "config.py", shared / "data/tldr/comparisons.jsonl"
    config.write_text(
        "from mpo_jax import recipes\n"
        "def get_config():\n"
        "    config = recipes.config()\n"
        f"    config.data.update(dict(path={str(comparisons)!r}, max_length=122, max_response=40))\n"
        "    config.data.shares = {'sft_reward': 0.0, 'policy': 0.0, 'eval': 1.0}\n"
        f"    config.model.path = {str(shared / 'models/stories260K')!r}\n"
        "    config.stages.sft = recipes.stage('sft')\n"
        "    return config\n"
    )
    done = _show(f"--config={config}", "--split=train", "--index=0", "--max_response=50")
    assert done.returncode == 0, done.stderr
    assert "share select" in done.stdout
    table = done.stdout.split("--- tokens")[1].splitlines()[2:]
    assert len(table) == 128 and table[0].split()[-1] == "BOS" and "SUBREDDIT: r/legaladvice" in done.stdout
    assert [line.split()[-1] for line in table[122:]] == ["padding"] * 6
    assert sum("response 1" in line and "True" in line for line in table) == 50
    assert sum("<- BOS" in line for line in table) == 1 and "prompts truncated" in done.stdout


def test_show_tells_the_share_that_the_config_would_use(cases, shared, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from mpo_jax import recipes\n"
        "def get_config():\n"
        "    config = recipes.config()\n"
        "    config.data.eval_split = 'test'\n"
        f"    config.model.path = {str(shared / 'models/stories260K')!r}\n"
        "    return config\n"
    )
    where = f"--data_path={cases / 'splits_that_overlap/folder'}"
    heldout = _show(f"--config={config}", where, "--split=train", "--index=0")
    assert "record 0 of split train, in no share: its prompt is held out" in heldout.stdout, heldout.stderr
    assert "record 0 of split test, share select" in _show(f"--config={config}", where, "--split=test").stdout


def test_show_reports_bad_input_in_one_line(shared):
    comparisons, tokenizer = shared / "data/tldr/comparisons.jsonl", shared / "models/stories260K"
    done = _show(f"--data_path={comparisons}", f"--tokenizer={tokenizer}", "--split=nope")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].endswith("unknown split 'nope'; it has train, or 'all'")


def test_show_of_a_named_source(cases, shared, tmp_path):
    """By its own columns and template; what is wrong with it is told by its whole key, with a proposal."""
    config, rows = tmp_path / "config.py", tmp_path / "mine.jsonl"
    rows.write_text('{"question": "What floats?", "answer_good": "A leaf.", "answer_bad": "A stone."}\n')
    config.write_text(
        "from mpo_jax import recipes\n"
        "def get_config():\n"
        "    config = recipes.config()\n"
        f"    config.model.path = {str(shared / 'models/stories260K')!r}\n"
        f"    config.data.sources.mine = recipes.source(path={str(rows)!r}, template='alpaca')\n"
        "    config.stages.sft = recipes.stage('sft', data='mine')\n"
        "    return config\n"
    )
    done = _show(f"--config={config}", "--source=mine")
    where = "--config.data.sources.mine.columns"
    proposed = f"{where}.chosen=answer_good {where}.rejected=answer_bad"
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith(f"perhaps {where}.prompt=question {proposed}\n")
    done = _show(f"--config={config}", "--source=mine", *proposed.split())
    assert "question: prompt; answer_good (as chosen): chosen; answer_bad (as rejected): rejected" in done.stdout
    assert "### Instruction:\nWhat floats?\n\n### Response:\n" in done.stdout
    done = _show(f"--config={config}", "--source=min")
    assert done.stderr == "error: --source: no source 'min'; did you mean 'mine'?\n"


def test_show_prints_what_the_terminal_has_no_characters_for(shared, tmp_path):
    """Half an emoji, which is text in JSON, and marks of a tokenizer where only ASCII can be shown."""
    row = {"prompt": "Where?", "chosen": "Here \ud83d", "rejected": "There"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    done = _show(
        f"--data_path={tmp_path / 'rows.jsonl'}", f"--tokenizer={shared / 'models/stories260K'}", "--split=all",
        PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Here \\ud83d" in done.stdout and "\\u2581" in done.stdout
