"""Wrong command lines of all eight commands enter; each ends with one line of error, or does what it was asked.

The lines are drawn (`tests.tools.command_lines`); a failure prints the line and all that the command wrote.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from mpo_jax import main, mpo
from tests.tools import command_lines, processes
from tests.tools.processes import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def place(shared, tmp_path_factory, gcs_server):
    """A folder of things that people name by mistake, and a small finished run among them."""
    folder, data = tmp_path_factory.mktemp("place"), shared / "data/hh_rlhf/harmless-base/test.jsonl.gz"
    _, *arguments = command_lines.prepare(folder, shared / "models/stories260K", data)
    processes.run(1, arguments, folder / "log", "tests.tools.main")
    command_lines.damage(folder)
    return folder


@pytest.mark.parametrize(("seed", "count"), [(0, 24), pytest.param(1, 600, marks=pytest.mark.slow)])
def test_every_line_is_obeyed_or_refused_in_one_line(place, shared, seed, count):
    lines = list(command_lines.lines(place, shared / "models/stories260K", seed, count))
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.commands"],
        cwd=place, env=os.environ | ENVIRONMENT | {"PYTHONPATH": processes.PATH}, input=json.dumps(lines).encode(),
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    told = [
        (command_lines.wrong(one["code"], one["output"]), line, one) for line, one in zip(lines, found, strict=True)
    ]
    bad = [f"{what}: {command_lines.told(line, one)}" for what, line, one in told if what]
    assert not bad, f"{len(bad)} of {count}\n" + "\n\n".join(bad)


@pytest.mark.parametrize("begin", [["mpo_jax.main"], ["mpo_jax.mpo", "runs"]], ids=["main", "mpo"])
def test_an_interrupt_during_the_imports_is_no_traceback(begin, tmp_path):
    module, *rest = begin
    command = [sys.executable, "-X", "importtime", "-m", module, *rest, f"--workdir={tmp_path}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while "jax" not in (line := process.stderr.readline()) or "mpo_jax" in line:  # once the heavy imports have begun
        assert line, "it ended before"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = [line for line in process.stderr.read().split("\n") if line and not line.startswith("import time:")]
    assert process.wait() == 130 and told == ["stopped"], told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_moments_of_a_command_leaves_its_exit_code(number):
    code = (
        "import atexit, os, sys\n"
        f"atexit.register(lambda: os.kill(os.getpid(), {int(number)}))  # called last\n"
        "from mpo_jax import mpo\n"
        "sys.argv = ['mpo', '--version']\n"
        "mpo.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def parsed(monkeypatch, *arguments):
    """A config's flags as `mpo run` has them."""
    known, found = set(flags.FLAGS), {}

    def keep():
        found.update(workdir=flags.FLAGS.workdir, config=flags.FLAGS.config)

    monkeypatch.setattr(main, "work", keep)
    monkeypatch.setattr(sys, "argv", ["mpo run", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert not ended.value.code and set(flags.FLAGS) == known
    return found


def test_settings_may_come_before_the_config(monkeypatch):
    found = parsed(monkeypatch, "--config.data.limit=7", "--workdir=w", "--config=quickstart")
    assert (found["config"].data.limit, found["workdir"]) == (7, "w")


def test_settings_without_a_config_ask_for_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mpo run", "--config.data.limit=7", "--workdir=w"])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 1
    assert "--config: expected a config file, or the name of a shipped one" in capsys.readouterr().err


def test_the_home_folder_may_be_written_as_a_shell_leaves_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from mpo_jax import recipes\n\nget_config = lambda: recipes.config()\n")
    found = parsed(monkeypatch, "--workdir=~/runs", "--config=~/mine.py", "--config.data.path=~/a.jsonl")
    assert (found["workdir"], found["config"].data.path) == (f"{tmp_path}/runs", f"{tmp_path}/a.jsonl")


def test_commands_that_begin_in_one_process_leave_no_flag_behind(monkeypatch, capsys):
    known = set(flags.FLAGS)
    for name, (module, _) in mpo.COMMANDS.items():
        for given, code in (("--help", 0), ("--nonsense", 1)):
            monkeypatch.setattr(sys, "argv", [f"mpo {name}", given])
            with pytest.raises(SystemExit) as ended:
                importlib.import_module(module).run()
            assert ended.value.code == code and set(flags.FLAGS) == known, (name, given)
    assert "--seed" in capsys.readouterr().out
