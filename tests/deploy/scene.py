"""A scene enters: what a fake cloud is to do. A script runs in it; its output and all that it called leave."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = ROOT / "tests/tools/fake_cloud.py"
NAMES = ("gcloud", "kubectl", "docker", "sleep")


@dataclasses.dataclass(frozen=True)
class Scene:
    """folder: of the scene, see tests/tools/fake_cloud.py."""

    folder: Path

    def call(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(ROOT / script), *arguments], cwd=self.folder, env=self.environment(**environment),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if name not in ("UV", "HF_TOKEN")},
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(self.folder),
            "PYTHON": str(self.folder / "bin/python"),
            **more,
        }

    @property
    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def commands(self, *words: str) -> list[list[str]]:
        """Calls that have all of the words."""
        return [call for call in self.calls if all(any(word in each for each in call) for word in words)]

    @property
    def waits(self) -> list[int]:
        return [int(call[1]) for call in self.commands("sleep") if call[0] == "sleep"]


def make(folder: Path, **what: Any) -> Scene:
    """what: lists of what happens at each `create`, `describe`, `drop` and `runs` (of both hosts; runs-0: of one)."""
    (folder / "bin").mkdir(parents=True)
    (folder / "scene.json").write_text(json.dumps({name.replace("_", "-"): value for name, value in what.items()}))
    for name in (*NAMES, "python"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nFAKE_NAME={name} exec {sys.executable} -S {FAKE} "$@"\n')
        program.chmod(0o755)
    return Scene(folder)
