"""Taking adapters out of an engine's memory whose names were deleted."""

from __future__ import annotations

from collections.abc import Collection

from peft_serve.adapters.combined import is_combined, parts_of
from peft_serve.core import AdapterId
from peft_serve.engine.client import EngineThread
from peft_serve.engine.snapshot import EngineSnapshot


def let_go(engine: EngineThread, adapters: Collection[AdapterId]) -> None:
    """Give back their memory and that of combinations with them, as soon as no request runs on them."""
    for adapter in {*adapters, *_made_of(adapters, engine.snapshot())}:
        engine.set_pinned(adapter, pinned=False)
        engine.unload(adapter)


def _made_of(adapters: Collection[AdapterId], snapshot: EngineSnapshot) -> set[AdapterId]:
    """The combinations in memory that one of these is a part of."""
    loaded = {*snapshot.host_adapters, *(resident.adapter for resident in snapshot.resident)}
    return {each for each in loaded if is_combined(each) and any(part.id in adapters for part in parts_of(each))}
