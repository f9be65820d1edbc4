"""Whom a request is for: its target and its Host, brought into one form or refused (RFC 9112, 3.2); and whether its
body comes in a form that everybody in between reads alike (6.1).

httptools parses both and compares nothing: a request without Host, with two, or with one that is no host is answered,
and one whose target names another host than its Host is taken for the latter's. Whoever stands in front may have
decided by the other one. Pure functions; who answers a refusal is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

Header = tuple[bytes, bytes]
"""A name in lower case, and its value."""

_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+(?:%25[\w.~-]+)?\]|[\w.~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?", re.ASCII)
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)([^#]*)", re.ASCII | re.IGNORECASE)


class UnclearRequest(ValueError):  # noqa: N818 - it says what the request is
    """The head does not say for whom it is, or how its body comes, in one way; the message may be shown."""


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A target as servers are asked for it, by path, and the headers with the one Host that counts."""

    target: bytes
    headers: tuple[Header, ...]


def read_line(method: bytes, target: bytes, version: str, headers: Sequence[Header]) -> RequestLine:
    """The request's target and headers in one form. Raises UnclearRequest.

    A target that is a whole URL names the host itself, and its Host is passed over, as the RFC says.
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1:
        raise UnclearRequest("this request has more than one Host; send one")
    codings = [value.strip(b" \t").lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or version == "1.0"):
        raise UnclearRequest(
            "Transfer-Encoding: this server understands chunked alone, in HTTP/1.1; send the body as it is"
        )
    if not hosts and version != "1.0":
        raise UnclearRequest("this request has no Host, which HTTP/1.1 asks for; send one")
    if hosts and _HOST.fullmatch(hosts[0].strip(b" \t")) is None:
        raise UnclearRequest("the Host of this request is none; send a name or an address, and a port if need be")
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        return RequestLine(target, tuple(headers))
    found = _ABSOLUTE.fullmatch(target)
    if found is None or not found[1] or _HOST.fullmatch(found[1]) is None:
        raise UnclearRequest("the target of this request is neither a path nor an http URL; send a path")
    path = found[2] if found[2].startswith(b"/") else b"/" + found[2]
    return RequestLine(path, ((b"host", found[1]), *(each for each in headers if each[0] != b"host")))
