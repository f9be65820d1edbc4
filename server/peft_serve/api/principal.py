"""Who asks: the facts of a key that matter while a request is answered. No file, no token, no HTTP status.

A *tenant* is who is counted, limited and kept apart from others; a *key* is one way in for it. Keys of one tenant
share its quotas, its share of the server and its cached prompts, and may differ in what they allow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from starlette.requests import HTTPConnection

from peft_serve.adapters.alias_record import Revision
from peft_serve.adapters.names import parse_expression
from peft_serve.adapters.ownership import Publisher
from peft_serve.errors import Forbidden, ServeError

STATE: Final = "principal"
"""Where the scope's state has the principal of a request."""


class Scope(StrEnum):
    """What a key is for."""

    INFER = "infer"  # ask the base and adapters
    UPLOAD = "upload"  # publish, roll back and delete its tenant's adapters
    ADMIN = "admin"  # everything, also what concerns others: pins, metrics, adapters of other tenants


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Names of adapters: exact ones, and beginnings of names. An empty beginning is every name."""

    names: frozenset[str] = frozenset()
    beginnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, patterns: Iterable[str]) -> Reach:
        """From `name` and `prefix*`."""
        given = tuple(patterns)
        return cls(
            names=frozenset(each for each in given if not each.endswith("*")),
            beginnings=tuple(each[:-1] for each in given if each.endswith("*")),
        )

    @property
    def is_everything(self) -> bool:
        return "" in self.beginnings

    def covers(self, name: str) -> bool:
        return name in self.names or name.startswith(self.beginnings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What a tenant may use; None: as much as there is."""

    requests_per_s: float | None = None
    burst: int | None = None  # requests at once; None: those of one second
    tokens_per_min: int | None = None  # of prompts and answers together
    max_adapters: int | None = None  # names it owns
    max_bytes: int | None = None  # of their versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who is counted. `weight` is its share of the tokens beside others who wait."""

    name: str = ""
    weight: float = 1.0
    quota: Quota = field(default_factory=Quota)


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A key as it was when the request came."""

    tenant: Tenant
    scopes: frozenset[Scope]
    reach: Reach
    may_ask_base: bool = True

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    @property
    def is_operator(self) -> bool:
        """Whether it may see everything there is."""
        return self.is_admin and self.reach.is_everything

    @property
    def publisher(self) -> Publisher:
        """In whose name it uploads."""
        quota = self.tenant.quota
        return Publisher(
            tenant=self.tenant.name,
            is_operator=self.is_admin,
            max_adapters=quota.max_adapters,
            max_bytes=quota.max_bytes,
        )

    def sees(self, name: str) -> bool:
        """Whether an adapter of this name exists as far as it is concerned."""
        return self.reach.covers(name)

    def sees_targets(self, revision: Revision) -> bool:
        """Whether it sees everything that an alias points to."""
        return all(self.sees(target.adapter) for target in revision.targets)

    def sees_all_of(self, expression: str) -> bool:
        """Whether it sees every adapter of `a`, `a@2` or `a+b:0.3`."""
        if self.reach.is_everything:
            return True
        try:
            return all(self.sees(term.ref.partition("@")[0]) for term in parse_expression(expression))
        except ServeError:
            return False

    def require_reach(self, name: str) -> None:
        """Raise Forbidden for a name that it may not publish; whether it exists is not looked at."""
        if not self.sees(name):
            raise Forbidden(
                "name: the adapters of this key do not include it; take a name that they do, or ask for another key",
                param="name",
            )

    def require_base(self) -> None:
        """Raise Forbidden where the base is not to be asked by itself."""
        if not self.may_ask_base:
            raise Forbidden("adapter: this key is for adapters and not for the base by itself; name one of them")


ANYONE: Final = Principal(tenant=Tenant(), scopes=frozenset(Scope), reach=Reach(beginnings=("",)), may_ask_base=True)
"""Who asks a server without keys: one tenant, who may do everything."""

NOBODY: Final = Principal(tenant=Tenant(), scopes=frozenset(), reach=Reach(), may_ask_base=False)
"""Who asks a public route of a server that has keys, without one."""


def principal_of(connection: HTTPConnection) -> Principal:
    """Who sent a request; the door has let it in."""
    found = connection.scope["state"][STATE]
    assert isinstance(found, Principal), "a request came past the door"
    return found
