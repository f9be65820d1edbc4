"""A list of a million wrong items is one error."""

from __future__ import annotations

from typing import Final

from pydantic import FailFast


class _FirstError(FailFast):
    """pydantic's own is not hashable in every version, as a member of a union must be."""

    __hash__ = object.__hash__


FAIL_FAST: Final = _FirstError()
"""For lists in bodies: the first wrong item ends the reading."""
