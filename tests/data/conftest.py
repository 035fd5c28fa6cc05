"""Fixtures of the data tests: the cases that users brought, the model folders made for them, small files."""

import json
import runpy
import sys

import pytest

from mpo_jax.data.sources import load
from mpo_jax.errors import InputError
from tests.conftest import absent

QUESTION = "Name {} things that float on a pond."
GOOD, BAD = "A leaf, a duck and a boat number {}.", "Stones, number {}."


@pytest.fixture(scope="session")
def cases(shared):
    """Files as users bring them."""
    folder = shared / "cases" / "data"
    if not folder.is_dir():
        absent("no folder ../shared/cases")
    return folder


@pytest.fixture(scope="session")
def models(shared, tmp_path_factory):
    """Model folders as users bring them, made by the script beside the cases."""
    script, folder = shared / "cases" / "make_models.py", tmp_path_factory.mktemp("models")
    if not script.exists():
        absent("no ../shared/cases/make_models.py")
    before = sys.argv
    sys.argv = [str(script), str(folder)]
    try:
        runpy.run_path(str(script))
    finally:
        sys.argv = before
    return folder


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows as JSON lines; the path."""

    def write(rows, name="a.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return str(path)

    return write


@pytest.fixture
def fails():
    """Asserts that reading a path is an error of one line with the words given; the message."""

    def check(path, *words, split="train", **kwargs):
        with pytest.raises(InputError) as caught:
            load(str(path), split, **kwargs)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 3000
        for word in words:
            assert word in message, (word, message)
        return message

    return check
