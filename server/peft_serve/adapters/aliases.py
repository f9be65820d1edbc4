"""Aliases: names that stand for other adapters, several of them by weight.

An alias is a name like an adapter's, in the same records: no name is both, and what is acknowledged is durable. Its
targets are adapters and versions of adapters, never aliases. An adapter that an alias points to is not deleted
unawares. Which target a request takes is drawn by whoever resolves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final

from peft_serve.adapters.alias_record import Revision, Revisions, Target, are_targets
from peft_serve.adapters.deciding import decided, look_again
from peft_serve.adapters.name_ledger import NameLedger
from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.names import check_name, is_name
from peft_serve.adapters.ownership import OPERATOR, Publisher
from peft_serve.errors import (
    AdapterUnavailable,
    Conflict,
    Forbidden,
    InvalidParameter,
    NotFound,
    PreconditionFailed,
    StorageQuotaExceeded,
    UnknownAdapter,
)

MAX_ALIASES: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """An alias as it is now."""

    name: str
    owner: str  # the tenant that made it; empty: the operator
    revisions: Revisions

    @property
    def now(self) -> Revision:
        return self.revisions.now


def alias_tag(alias: Alias) -> str:
    """The entity tag of an alias' revision, quotes included."""
    return f'"r{alias.revisions.current}"'


class Aliases:
    """Owner of what aliases point to. Thread-safe; `lock` is the one that orders every change of the records.

    `is_there` tells whether a reference names something that is served, `is_taken` whether a name is an adapter's,
    `now` the time as RFC 3339; `told_first` is the store's: its own refusal of a change goes before another.
    """

    def __init__(
        self,
        names: NameLedger,
        lock: AbstractContextManager[object],
        *,
        base_name: str,
        is_there: Callable[[Target], bool],
        is_taken: Callable[[str], bool],
        now: Callable[[], str],
        told_first: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._names = names
        self._lock = lock
        self._base_name = base_name
        self._is_there = is_there
        self._is_taken = is_taken
        self._now = now
        self._told_first = told_first

    # asking

    def find(self, name: str) -> Alias | None:
        """The alias of this name, if there is one; raises AdapterUnavailable when its record is damaged."""
        return _alias_of(self._names.record(name)) if is_name(name) else None

    def all(self) -> tuple[Alias, ...]:
        """Every alias, sorted by name; one whose record is damaged is left out. Reads every record."""
        found = []
        for name in sorted(self._names.names()):
            try:
                alias = self.find(name)
            except AdapterUnavailable:
                continue
            if alias is not None:
                found.append(alias)
        return tuple(found)

    def require_free(self, name: str) -> None:
        """Raise Conflict where an alias has the name."""
        if self.find(name) is not None:
            raise Conflict(
                f"'{name}' is an alias; publish under another name and let the alias point to it, or "
                f"DELETE /aliases/{name} first"
            )

    # changing

    def put(
        self, name: str, targets: Sequence[Target], *, publisher: Publisher = OPERATOR, if_match: str | None = None
    ) -> tuple[Alias, bool]:
        """Let `name` point to `targets`, durably before this returns; the alias, and whether it is new.

        The same targets again change nothing. Raises InvalidParameter, UnknownAdapter (a target), Conflict (the name
        is an adapter's), Forbidden (somebody else's), PreconditionFailed, and what a write raises.
        """
        check_name(name, base_name=self._base_name)
        if not are_targets(targets):
            raise InvalidParameter("targets: 1 to 16, each once, with weights from 0 to 1e6 and not all 0")

        def decide() -> tuple[Alias, bool]:
            record = self._own(name, publisher)
            before = _alias_of(record)
            _check_tag(name, before, if_match)
            if before is None:
                self._require_room(name, publisher)
            self._require_there(targets)
            if before is not None and before.now.targets == tuple(targets):
                return before, False
            revision = Revision(number=record.next_number, created=self._now(), targets=tuple(targets))
            revisions = Revisions(current=revision.number, kept=(revision,))
            if before is not None:
                revisions = before.revisions.followed_by(revision)
            owner = publisher.tenant if before is None else before.owner
            return self._write(record, revisions, owner=owner), before is None

        with self._told_first(), self._lock:
            look_again(self._names, name, *(target.adapter for target in targets))
            return decided(decide)

    def rollback(self, name: str, number: int | None = None, *, publisher: Publisher = OPERATOR) -> Alias:
        """Let an alias point to what it did in revision `number`, else in the one before the current.

        Raises NotFound for a revision that is not kept, and UnknownAdapter where one of its targets is gone.
        """

        def decide() -> Alias:
            record, alias = self._existing(name, publisher)
            wanted = number
            if wanted is None:
                earlier = [each.number for each in alias.revisions.kept if each.number < alias.revisions.current]
                wanted = max(earlier, default=0)
            revision = alias.revisions.numbered(wanted)
            if revision is None:
                raise NotFound(f"alias '{name}' has no such revision to return to; GET /aliases/{name} lists them")
            self._require_there(revision.targets)
            return self._write(record, alias.revisions.rolled_back(wanted), owner=alias.owner)

        with self._told_first(), self._lock:
            look_again(self._names, name)
            return decided(decide)

    def delete(self, name: str, *, publisher: Publisher = OPERATOR, if_match: str | None = None) -> None:
        """Forget an alias; its targets stay, and requests in flight end on theirs."""

        def decide() -> None:
            record, alias = self._existing(name, publisher)
            _check_tag(name, alias, if_match)
            self._names.write(record.deleted(), replaces=record)

        with self._told_first(), self._lock:
            look_again(self._names, name)
            decided(decide)

    def let_go(self, adapter: str, *, force: bool, publisher: Publisher = OPERATOR) -> None:
        """Before an adapter is deleted: raise Conflict if an alias points to it. With `force` take it out of each.

        An alias that is left without a target that has weight is deleted. A tenant's own aliases count, an operator's
        are all: others neither stand in a tenant's way nor are changed by it, and point to nothing from now on.
        """
        with self._lock:
            using = [
                alias
                for alias in self.all()
                if any(t.adapter == adapter for t in alias.now.targets)
                and (publisher.is_operator or alias.owner == publisher.tenant)
            ]
            if using and not force:
                number = "an alias points" if len(using) == 1 else f"{len(using)} aliases point"
                raise Conflict(
                    f"adapter '{adapter}' is not deleted: {number} to it; point elsewhere first (GET /aliases), or "
                    "delete with ?force=1, which takes it out of them"
                )
            for alias in using:
                record = self._names.record(alias.name)
                rest = tuple(target for target in alias.now.targets if target.adapter != adapter)
                if are_targets(rest):
                    revision = Revision(number=record.next_number, created=self._now(), targets=rest)
                    self._write(record, alias.revisions.followed_by(revision), owner=alias.owner)
                else:
                    self._names.write(record.deleted(), replaces=record)

    def _write(self, record: NameRecord, revisions: Revisions, *, owner: str) -> Alias:
        following = max(record.next_number, revisions.current + 1)
        changed = replace(record, owner=owner, next_number=following, alias=revisions)
        self._names.write(changed, replaces=record)
        return Alias(name=record.name, owner=owner, revisions=revisions)

    def _existing(self, name: str, publisher: Publisher) -> tuple[NameRecord, Alias]:
        found = self.find(name)
        if found is None:
            raise no_alias(name)
        return self._own(name, publisher), found

    def _own(self, name: str, publisher: Publisher) -> NameRecord:
        """The record of a name that `publisher` may point elsewhere."""
        record = self._names.record(name)
        if record.alias is None and (record.current is not None or self._is_taken(name)):
            raise Conflict(f"'{name}' is an adapter; give the alias another name, or delete the adapter first")
        if record.alias is not None and not publisher.is_operator and record.owner != publisher.tenant:
            raise Forbidden(
                f"alias '{name}' belongs to somebody else; take another name, or let an admin key change it"
            )
        return record

    def _require_room(self, name: str, publisher: Publisher) -> None:
        every = self.all()
        if len(every) >= MAX_ALIASES:
            raise StorageQuotaExceeded(
                f"alias '{name}': this server has {len(every)}, as many as it keeps; delete one first"
            )
        own = sum(alias.owner == publisher.tenant for alias in every)
        if publisher.max_adapters is not None and own >= publisher.max_adapters:
            raise StorageQuotaExceeded(
                f"max_adapters: tenant '{publisher.tenant}' has {own} aliases, as many as it may have; delete one first"
            )

    def _require_there(self, targets: Sequence[Target]) -> None:
        for target in targets:
            if not self._is_there(target):
                raise UnknownAdapter(
                    f"target '{target.ref}' does not exist, or is an alias itself; GET /adapters lists what an alias "
                    "may point to",
                    param="targets",
                )


def no_alias(name: str) -> NotFound:
    """The refusal of an alias that there is not."""
    return NotFound(f"alias {name[:80]!a} does not exist; GET /aliases lists the ones that do")


def _alias_of(record: NameRecord) -> Alias | None:
    if record.alias is None:
        return None
    return Alias(name=record.name, owner=record.owner, revisions=record.alias)


def _check_tag(name: str, alias: Alias | None, if_match: str | None) -> None:
    if if_match is None:
        return
    now = None if alias is None else alias_tag(alias)
    tags = [tag.strip() for tag in if_match.split(",")]
    if now is None or (tags != ["*"] and now not in tags):
        told = "does not exist" if now is None else f"is at {now}"
        raise PreconditionFailed(f"alias '{name}' {told}, which If-Match does not name; look again")
