"""A folder, a seed and a count enter; that many command lines of `mpo` leave, most of them wrong in one way or two.

`prepare` fills the folder with what people name by mistake: files that are missing, empty, no text, cut, that never
end, folders in place of files and files in place of folders. Of what comes of a line, `wrong` says whether any command
may do it.
"""

import gzip
import importlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from mpo_jax import command, mpo
from mpo_jax import settings as declared

WORDS = (
    "", " ", "abc", "-1", "0", "1", "1.5", "nan", "inf", "1e999", "9" * 30, "true", "None", "a,b", ",", "sft", "sft,",
    "stf", "evaluate", "base", "\u2028", "é" * 200, "x" * 300, "a\nb", "%s", "{}", "[", "~", "../..", "--", "v5e:4x8",
    "v5e:0x0", "gpu:", "gpu:-1GB", "cpu", "http://", "gs://nowhere/x", "hf://", "tfds:nothing", "tfds:",
    "quickstart:no", "quickstart:",
)  # fmt: skip
NOWHERE = ("/dev/null/x", "/proc/none", "/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem", "/sys")
FILES = {
    "empty": b"", "empty.py": b"", "empty.jsonl": b"", "empty.jsonl.gz": b"", "empty.json": b"", "empty.parquet": b"",
    "binary": bytes(range(256)) * 9, "binary.py": bytes(range(256)), "binary.jsonl": bytes(range(255, 0, -1)),
    "latin.py": b"x = '\xe9'\n", "latin.jsonl": b'{"prompt": "\xe9", "chosen": "a", "rejected": "b"}\n',
    "cut.jsonl.gz": gzip.compress(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 50)[:40],
    "text.jsonl.gz": b"text", "text.txt": b"text\n", "broken.parquet": b"PAR1" + bytes(99) + b"PAR1",
    "deep.json": b"[" * 100_000, "deep.jsonl": b'{"a":' * 50_000, "null.jsonl": b"null\n", "numbers.jsonl": b"1\n2\n",
    "syntax.py": b"def get_config(:\n", "raises.py": b"1 / 0\n", "none.py": b"def get_config():\n    pass\n",
    "exits.py": b"import sys\nsys.exit(3)\n", "argument.py": b"def get_config(a, b):\n    return a\n",
    "imports.py": b"import nothing_of_the_kind\n", "config.json": b"{}",
}  # fmt: skip


def prepare(folder: Path, stories: Path, data: Path) -> list[str]:
    """Fills the folder; the command that makes its run. stories: a model's folder. data: a file of pairs."""
    (folder / "config.py").write_text(
        "from mpo_jax import recipes\n"
        "def get_config():\n"
        "    config = recipes.config()\n"
        f"    config.model.path = {str(stories)!r}\n"
        f"    config.data.update(dict(path={str(data)!r}, split='all', limit=60, max_length=64, max_response=16))\n"
        "    config.data.shares = {'sft_reward': 0.4, 'policy': 0.0, 'eval': 0.6}\n"
        "    config.stages.sft = recipes.stage('sft', steps=1, batch_size=2)\n"
        "    config.stages.evaluate = recipes.stage('evaluate', policies=('base', 'sft'), baseline='base', reward='',\n"
        "        prompts='', labeller='vader', count=2, batch_size=2, max_new_tokens=4)\n"
        "    return config\n"
    )
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for name in ("folder", "full", "model", "list", "names"):
        (folder / name).mkdir()
    (folder / "full" / "file").write_text("text")
    (folder / "model" / "config.json").write_text("{")
    (folder / "list" / "stages.json").write_text("[1]")
    (folder / "names" / "stages.json").write_text('{"sft": "sft-0", "dpo": "../.."}')
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    os.mkfifo(folder / "fifo.jsonl")
    return ["run", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"]


def damage(folder: Path) -> None:
    """Copies of the finished run that lack something, or hold something else."""
    for name, text in (("cut", ""), ("other", "{}"), ("listed", "[]")):
        shutil.copytree(folder / "run", folder / f"run_{name}")
        for place in (folder / f"run_{name}").glob("*-*"):
            (place / "manifest.json").write_text(text)
    shutil.copytree(folder / "run", folder / "run_lacks")
    for file in (folder / "run_lacks").glob("*-*/*.json*"):
        if file.name != "manifest.json":
            file.unlink()


def lines(folder: Path, stories: Path, seed: int, count: int) -> Iterator[dict]:
    """`count` lines, as `tests.tools.commands` takes them, the commands in turn."""
    draw = random.Random(seed)
    things = [str(path) for path in sorted(folder.iterdir())]
    settings = [f"--config.{name}" for name in _settings()]
    config, run = folder / "config.py", folder / "run"
    right: list[tuple[str, dict]] = [
        ("run", {"config": config, "workdir": run, "stages": "sft", "dry_run": True}),
        ("plan", {"config": config, "topology": "gpu:80GB", "stages": "sft"}),
        ("show", {"config": config, "split": "test", "index": 1}),
        ("sample", {"model": stories, "prompt": "Once", "max_new_tokens": 2}),
        ("export", {"stage": run / "sft", "output": folder / "exported"}),
        ("annotate", {"run": run, "export": folder / "judged.csv"}),
        ("report", {"run": run}),
        ("runs", {"runs": run}),
        ("run", {"config": config, "workdir": run, "stages": "sft"}),
        ("show", {"data_path": folder / "latin.jsonl", "tokenizer": stories}),
        ("sample", {"model": run / "sft", "prompt": "Once", "max_new_tokens": 2}),
        ("export", {"stage": run / "sft", "output": "made"}),
    ]
    names = {name: flags_of(name) for name in mpo.COMMANDS}

    def odd() -> str:
        return draw.choice(draw.choice((WORDS, NOWHERE, things, things)))

    for number in range(count):
        name, values = right[number % len(right)]
        given, extra = {flag: str(value) for flag, value in values.items()}, []
        for _ in range(draw.choice((1, 1, 2))):
            flag, how = draw.choice(names[name]), draw.randrange(10 if "config" in names[name] else 7)
            if how < 4:
                given[draw.choice([*given, flag])] = odd()
            elif how == 4 and given:
                del given[draw.choice(list(given))]
            elif how == 5:
                extra.append(draw.choice((f"--{flag}", f"--no{flag}", f"-{flag}", f"--{flag}s={odd()}")))
            elif how == 6:
                wild = ("--undefok=x", "--flagfile=/dev/null/x", "-h", "--", "--=", "-")
                extra.append(draw.choice((odd(), f"--{flag}={odd()}", *wild)))
            else:
                read = ("--config.data.path", "--config.model.path", "--config.data.split", "--config.plugins")
                extra.append(f"{draw.choice(draw.choice((read, settings)))}={odd()}")
        serves = name == "annotate" and "export" not in given
        yield {
            "arguments": [name, *(f"--{flag}={value}" for flag, value in given.items()), *extra],
            "interrupt": 3.0 if serves else draw.choice((*(None,) * 19, draw.uniform(0, 1))),
        }


def _settings() -> Iterator[str]:
    """Of a run, and of its two stages."""
    sections = command.run_sections()
    yield from (line.name for line in declared.lines(sections["--config."]))
    for kind in ("sft", "evaluate"):
        yield from (
            f"stages.{kind}.{line.name}" for line in declared.lines(sections[f"--config.stages.NAME. of kind {kind}"])
        )


def flags_of(name: str) -> list[str]:
    """The flags that a command defines."""
    known = set(flags.FLAGS)
    importlib.import_module(mpo.COMMANDS[name][0]).define()
    own = sorted(set(flags.FLAGS) - known)
    for each in own:
        delattr(flags.FLAGS, each)
    return own


def wrong(code: int, output: str) -> str:
    """What a command must not do, whatever it was given; "" where it did none of it."""
    last = output.rstrip().split("\n")[-1]
    if "Traceback" in output or "most recent call" in output:
        return "a traceback"
    if code == 0 or code == 130:
        return (
            "" if not last.startswith("error: ") and (not code or last.startswith("stopped")) else "another exit code"
        )
    if code == 2 and "NOT every stage fits" in last:  # what `plan` was asked
        return ""
    if code == 1 and last.startswith("error: ") and last.removeprefix("error: ").strip():
        return ""
    return f"exit code {code} without an error as the last line"


def told(line: dict, found: dict) -> str:
    return f"{json.dumps(line, ensure_ascii=False)}\n{found['code']}: {found['output'][-3000:]}"
