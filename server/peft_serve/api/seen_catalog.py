"""The catalog as one key sees it: what its adapters do not cover does not exist.

A name that is not seen takes the way of one that nobody published, through the same look-ups, and is refused in the
same words: neither the answer nor its time tells the two apart. Where the server has no keys everything is seen. May
be called from any thread, and reads the disk where the catalog does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from peft_serve.adapters.aliases import Alias, no_alias
from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.listing import Entry
from peft_serve.adapters.names import RESERVED, parse_ref, unknown
from peft_serve.adapters.records import Resolved, Version
from peft_serve.api.principal import Principal
from peft_serve.api.splitting import Draws
from peft_serve.errors import UnknownAdapter

NOWHERE: Final = min(RESERVED - {"base"})
"""A name that looks like every other, and that no adapter can have."""


class SeenCatalog:
    """See the module's docstring."""

    def __init__(self, catalog: Catalog, principal: Principal) -> None:
        self._catalog = catalog
        self._principal = principal

    def resolve(self, ref: str, *, hold: bool = False) -> Resolved:
        """As the catalog's."""
        name = parse_ref(ref).name
        if self._principal.sees(name):
            return self._catalog.resolve(ref, hold=hold)
        raise self._missing(ref, lambda: self._catalog.resolve(NOWHERE + ref.removeprefix(name)))

    def is_at_hand(self, ref: str) -> bool:
        """Whether `resolve` finds it without reading; of what is not seen that is not told."""
        return self._principal.sees(parse_ref(ref).name) and self._catalog.is_at_hand(ref)

    def get(self, name: str) -> Entry:
        """As the catalog's."""
        if self._principal.sees(name):
            return self._catalog.get(name)
        raise self._missing(name, lambda: self._catalog.get(NOWHERE))

    def list(self) -> tuple[Entry, ...]:
        """The catalog's, as far as they are seen."""
        return tuple(entry for entry in self._catalog.list() if self._principal.sees(entry.name))

    def versions(self, name: str) -> tuple[Version, ...]:
        """As the catalog's."""
        if self._principal.sees(name):
            return self._catalog.versions(name)
        raise self._missing(name, lambda: self._catalog.versions(NOWHERE))

    def require_own(self, name: str) -> None:
        """Raise UnknownAdapter for what is not there or not seen, and Forbidden for what is somebody else's."""
        self.get(name)
        self._catalog.changes.require_own(name, self._principal.publisher)

    # aliases: one is seen whose name and targets are seen

    def aliases(self) -> tuple[Alias, ...]:
        """Every alias that is seen."""
        return tuple(alias for alias in self._catalog.aliases.all() if self._sees_alias(alias))

    def find_alias(self, name: str) -> Alias | None:
        """The alias of this name, if there is one and it is seen."""
        alias = self._catalog.aliases.find(name if self._principal.sees(name) else NOWHERE)
        return alias if alias is not None and self._sees_alias(alias) else None

    def require_alias(self, name: str) -> Alias:
        """Raises NotFound."""
        alias = self.find_alias(name)
        if alias is None:
            raise no_alias(name)
        return alias

    def rolled_back(self, name: str, number: int | None) -> Alias:
        """The alias, pointing to what it did before; raises as `Aliases.rollback` does."""
        alias = self.require_alias(name)
        seen = [each.number for each in alias.revisions.kept if self._principal.sees_targets(each)]
        if number is None:
            number = max((each for each in seen if each < alias.revisions.current), default=0)
        number = number if number in seen else 0  # there is none of this number
        return self._catalog.aliases.rollback(name, number, publisher=self._principal.publisher)

    def answering(self, ref: str, draws: Draws) -> tuple[Resolved, str]:
        """What answers to `ref` in one call, held, and the alias that led there; empty: `ref` names it itself."""
        while True:
            alias = self.find_alias(ref)
            if alias is None:
                return self.resolve(ref, hold=True), ""
            target = alias.now.target_at(draws.point(alias.name))
            try:
                return self._catalog.resolve(target.ref, hold=True), alias.name
            except UnknownAdapter:
                if self.find_alias(ref) != alias:
                    continue  # it was pointed elsewhere meanwhile
                raise UnknownAdapter(
                    f"alias '{ref}' points to '{target.ref}', which does not exist any more; PUT /aliases/{ref} with "
                    "other targets",
                    param="adapter",
                ) from None

    def _sees_alias(self, alias: Alias) -> bool:
        return self._principal.sees(alias.name) and self._principal.sees_targets(alias.now)

    def _missing(self, ref: str, look: Callable[[], Any]) -> UnknownAdapter:
        """The refusal of a name, once the look for one that is not there has been taken."""
        with suppress(UnknownAdapter):
            look()
        return unknown(ref)
