"""What a web page of somebody else's may not do: send this server a change, by its own name or by another.

A browser sends a form or a plain text to any address, also to localhost, and asks nobody first; and it takes a name
that an attacker lets point to 127.0.0.1 for the attacker's own site (DNS rebinding). Against the first, requests that
change something are refused when the browser says that they come from another site (the rule of Go's
CrossOriginProtection). Against the second, what comes in at a loopback address has to name this machine in `Host`.
Programs that are no browser send none of these headers, or the right ones.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope as ASGIScope

from peft_serve.errors import Forbidden

_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
MAX_KNOWN: Final = 1024
_OF_CONTAINERS: Final = frozenset({"host.docker.internal", "host.containers.internal"})
"""By which containers call the machine they run on."""


class Origins:
    """`allowed_origins` may send changes, `allowed_hosts` are names of this server (`*.example.com` for all below)."""

    def __init__(self, allowed_origins: Iterable[str], allowed_hosts: Sequence[str], *, is_open: bool) -> None:
        """`is_open`: nothing but the address protects this server, so loopback names are insisted on."""
        self._origins = frozenset(each.rstrip("/").lower() for each in allowed_origins)
        self._hosts = frozenset(each.lower() for each in allowed_hosts)
        self._is_open = is_open
        self._known: dict[tuple[str, str | None], bool] = {}  # by the address of ours and the Host header

    def check(self, scope: ASGIScope, headers: Headers) -> None:
        """Raise Forbidden for a request that a browser was made to send."""
        if not self._names_us(scope, headers.get("host")):
            raise Forbidden(
                "host: this name is not known to be this server's; use localhost, or let the operator name it by "
                "--allowed-hosts"
            )
        if scope["method"] not in _SAFE and self._is_foreign(headers):
            raise Forbidden(
                "origin: pages of other sites may not send this; the operator can allow a site by --allowed-origins"
            )

    def _names_us(self, scope: ASGIScope, host: str | None) -> bool:
        server = scope.get("server")
        address = str(server[0]) if server else ""
        known = self._known.get((address, host))
        if known is None:
            known = self._would_name_us(address, host)
            if len(self._known) < MAX_KNOWN:
                self._known[address, host] = known
        return known

    def _would_name_us(self, address: str, host: str | None) -> bool:
        must = bool(self._hosts) or (self._is_open and is_loopback(address))
        if not must or host is None:
            return True
        name = _name_of(host)
        if _is_address(name) or "." not in name or name.endswith(".localhost") or name in _OF_CONTAINERS:
            return True  # nobody else can make such a name point here
        return name in self._hosts or any(each.startswith("*.") and name.endswith(each[1:]) for each in self._hosts)

    def _is_foreign(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is not None and ("*" in self._origins or origin.lower() in self._origins):
            return False
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site not in ("same-origin", "none")
        if origin is None:
            return False
        try:
            return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
        except ValueError:
            return True


def _name_of(host: str) -> str:
    """The name in a Host header, without the port and the brackets of IPv6."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
