"""What every inference route works with: the parts of the server, and the way into the engine.

Owns the engine's client, which belongs to one event loop and is made on it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Final

from starlette.requests import HTTPConnection

from peft_serve import __version__
from peft_serve.api.admission import Admission
from peft_serve.api.intake import Intake
from peft_serve.api.principal import principal_of
from peft_serve.api.quotas import Quotas
from peft_serve.api.seen_catalog import SeenCatalog
from peft_serve.api.store_threads import StoreThreads
from peft_serve.api.text_threads import TextThreads
from peft_serve.api.trial import Trial
from peft_serve.core import AdapterId
from peft_serve.engine.client import EngineClient
from peft_serve.engine.parts import ServerParts

MAX_NAMES: Final = 4096
"""Adapters whose names are remembered for metrics; the one that was asked for longest ago is forgotten first."""
MAX_NAMES_OF_ONE: Final = 4
"""Of an adapter that was published under several names, those that it was asked for by last."""


class Service:
    """One for each application. `now` gives unix seconds, `draw_bits(n)` n random bits."""

    def __init__(self, parts: ServerParts, *, now: Callable[[], float], draw_bits: Callable[[int], int]) -> None:
        self.parts = parts
        self.now = now
        self.started_s = now()
        self._draw_bits = draw_bits
        self.quotas = Quotas(parts.clock)
        self.store_threads = StoreThreads()
        self.text_threads = TextThreads(max_waiting=parts.settings.max_queue)
        self._admission: Admission | None = None
        self._trial: Trial | None = None
        self._names: dict[AdapterId, tuple[str, ...]] = {}
        self.intake = Intake(parts, self.trial, now=now, new_id=self.new_id)
        card = parts.base
        seen = f"{__version__} {card.name} {card.class_name} {card.dtype} {card.num_parameters}"
        self.system_fingerprint = "fp_" + hashlib.sha256(seen.encode()).hexdigest()[:10]

    def open(self) -> Admission:
        """The way in; called on the event loop's thread, first when the application starts."""
        if self._admission is None:
            loop = asyncio.get_running_loop()
            client = EngineClient(self.parts.engine, loop)
            self._admission = Admission(
                self.parts,
                client,
                self._draw_bits,
                learn=self.learn,
                quotas=self.quotas,
                threads=self.text_threads,
            )
            self._trial = Trial(self.parts, client, loop, new_id=self.new_id, learn=self.learn)
        return self._admission

    def trial(self) -> Trial:
        """What tries uploads out; called on the event loop's thread."""
        self.open()
        assert self._trial is not None, "it is made with the way in"
        return self._trial

    def seen(self, connection: HTTPConnection) -> SeenCatalog:
        """The catalog as whoever sent a request sees it."""
        return SeenCatalog(self.parts.catalog, principal_of(connection))

    def new_id(self, prefix: str = "") -> str:
        """An id that is not given twice."""
        return f"{prefix}{self._draw_bits(128):032x}"

    def learn(self, adapter: AdapterId, name: str) -> None:
        """Remember by which name an adapter was last asked for."""
        others = (each for each in self._names.pop(adapter, ()) if each != name)
        self._names[adapter] = (name, *others)[:MAX_NAMES_OF_ONE]
        if len(self._names) > MAX_NAMES:
            del self._names[next(iter(self._names))]

    def name_of(self, adapter: AdapterId) -> str:
        """The name an adapter was last asked for by; without one, the beginning of its digest."""
        return self.names_of(adapter)[0]

    def names_of(self, adapter: AdapterId) -> tuple[str, ...]:
        """The names it was lately asked for by, the last first; without one, the beginning of its digest."""
        return self._names.get(adapter) or (adapter[:19],)
