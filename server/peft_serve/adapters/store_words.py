"""What a store says when its disk refuses something: words that may be shown, and no path among them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from peft_serve.errors import AdapterUnavailable, StoreFull, Unavailable

NO_WRITING: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
"""What a disk answers that this process may not write to."""

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RETRY_AFTER_S: Final = 30.0


@contextmanager
def told(act: str) -> Iterator[None]:
    """Turn what the disk says into StoreFull or Unavailable; `act` is what the store could not be: opened, read, ..."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreFull(
                "the adapter store has no room left; delete adapters that are not needed, or enlarge its disk"
            ) from error
        if error.errno in NO_WRITING and act == "written":
            raise Unavailable(
                "the adapter store is read-only: its adapters are served, and none can be uploaded, changed or "
                "deleted; let the server write to it (one that could not when it started has to be started again)",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        raise Unavailable(
            "the adapter store cannot be " + act + "; its disk may be failing or read-only",
            retry_after_s=_RETRY_AFTER_S,
        ) from error


def unreadable_blob() -> AdapterUnavailable:
    """The disk does not give an adapter's files just now."""
    return AdapterUnavailable(
        "the adapter's files cannot be read; the server's disk may be failing", retry_after_s=_RETRY_AFTER_S
    )


def unreadable_record(name: str) -> AdapterUnavailable:
    """The disk does not give a name's record just now."""
    return AdapterUnavailable(
        f"adapter '{name}': its record cannot be read; the server's disk may be failing", retry_after_s=_RETRY_AFTER_S
    )


def damaged_record(name: str) -> AdapterUnavailable:
    """A name's record is not what was written."""
    return AdapterUnavailable(
        f"adapter '{name}': its record on the server's disk is damaged; "
        "the operator can restore it from a backup, or remove it and upload the adapter again"
    )
