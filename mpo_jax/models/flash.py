"""Placeholder to be replaced by the splash backend."""

from typing import NamedTuple


class Slots(NamedTuple):
    prompt: int
    responses: int
    length: int


def attend(config, q, k, v, positions, segments, window, slots):
    raise RuntimeError
