"""Stands for `gcloud`, `kubectl`, `docker`, `sbatch`, `sleep` and a host's Python, by the name that it is called by.

Arguments are checked against the public reference; what is not in it ends with 2, as the real parsers end. Hosts are
folders: `ssh` runs its command there by bash, for every host, `scp` copies files there. FAKE names the folder of the
scene: scene.json (what is to happen), state (of the slice), calls.jsonl (what was called), hosts/0 and hosts/1.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

SCENE = Path(os.environ["FAKE"])
ANY, WORD, NUMBER, NONE = r".+", r"[a-z]([a-z0-9-]*[a-z0-9])?", r"[1-9]\d*", None
WHERE = {"--project": WORD, "--zone": r"[a-z]+-[a-z]+\d-[a-z]"}
HOSTS = {
    **WHERE,
    "--node": r"all|\d+(,\d+)*|\d+-\d+",
    "--worker": r"all|\d+(,\d+)*|\d+-\d+",
    "--batch-size": r"all|\d+",
}
REFERENCE = {
    # https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create and its neighbours
    "gcloud compute tpus queued-resources create": {
        **WHERE, "--node-id": WORD, "--node-count": NUMBER, "--node-prefix": WORD,
        "--accelerator-type": r"v\d\w*-\d+", "--runtime-version": r"[a-z0-9.-]+", "--spot": NONE,
    },
    "gcloud compute tpus queued-resources describe": {**WHERE, "--format": r"value\([a-z.]+\)"},
    "gcloud compute tpus queued-resources delete": {**WHERE, "--force": NONE, "--quiet": NONE},
    "gcloud compute tpus queued-resources ssh": {**HOSTS, "--command": ANY},
    "gcloud compute tpus queued-resources scp": HOSTS,
    # https://cloud.google.com/sdk/gcloud/reference/storage/ls
    "gcloud storage ls": {},
    # https://kubernetes.io/docs/reference/kubectl/generated/
    "kubectl apply": {"--filename": ANY},
    "kubectl create secret generic": {
        "--from-file": r"\w+=.+", "--dry-run": "client|server|none", "--output": "yaml|json",
    },
    "kubectl get": {"--output": "wide|yaml|json", "--selector": ANY},
    "kubectl delete": {},
    "kubectl logs": {"--follow": NONE, "--selector": ANY},
    # https://docs.docker.com/reference/cli/docker/buildx/build/
    "docker build": {"--build-arg": r"\w+=.*", "--file": ANY, "--tag": ANY},
    "docker push": {},
}  # fmt: skip


def parse(words: list[str]) -> tuple[str, dict[str, str], list[str]]:
    """Command, flags and the rest. Exits with 2 for what the reference does not know."""
    line = " ".join(words)
    command = max((each for each in REFERENCE if f"{line} ".startswith(f"{each} ")), key=len, default="")
    if not command:
        refuse(f"unknown command: {line}")
    flags, rest = {}, []
    left = iter(words[len(command.split()) :])
    for word in left:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            rest.append(word)
            continue
        if name not in REFERENCE[command]:
            refuse(f"unrecognized arguments: {word}")
        form = REFERENCE[command][name]
        if form is NONE:
            if equals:
                refuse(f"{name} takes no value")
        else:
            value = value if equals else next(left, "")
            if not re.fullmatch(form, value, re.DOTALL):
                refuse(f"{name}: {value!r} is not {form}")
        flags[name] = value
    return command, flags, rest


def refuse(why: str) -> None:
    print(f"FAKE: {why}", file=sys.stderr)
    sys.exit(2)


def scene() -> dict:
    return json.loads((SCENE / "scene.json").read_text())


def following(what: str, default):
    """The next of a list of the scene; its last again and again."""
    found = scene().get(what, [default])
    counter = SCENE / f"count-{what}"
    index = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(index + 1))
    return found[min(index, len(found) - 1)]


def state(new: str | None = None) -> str:
    file = SCENE / "state"
    if new is not None:
        file.write_text(new)
    return file.read_text() if file.exists() else "NONE"


def gcloud(command: str, flags: dict[str, str], rest: list[str]) -> int:
    action = command.split()[-1]
    if action == "ls":
        objects = SCENE / "objects"
        print(objects.read_text() if objects.exists() else "")
        return 0
    if action == "create":
        if not ("--node-id" in flags) ^ ("--node-count" in flags):
            refuse("exactly one of --node-id, --node-count")
        if state() != "NONE":
            print("ERROR: ALREADY_EXISTS", file=sys.stderr)
            return 1
        found = following("create", "ACTIVE")
        if isinstance(found, int):
            return found
        shutil.rmtree(SCENE / "hosts", ignore_errors=True)
        for index in range(2):
            (SCENE / f"hosts/{index}").mkdir(parents=True)
        state(found)
        return 0
    if action == "delete":
        state("NONE")
        return 0
    if action == "describe":
        found = following("describe", "") or state()
        if found == "NONE":
            print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
            return 1
        if found == "UNKNOWN":
            print("ERROR: (gcloud) There was a problem refreshing your tokens", file=sys.stderr)
            return 1
        print(found)
        return 0
    if state() != "ACTIVE":
        print("ERROR: (gcloud) the node is not READY", file=sys.stderr)
        return 1
    chosen = sorted((SCENE / "hosts").iterdir())
    chosen = chosen if flags["--worker"] == "all" else [chosen[int(flags["--worker"])]]
    if action == "scp":
        source, target = rest
        for host in chosen:
            shutil.copy(source, host / target.partition(":")[2])  # with its mode, as scp sends it
        return 0
    begun = [
        subprocess.Popen(
            ["bash", "-c", flags["--command"]], cwd=host, env={**os.environ, "HOME": str(host)}, start_new_session=True
        )
        for host in chosen
    ]
    if "host.sh run" in flags["--command"] and following("drop", False):  # ssh is cut: the remote shell is hung up
        time.sleep(1.5)
        for each in begun:
            os.killpg(each.pid, 1)
        return 255
    return next((code for code in [each.wait() for each in begun] if code), 0)


def python(words: list[str]) -> int:
    """A host's Python, and what `-m venv` makes of it. The run does what the scene says of this start."""
    if words[:2] == ["-m", "venv"]:
        target = Path(words[2]) / "bin"
        target.mkdir(parents=True)
        (target / "python").write_text(f'#!/bin/sh\nFAKE_NAME=python exec {sys.executable} {__file__} "$@"\n')
        (target / "python").chmod(0o755)
    if words[:2] != ["-m", "mpo_jax.main"]:
        return 0
    host = Path(os.environ["HOME"]).name
    found = following(f"runs-{host}" if f"runs-{host}" in scene() else "runs", {})
    token = os.environ.get("HF_TOKEN_PATH", "")
    print(
        json.dumps({"host": host, "arguments": words[2:], "token": bool(token and Path(token).read_text())}), flush=True
    )
    time.sleep(found.get("seconds", 0))
    if "state" in found:
        state(found["state"])
    if "object" in found:
        with (SCENE / "objects").open("a") as file:
            file.write(found["object"] + "\n")
    code = found.get("code", 0)
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


def main() -> int:
    name = os.environ.get("FAKE_NAME") or Path(sys.argv[0]).name
    words = sys.argv[1:]
    with (SCENE / "calls.jsonl").open("a") as file:
        file.write(json.dumps([name, *words]) + "\n")
    if name == "sleep":
        return 0
    if name == "python":
        return python(words)
    command, flags, rest = parse([name, *words])
    if name == "gcloud":
        return gcloud(command, flags, rest)
    if command == "kubectl create secret generic":
        print("data: " + Path(flags["--from-file"].partition("=")[2]).read_text())
    if command in ("kubectl apply", "docker build"):
        given = flags["--filename"] if name == "kubectl" else "-"
        (SCENE / f"{name}.given").write_bytes(sys.stdin.buffer.read() if given == "-" else Path(given).read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
