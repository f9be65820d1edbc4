"""Whose adapters are: who may change a name, and how much a tenant keeps here.

A name belongs to the tenant that published it first, until it is deleted; that is a part of its record, so it is as
durable as the name. Others may use the name where their keys allow it, and only the operator changes it too. What lies
in the operator's folders, or was published before there were tenants, is the operator's. Reads records, no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from peft_serve.adapters.name_ledger import NameLedger
from peft_serve.adapters.name_record import NameRecord
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterUnavailable, Forbidden, StorageQuotaExceeded


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """Who publishes, and what it may keep; None: as much as there is."""

    tenant: str = ""
    is_operator: bool = True
    max_adapters: int | None = None
    max_bytes: int | None = None


OPERATOR: Final = Publisher()
"""The server itself, and everybody on one without keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a tenant owns: names, and the bytes of their versions, files that two of them share counted once."""

    num_adapters: int
    num_bytes: int


class Ownership:
    """The rules, over the records of names."""

    def __init__(self, names: NameLedger) -> None:
        self._names = names

    def require_own(self, record: NameRecord, publisher: Publisher, *, is_folder: bool) -> None:
        """Raise Forbidden where the name stands for something of somebody else's."""
        if publisher.is_operator or (record.current is None and not is_folder):
            return
        if record.current is None or record.owner != publisher.tenant:
            raise Forbidden(
                f"adapter '{record.name}' belongs to somebody else; take another name, or let an admin key change it"
            )

    def require_room(self, record: NameRecord, publisher: Publisher, adapter: AdapterId, num_bytes: int) -> None:
        """Raise StorageQuotaExceeded where `record` with one more version would be more than its owner may keep."""
        is_new = record.current is None
        if publisher.max_adapters is None and publisher.max_bytes is None:
            return
        if not is_new and record.owner != publisher.tenant:
            return  # the operator's work on a tenant's name
        sizes = self._sizes(publisher.tenant)
        num_adapters = len(sizes)
        by_id = {id_: size for own in sizes.values() for id_, size in own.items()}
        if is_new and publisher.max_adapters is not None and num_adapters >= publisher.max_adapters:
            raise StorageQuotaExceeded(
                f"max_adapters: tenant '{publisher.tenant}' has {num_adapters} adapters, as many as it may have; "
                "delete one first"
            )
        total = sum(by_id.values()) + (0 if adapter in by_id else num_bytes)
        if publisher.max_bytes is not None and total > publisher.max_bytes:
            raise StorageQuotaExceeded(
                f"max_bytes: tenant '{publisher.tenant}' would keep {total} bytes of adapters and may keep "
                f"{publisher.max_bytes}; delete an adapter first"
            )

    def kept(self, tenant: str) -> Kept:
        """What a tenant owns now."""
        sizes = self._sizes(tenant)
        by_id = {id_: size for own in sizes.values() for id_, size in own.items()}
        return Kept(num_adapters=len(sizes), num_bytes=sum(by_id.values()))

    def _sizes(self, tenant: str) -> dict[str, dict[AdapterId, int]]:
        """The bytes of every version of every name of the tenant's; a record that is damaged counts for nothing."""
        found: dict[str, dict[AdapterId, int]] = {}
        for name in self._names.names():
            try:
                record = self._names.record(name)
            except AdapterUnavailable:
                continue
            if record.current is not None and record.owner == tenant:
                found[name] = {version.id: version.num_bytes for version in record.versions}
        return found
