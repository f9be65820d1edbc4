"""A trace's file: requests as JSON, read back one by one, so that what is no trace is refused in words."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadtest.trace import TraceRequest

MOST = 1e18
"""Beyond any time or number that a request could have, and exact enough for both."""
KINDS: Mapping[type, str] = {int: "a whole number", float: "a number of seconds", str: "a text"}


def read_payload(path: Path) -> dict[str, Any]:
    """The object in the file; ValueError, in words, if there is none."""
    content = path.read_bytes()
    if not content.strip():
        raise ValueError("the file is empty")
    try:
        payload = json.loads(content.decode())
    except UnicodeDecodeError as problem:
        raise ValueError(f"byte {problem.start} is not UTF-8") from None
    except json.JSONDecodeError as problem:
        raise ValueError(f"not JSON from line {problem.lineno}, column {problem.colno} on") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(payload, dict):
        raise ValueError("JSON, but no object")
    return payload


def read_requests(payload: Mapping[str, Any], kind: "type[TraceRequest]") -> "tuple[TraceRequest, ...]":
    """The requests of a payload; ValueError, in words, if they are none."""
    listed = payload.get("requests")
    if not isinstance(listed, list):
        raise ValueError("it has no list of requests")
    requests = tuple(_request(place, entry, kind) for place, entry in enumerate(listed))
    if len({request.index for request in requests}) < len(requests):
        raise ValueError("two requests have one index")
    return requests


def _request(place: int, entry: Any, kind: "type[TraceRequest]") -> "TraceRequest":
    where = f"requests[{place}]"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no object")
    wanted = {one.name: one.type for one in fields(kind)}
    for name in wanted.keys() ^ entry.keys():
        raise ValueError(f"{where} {'lacks' if name in wanted else 'has an unknown field,'} {name!r}")
    for name, value in entry.items():
        _check(f"{where}: {name}", value, wanted[name])
    return kind(**entry)


def _check(where: str, value: Any, wanted: Any) -> None:
    fits = isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
    if not fits or isinstance(value, bool):
        raise ValueError(f"{where} is {value!r}, not {KINDS[wanted]}")
    if not isinstance(value, str) and not 0 <= value < MOST:
        raise ValueError(f"{where} is {value!r}, which is not possible")
