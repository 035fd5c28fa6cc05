"""Settings of every test: 8 virtual CPU devices, no hub, no silent rank promotion; fixtures for real data."""

import importlib.metadata
import os
import tempfile
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "24")  # three for each virtual device, see `processes.spare_threads`
# Nearly all of a test's time goes into compiling programs that run for milliseconds. Without LLVM's optimisation and
# the fusion emitters they compile in an eighth of the time, here and in the processes that tests start.
_quick = "--xla_backend_optimization_level=0"
# The same numbers on every processor: "auto" is float32 without AVX512-BF16.
_quick += " --xla_cpu_max_isa=AVX512"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # 0.11 knows no such flag, and ends the process
    _quick += " --xla_cpu_use_fusion_emitters=false"
    _quick += " --xla_cpu_parallel_codegen_split_count=1"  # of small programs, 32 parts cost more than the whole
    # On a machine that others use too, one of 8 virtual devices may wait for the rest for longer than the 40 s after
    # which XLA aborts the process.
    _quick += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{_quick} {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest

from tests.browser import browser  # noqa: F401 - a fixture

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same tiny programs; within one session, of several workers too, each is compiled once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="compiled_")
    os.environ["MPO_JAX_TEST_CACHE"] = _compiled.name
jax.config.update("jax_compilation_cache_dir", os.environ["MPO_JAX_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
IN_CI = os.environ.get("CI") == "true"


def absent(reason: str):
    """Skips; in CI, where everything is there, fails."""
    if IN_CI:
        pytest.fail(f"{reason}; this may not be missing in CI")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the project."""
    if not (SHARED / "data").is_dir():
        absent("no folder ../shared with real data")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared) -> Path:
    """stories260K: a real pretrained LLaMA in Hugging Face form."""
    return shared / "models" / "stories260K"


@pytest.fixture(scope="session", autouse=True)
def quick_processes():
    """Whatever tests start begins as where torch is not installed, and compiles nothing that was compiled before; not
    so pytest's own workers, which begin before."""
    from tests.tools import processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", processes.WITHOUT_TORCH, prepend=os.pathsep)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["MPO_JAX_TEST_CACHE"])
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
        yield


@pytest.fixture(scope="session")
def gcs_server():
    """A fake of Google Cloud Storage, of which this process and those that it starts are told."""
    from gcsfs import retry

    from mpo_jax import locks
    from tests.tools import fake_gcs

    async def moment(_):
        """Instead of the seconds before the next try: what fails here works at the next call."""

    with fake_gcs.Server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=moment))
        patch.setattr(locks, "_MOMENT", 0.05)  # this store shows at once what was written
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def gcs(gcs_server, tmp_path, monkeypatch):
    """The server, and a scratch folder of the test's own."""
    monkeypatch.setenv("MPO_SCRATCH", str(tmp_path / "scratch"))
    yield gcs_server
    gcs_server.fail_every = 0


@pytest.fixture(scope="session")
def torch():
    """PyTorch, for parity with what we didn't write."""
    try:
        import torch
    except ImportError:
        absent("torch is not installed")
    torch.manual_seed(0)
    return torch


def pytest_collection_modifyitems(config, items):
    """Long proofs run only when asked for: `-m slow`, or by their node id. Without a GPU, what needs one is skipped."""
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    if config.getoption("-m") or any("::" in argument for argument in config.args):
        return
    skip = pytest.mark.skip(reason="long proof; run with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)
