"""What each route asks of a key: one table, and no route beside it.

An address is looked up with the router's own patterns. Where several of them fit, all must be satisfied: so it does not
matter which the router takes, and an address that none fits is let in nowhere. A test walks the application's routes
and `docs/reference/access.md` against the table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from starlette.routing import compile_path

from peft_serve.api.principal import Scope


class Need(StrEnum):
    """Which keys a route is for. Every key with the scope admin may use every route."""

    NONE = "public"
    ANY = "any key"
    INFER = "infer"
    UPLOAD = "upload"
    ADMIN = "admin"

    def is_met(self, scopes: Collection[Scope]) -> bool:
        if Scope.ADMIN in scopes or self is Need.NONE:
            return True
        return bool(scopes) if self is Need.ANY else self.value in scopes


@dataclass(frozen=True, slots=True)
class Entry:
    """One route: its methods, its template, and its need."""

    methods: str
    template: str
    need: Need


_ROUTES: Final = """
public   GET       /livez /readyz /health
public   GET       /docs /openapi.json /ui /ui/{path:path}
public   GET       /
infer    POST      / /generate /generate_stream /classify /classify_batch /embed /tokenize
infer    POST      /v1/completions /v1/chat/completions /v1/embeddings
any key  GET       /info /v1/models /v1/models/{model:path} /v1/events
any key  GET       /adapters /adapters/{name} /adapters/{name}/versions
any key  GET       /aliases /aliases/{name}
upload   GET       /adapters/{name}/archive /adapters/jobs/{id}
upload   POST      /adapters /adapters/validate /adapters/{name}/rollback
upload   POST      /aliases/{name}/rollback
upload   PUT       /adapters/{name} /aliases/{name}
upload   DELETE    /adapters/{name} /aliases/{name}
upload   POST      /v1/load_lora_adapter /v1/unload_lora_adapter
admin    POST      /adapters/{name}/pin /adapters/{name}/unpin /adapters/{name}/load /adapters/{name}/unload
admin    GET       /metrics /metrics/gateway
"""


def _entries(text: str) -> tuple[Entry, ...]:
    found = []
    for line in text.strip().splitlines():
        need, methods, templates = re.split(r"  +", line, maxsplit=2)
        found += [Entry(methods, template, Need(need)) for template in templates.split()]
    return tuple(found)


ENTRIES: Final = _entries(_ROUTES)


class RouteNeeds:
    """The table, ready to be asked."""

    def __init__(self, entries: Iterable[Entry] = ENTRIES) -> None:
        self._plain: dict[str, list[Entry]] = {}
        self._patterns: list[tuple[re.Pattern[str], Entry]] = []
        for entry in entries:
            if "{" in entry.template:
                self._patterns.append((compile_path(entry.template)[0], entry))
            else:
                self._plain.setdefault(entry.template, []).append(entry)

    def of(self, method: str, path: str) -> frozenset[Need]:
        """The needs of every route that may answer; none: no route does."""
        return frozenset(entry.need for entry in self._at(path) if method in entry.methods.split("|"))

    def methods(self, path: str) -> frozenset[str]:
        """The methods that the routes at the address have; none: there is no route."""
        return frozenset(method for entry in self._at(path) for method in entry.methods.split("|"))

    def _at(self, path: str) -> Iterable[Entry]:
        yield from self._plain.get(path, ())
        for pattern, entry in self._patterns:
            if pattern.match(path):
                yield entry
