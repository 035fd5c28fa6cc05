"""The items of a long piece of work enter, one by one; they leave as they came, while how far it has come is shown."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def each(items: Iterable[T], what: str, total: int, done: int = 0) -> Iterator[T]:
    """The items as they come. what: the work, in a word or two, as "sample" or "score". total: how many items the whole
    work has, those that were done before (`done`) among them."""
    yield from items
