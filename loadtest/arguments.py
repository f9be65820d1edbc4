"""Values on the command line: what does not fit an option is refused in words that say what would.

argparse shows the words of an `ArgumentTypeError` only, and of nothing else.
"""

from argparse import ArgumentTypeError
from collections.abc import Callable
from math import isfinite
from typing import TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")


def whole_from(least: int) -> Callable[[str], int]:
    """Whole numbers that are no less than `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is no whole number; write one from {least} on") from None
        if number < least:
            raise ArgumentTypeError(f"{number} is too small; write a whole number from {least} on")
        return number

    return read


def above_zero(text: str) -> float:
    """A finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no number; write one above zero") from None
    if not (isfinite(number) and number > 0):
        raise ArgumentTypeError(f"{text} does not do here; write a number above zero")
    return number


def in_words(read: Callable[[str], T]) -> Callable[[str], T]:
    """`read`, whose ValueError is shown."""

    def told(text: str) -> T:
        try:
            return read(text)
        except ValueError as problem:
            raise ArgumentTypeError(str(problem)) from None

    return told


def popularity(text: str) -> str:
    """The name of a popularity that there is."""
    from loadtest.popularity import parse_popularity  # with numpy, which `gpu-check` may find missing

    in_words(parse_popularity)(text)
    return text


def address(text: str) -> str:
    """A server's address without a path, for instance ``http://localhost:8000``."""
    if not text.startswith(("http://", "https://")):
        raise ArgumentTypeError(f"{text!r} lacks its scheme; write http://{text}")
    try:
        where = urlsplit(text)
        is_whole = bool(where.hostname) and where.port != 0
    except ValueError as problem:
        raise ArgumentTypeError(
            f"{text!r} is no address ({problem}); write for instance http://localhost:8000"
        ) from None
    if not is_whole:
        raise ArgumentTypeError(f"{text!r} is no address; write for instance http://localhost:8000")
    root = f"{where.scheme}://{where.netloc}"
    if text.rstrip("/") != root:
        raise ArgumentTypeError(f"{text!r} has more than a host and a port; write {root}")
    return root
