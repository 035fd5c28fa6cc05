"""A command enters; it runs in several processes over loopback, each with its CPU devices, as on several hosts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "JAX_NUM_CPU_DEVICES": "1",
    "PYTHONUNBUFFERED": "1",
}
WITHOUT_TORCH = str(ROOT / "tests" / "tools" / "without_torch")
"""First on PYTHONPATH, it lets a process start as where torch is not installed, seconds sooner."""
PATH = f"{WITHOUT_TORCH}{os.pathsep}{ROOT}"
"""PYTHONPATH of a process that is started in a folder of its own."""


PLAIN_SIGNALS = ["env", "--default-signal=TERM,INT,HUP"]
"""Before a script: its traps then hear the signals that whoever runs the tests ignores, as nohup does; a shell can't
trap what was ignored when it began."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(
    count: int, arguments: list[str], log: Path, script: str = "mpo_jax.main", devices: int = 1
) -> list[subprocess.Popen]:
    """`count` processes of a module, told of each other; each writes to LOG.index. One process is told of none.

    devices: of each process.
    """
    environment = {**os.environ, **ENVIRONMENT, "JAX_NUM_CPU_DEVICES": str(devices)}
    port = free_port()
    found = []
    for index in range(count):
        joined = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={index}"]
        command = [sys.executable, "-m", script, *arguments, *(joined if count > 1 else [])]
        with log.with_suffix(f".{index}").open("w") as file:
            found.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT))
    return found


def finish(processes: list[subprocess.Popen], timeout: float = 3600) -> list[int]:
    """Exit codes; what is left at the end of the time is killed."""
    try:
        return [each.wait(timeout) for each in processes]
    finally:
        for each in processes:
            if each.poll() is None:
                each.kill()


def run(count: int, arguments: list[str], log: Path, script: str = "mpo_jax.main", devices: int = 1) -> None:
    """AssertionError, with the end of a log, where a process fails."""
    codes = finish(start(count, arguments, log, script, devices))
    for index, code in enumerate(codes):
        assert code == 0, log.with_suffix(f".{index}").read_text()[-4000:]
