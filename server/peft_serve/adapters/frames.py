"""Errors that are kept or handed on without what they hold in memory."""

from __future__ import annotations


def without_frames(error: Exception) -> Exception:
    """The error and its causes without tracebacks, whose frames would keep tensors and files' bytes alive with it."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
