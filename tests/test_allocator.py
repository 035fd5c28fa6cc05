"""A card as nvidia-smi tells of it enters; whether a command may begin there, and what it is told, leaves."""

import os

import jax
import pytest

from mpo_jax import allocator, sharding
from mpo_jax.errors import InputError

LINE = "{index}, GPU-{index}, NVIDIA H100 80GB HBM3, 81559, {free}"


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """Puts an nvidia-smi in the path that tells of cards with so much free memory, MiB."""
    for name in (
        "JAX_PLATFORMS",
        "CUDA_VISIBLE_DEVICES",
        "XLA_PYTHON_CLIENT_PREALLOCATE",
        "XLA_PYTHON_CLIENT_ALLOCATOR",
        *allocator.FRACTIONS,
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(*free: int) -> None:
        lines = "\n".join(LINE.format(index=index, free=each) for index, each in enumerate(free))
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
        script.chmod(0o755)

    return make


def test_an_empty_card_is_taken(cards):
    cards(81_000)
    allocator.check_card()


def test_a_card_that_another_process_fills_is_one_sentence_that_says_what_would_work(cards):
    cards(40_000)
    with pytest.raises(InputError) as caught:
        allocator.check_card()
    told = str(caught.value)
    assert told.startswith(
        "GPU 0 (NVIDIA H100 80GB HBM3): 39.1 of 79.6 GiB are free, and this process would take 73.3;"
    )
    assert "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.47" in told and "\n" not in told


def test_a_share_that_the_environment_says_is_respected(cards, monkeypatch):
    cards(40_000)
    for name in allocator.FRACTIONS:
        monkeypatch.setenv(name, "0.47")
        allocator.check_card()
        monkeypatch.setenv(name, "0.6")
        with pytest.raises(InputError, match=r"would take 47\.8"):
            allocator.check_card()
        monkeypatch.delenv(name)


def test_only_visible_cards_count(cards, monkeypatch):
    cards(100, 81_000)
    with pytest.raises(InputError, match="or wait"):
        allocator.check_card()
    for visible in ("1", "GPU-1", "1,7"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        allocator.check_card()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_PLATFORMS", "cpu"),
        ("JAX_PLATFORMS", "tpu"),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform"),
    ],
)
def test_nothing_is_said_where_no_share_is_taken(cards, monkeypatch, name, value):
    cards(100)
    monkeypatch.setenv(name, value)
    allocator.check_card()


def test_a_word_that_xla_does_not_take_for_false_still_takes_the_share(cards, monkeypatch):
    cards(100)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "FALSE")
    with pytest.raises(InputError, match="would take"):
        allocator.check_card()


def test_two_names_of_one_share_are_refused_before_xla_does(cards, monkeypatch):
    cards(81_000)
    for name in allocator.FRACTIONS:
        monkeypatch.setenv(name, "0.5")
    with pytest.raises(InputError, match="both set"):
        allocator.check_card()


def test_an_empty_share_is_none(cards, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    allocator.restart()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"


def test_a_uuid_may_be_shortened_as_cuda_allows(cards, monkeypatch, tmp_path):
    cards(100)
    script = tmp_path / "nvidia-smi"
    script.write_text(script.read_text().replace("GPU-0", "GPU-5ae1c6fe-1f1c"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ae1")
    with pytest.raises(InputError, match="would take"):
        allocator.check_card()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-77")
    allocator.check_card()


def test_a_gpus_share_is_set_once_and_not_over_anothers(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for name in allocator.FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    allocator.restart()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    allocator.restart()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    allocator.restart()
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda': no card")])
def test_where_jax_finds_no_card_a_run_says_so_in_one_line(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(InputError, match=r"JAX finds no device \(JAX_PLATFORMS='cuda'\): (it says no more|Unable to)"):
        sharding.make_mesh()
