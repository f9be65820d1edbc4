"""What a server takes up again after a start, beside the first requests: pins, and what a crash left half done.

Both read records of names, which may be many, and a pin may read a checkpoint. A failure is told and costs only
itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Final

from peft_serve.adapters.catalog import Catalog
from peft_serve.core import AdapterId
from peft_serve.engine.client import EngineThread
from peft_serve.errors import AdapterInvalid, ServeError, UnknownAdapter

_LOG: Final = logging.getLogger(__name__)


def resume_beside(catalog: Catalog, engine: EngineThread) -> threading.Thread:
    """Do it on a thread that ends with the process; a disk that does not answer holds up nothing else."""
    thread = threading.Thread(target=resume, args=(catalog, engine), name="resuming", daemon=True)
    thread.start()
    return thread


def resume(catalog: Catalog, engine: EngineThread) -> None:
    """Pin what was pinned, and remove the files that no name stands for."""
    try:
        _pin_again(catalog, engine)
        num_removed = catalog.changes.collect()
    except ServeError as error:
        _LOG.warning("not everything of before the start is taken up again: %s", error.message)
        return
    if num_removed:
        _LOG.info("removed the files of %d checkpoints that no name stands for", num_removed)


def pin_all(catalog: Catalog, engine: EngineThread, pins: Mapping[AdapterId, str]) -> None:
    """Pin what others have pinned, beside what is pinned already."""
    num_before = len(catalog.pins.all().keys() - pins.keys())
    _pin(catalog, engine, pins, num_free=engine.snapshot().num_pinnable - num_before)


def _pin_again(catalog: Catalog, engine: EngineThread) -> None:
    _pin(catalog, engine, catalog.pins.all(), num_free=engine.snapshot().num_pinnable)


def _pin(catalog: Catalog, engine: EngineThread, pins: Mapping[AdapterId, str], *, num_free: int) -> None:
    """Pin within so many slots: one stays free for everybody else."""
    for adapter, name in sorted(pins.items(), key=lambda pin: pin[1]):
        if num_free <= 0:
            _LOG.warning("adapter '%s' is not pinned again: there are fewer slots than there were", name)
            continue
        try:
            catalog.resolve(f"{name}@{adapter}")
        except (UnknownAdapter, AdapterInvalid):
            if not catalog.is_shared:  # else it may be younger than what is known here
                catalog.pins.remove([adapter])  # it is gone, or another base is served
            continue
        except ServeError as error:
            _LOG.warning("adapter '%s' is pinned and cannot be loaded: %s", name, error.message)
        else:
            engine.load(adapter)
        engine.set_pinned(adapter, pinned=True)
        num_free -= 1
