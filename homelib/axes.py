"""The three axes of a volume: a tuple of as many values, which its type says too."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def three(values: Iterable[T]) -> tuple[T, T, T]:
    """One value an axis.

    >>> three(2 * size for size in (4, 5, 6))
    (8, 10, 12)
    """
    first, second, third = values
    return first, second, third
