"""Damaged data, folders and settings enter the command line; one line leaves that names file, line or key, before
anything is compiled or written."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.tools.processes import ENVIRONMENT, ROOT

CONFIG = "--config=tests/configs/stories_hh.py:debug"


def cases(folder, shared) -> dict[str, tuple[list[str], list[str]]]:
    """name -> the flags of a wrong command, and the words its error has."""
    hh = shared / "data/hh_rlhf/harmless-base/test.jsonl.gz"
    lines = gzip.decompress(hh.read_bytes()).splitlines(keepends=True)
    stories = shared / "models/stories260K"

    def data(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        return f"--config.data.path={folder / name}"

    def model(name: str, change) -> str:
        shutil.copytree(stories, folder / name)
        change(folder / name)
        return f"--config.model.path={folder / name}"

    def pickled(place):
        (place / "model.safetensors").unlink()
        (place / "pytorch_model.bin").write_bytes(b"\x80")

    def settings(**changes):
        def change(place):
            path = place / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    choice = json.loads((shared / "data/tldr/comparisons.jsonl").read_text()) | {"choice": 2}
    every = "--config.data.limit=0"
    return {
        "truncated gzip": (
            [data("cut.jsonl.gz", hh.read_bytes()[:200_000]), every],
            ["cut.jsonl.gz", "truncated gzip"],
        ),
        "invalid JSON": (
            [data("bad.jsonl", b"".join([*lines[:1016], b'{"chosen": \n', *lines[1017:]])), every],
            ["bad.jsonl, line 1017", "invalid JSON"],
        ),
        "no column has both": (
            [data("column.jsonl", b'{"chosen": "a", "preferred": "b"}\n')],
            ["column.jsonl, line 1", "unrecognised columns chosen, preferred", "data.columns"],
        ),
        "reply of the wrong kind": (
            [data("kind.jsonl", lines[0] + b'{"chosen": 5, "rejected": "b"}\n')],
            ["kind.jsonl, line 2", "'chosen' is 5, expected text"],
        ),
        "choice 2": ([data("choice.jsonl", json.dumps(choice).encode())], ["choice.jsonl, line 1", "'choice'", "2"]),
        "empty data": ([data("empty.jsonl", b"")], ["empty.jsonl", "is empty"]),
        "no data": (["--config.data.path=nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        "unknown split": (["--config.data.split=validation"], ["unknown split 'validation'", "test"]),
        "no such column": (
            ["--config.data.columns.chosen=chosn"],
            ["data.columns.chosen: 'chosn' is no column of test.jsonl.gz; did you mean 'chosen'?"],
        ),
        "shares": (["--config.data.shares.eval=0.5"], ["data.shares.eval: shares", "add up to 1"]),
        "empty share": (["--config.stages.sft.share=policy"], ["share 'policy' holds no record"]),
        "long rows": (["--config.data.max_length=1024"], ["data.max_length: 1024", "512"]),
        "wrong vocabulary": (
            [model("vocabulary", settings(vocab_size=400))],
            ["vocabulary"],
        ),
        "pickled weights": ([model("pickled", pickled)], ["pickled", "safetensors"]),
        "unsupported model": ([model("unknown", settings(model_type="mamba"))], ["unknown", "mamba"]),
        "no config": ([model("bare", lambda place: (place / "config.json").unlink())], ["bare", "config.json"]),
        "mistyped key": (
            ["--config.stages.sft.learnig_rate=1"],
            ["stages.sft.learnig_rate: no such setting", "did you mean 'learning_rate'"],
        ),
        "unknown key": (["--config.colour=1"], ["colour: no such setting"]),
        "unknown stage": (["--stages=stf"], ["--stages", "'stf'", "'sft'"]),
        "stage without input": (["--config.stages.reward.init=stf"], ["stages.reward.init", "'stf'", "'sft'"]),
        "microbatch": (["--config.stages.sft.microbatch=3"], ["stages.sft.microbatch: 3", "batch_size 8"]),
        "mesh": (["--config.mesh.fsdp=3"], ["mesh", "3"]),
        "schedule": (["--config.stages.sft.schedule=cosin"], ["stages.sft.schedule: 'cosin'", "did you mean 'cosine'"]),
        "mistyped value": (["--config.stages.sft.learning_rate=fast"], ["learning_rate", "fast"]),
        "wrong range": (["--config.stages.sft.warmup=2"], ["stages.sft.warmup: 2.0; expected 1.0 or less"]),
        "not a number": (["--config.stages.sft.learning_rate=nan"], ["stages.sft.learning_rate: nan; expected"]),
        "no such config": (["--config=quickstrat"], ["--config: quickstrat", "did you mean 'quickstart'"]),
        "unknown flag": (["--worksdir=x"], ["worksdir"]),
        "attention": (
            ["--config.model.attention=flash", "--config.data.multiple=8"],
            ["flash needs rows of a multiple of 128", "found 8"],
        ),
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory, shared) -> dict[str, tuple[dict, list[str]]]:
    """name -> what came of a wrong command, and the words its error should have."""
    folder = tmp_path_factory.mktemp("bad")
    wrong = cases(folder, shared)
    places = {name: folder / f"run of {name}" for name in wrong}
    commands = [
        [
            "run",
            *([] if flags[0].startswith("--config=") else [CONFIG]),
            f"--workdir={places[name]}",
            *([] if flags[0].startswith("--stages") else ["--stages=sft"]),
            *flags,
        ]
        for name, (flags, _) in wrong.items()
    ]
    lines = json.dumps([{"arguments": each} for each in commands])
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.commands"],
        cwd=ROOT, env=os.environ | ENVIRONMENT, input=lines.encode(), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        name: (one | {"wrote": places[name].exists()}, words)
        for (name, (_, words)), one in zip(wrong.items(), found, strict=True)
    }


NAMES = (
    "truncated gzip", "invalid JSON", "no column has both", "reply of the wrong kind", "choice 2", "empty data",
    "no data", "unknown split", "no such column", "shares",
    "empty share", "long rows", "wrong vocabulary", "pickled weights", "unsupported model", "no config", "mistyped key",
    "unknown key", "unknown stage", "stage without input", "microbatch", "mesh", "schedule", "attention",
    "mistyped value", "wrong range", "not a number", "no such config", "unknown flag",
)  # fmt: skip


FOUND_BY_THE_STAGE = ("reply of the wrong kind", "choice 2", "empty share", "pickled weights")
"""In what single rows say, and in weights, which only the stage itself reads: its folder is there by then."""


@pytest.mark.parametrize("name", NAMES)
def test_one_line_before_any_compile(told, name):
    done, words = told[name]
    errors = [line for line in done["output"].splitlines() if line.startswith("error: ")]
    assert done["code"] == 1 and len(errors) == 1, done["output"][-2000:]
    assert "Traceback" not in done["output"]
    assert done["output"].rstrip().endswith(errors[0])
    for word in words:
        assert word in errors[0]
    assert done["compiles"] == 0
    assert done["wrote"] == (name in FOUND_BY_THE_STAGE)
