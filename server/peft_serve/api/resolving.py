"""From the names in a call to the adapters that are meant, held so that no delete comes between.

An expression (`a+b`, `a:0.7+b@2:0.3`) is resolved part by part. What must be read from the disk for it is read on
threads of its own, and waited for only so long: a disk that does not answer keeps nobody else. Owns no hold: whoever
asks gives each back once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.names import Term, parse_expression, shown
from peft_serve.adapters.records import Resolved
from peft_serve.api.naming import BASE_NAME
from peft_serve.api.principal import Principal
from peft_serve.api.seen_catalog import SeenCatalog
from peft_serve.api.served import Served, ServedPart
from peft_serve.api.splitting import Draws
from peft_serve.api.store_threads import StoreThreads
from peft_serve.errors import InvalidParameter, Unavailable

PATIENCE_S: Final = 60.0
"""So long a store is waited for: the gate may look at a large checkpoint meanwhile."""


class Resolver:
    """See the module's docstring. `base_name` is the name that the base is served under."""

    def __init__(self, catalog: Catalog, base_name: str, *, patience_s: float = PATIENCE_S) -> None:
        self._catalog = catalog
        self._base_name = base_name
        self._patience_s = patience_s
        self._threads = StoreThreads(name="resolving")

    async def resolve(self, names: Sequence[str], principal: Principal, draws: Draws) -> dict[str, Served]:
        """Who answers to each name, every part held once for each name. Raises what `Catalog.resolve` raises, for
        adapters that the principal does not see as for those that there are not; Unavailable when the store does not
        answer."""
        served = {BASE_NAME: Served()}
        wanted = {name: self._terms(name) for name in dict.fromkeys(names) if name != BASE_NAME}
        if wanted:
            seen = SeenCatalog(self._catalog, principal)
            if all(seen.is_at_hand(term.ref) for terms in wanted.values() for term in terms):
                return served | self._held(wanted, seen, draws)
            served |= await self._read(wanted, seen, draws)
        return served

    async def _read(self, wanted: Mapping[str, tuple[Term, ...]], seen: SeenCatalog, draws: Draws) -> dict[str, Served]:
        """As `_held`, where the disk must be read for it."""
        work = asyncio.wrap_future(self._threads.submit(self._held, wanted, seen, draws))
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(work)
        except TimeoutError:
            work.add_done_callback(self._release_late)
            raise Unavailable(
                "the adapter store does not answer; adapters that are in use go on being served", retry_after_s=30.0
            ) from None
        except asyncio.CancelledError:
            work.add_done_callback(self._release_late)
            raise

    def hold(self, served: Served) -> Callable[[], None]:
        """Hold every part once more; what is returned gives it back, once however often it is called."""
        for part in served.parts:
            self._catalog.retain(part.resolved.id)
        held = [served]

        def release() -> None:
            if held:
                self.release(held.pop())

        return release

    def release(self, served: Served) -> None:
        for part in served.parts:
            self._catalog.release(part.resolved.id)

    def _terms(self, name: str) -> tuple[Term, ...]:
        terms = parse_expression(name)
        if len(terms) > 1 or terms[0].weight != 1.0:
            for term in terms:
                if term.ref in (BASE_NAME, self._base_name):
                    raise InvalidParameter(
                        f"adapter {shown(name)}: the base is part of every answer; name adapters only", param="adapter"
                    )
        return terms

    def _held(self, wanted: Mapping[str, tuple[Term, ...]], seen: SeenCatalog, draws: Draws) -> dict[str, Served]:
        found: list[Resolved] = []
        try:
            served = {}
            for name, terms in wanted.items():
                parts = []
                for term in terms:
                    resolved, alias = seen.answering(term.ref, draws)
                    found.append(resolved)
                    parts.append(ServedPart(resolved=resolved, weight=term.weight, alias=alias))
                served[name] = Served(name=_name(terms, parts), parts=tuple(parts))
        except BaseException:
            for resolved in found:
                self._catalog.release(resolved.id)
            raise
        return served

    def _release_late(self, work: asyncio.Future[dict[str, Served]]) -> None:
        if not work.cancelled() and work.exception() is None:
            for served in work.result().values():
                self.release(served)


def _name(terms: Sequence[Term], parts: Sequence[ServedPart]) -> str:
    """The name of one adapter as it is, without its version; else the expression."""
    if len({part.resolved.id for part in parts}) < len(parts):
        raise InvalidParameter(
            "adapter: two names of the combination stand for the same files; name them once, with a weight",
            param="adapter",
        )
    if len(terms) == 1 and terms[0].weight == 1.0:
        return parts[0].resolved.name
    return "+".join(term.ref if term.weight == 1.0 else f"{term.ref}:{term.weight:.12g}" for term in terms)
