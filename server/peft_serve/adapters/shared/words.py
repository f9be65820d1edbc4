"""What a shared store says when it cannot be reached, or may not be written to: words that may be shown."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from peft_serve.adapters.store_words import NO_WRITING
from peft_serve.errors import AdapterUnavailable, StoreFull, Unavailable

RETRY_AFTER_S: Final = 5.0
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def reached(act: str) -> Iterator[None]:
    """Turn what the place says into StoreFull or Unavailable; `act` is what the store could not be: read or written."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreFull(
                "the adapter store has no room left; delete adapters that are not needed, or enlarge its disk"
            ) from error
        if error.errno in NO_WRITING:
            raise Unavailable(
                f"the adapter store may not be {act} by this server; what is in memory goes on being served, and the "
                "operator sets its rights or its credentials",
                retry_after_s=RETRY_AFTER_S,
            ) from error
        raise Unavailable(
            f"the adapter store cannot be {act} just now; adapters that are in use go on being served, and nothing is "
            "uploaded, changed or deleted until it answers",
            retry_after_s=RETRY_AFTER_S,
        ) from error


def out_of_reach(what: str) -> AdapterUnavailable:
    """An adapter's files, or a name's record, cannot be had just now."""
    return AdapterUnavailable(
        f"{what} cannot be read; the adapter store does not answer as it should", retry_after_s=RETRY_AFTER_S
    )
