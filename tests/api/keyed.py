"""A world whose server asks for keys, and a way to ask it that reads no more of an answer than its beginning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI

from peft_serve.api.key_file import hash_of
from tests.api.api_fakes import World, make_world

ALL = ("infer", "upload", "admin")


def token(name: str) -> str:
    return f"psk_{name}-0123456789abcdefghijklmnopqrstuvwxyz"


def entry(name: str, tenant: str = "acme", *scopes: str, adapters: tuple[str, ...] = ("*",), **more: Any) -> Any:
    key = f"sha256:{hash_of(token(name)).hex()}"
    return {"tenant": tenant, "key": key, "scopes": list(scopes or ("infer",)), "adapters": list(adapters), **more}


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token(name)}"}


SCOPED = [entry(scope, "acme", scope) for scope in ALL]
"""A key of each scope, which sees everything."""


def write_keys(path: Path, keys: list[Any], tenants: Mapping[str, Any] | None = None) -> Path:
    path.write_text(yaml.safe_dump({"keys": keys, "tenants": dict(tenants or {})}))
    path.chmod(0o600)
    return path


def keyed_world(
    tokenizer: Any, root: Path, keys: list[Any], tenants: Mapping[str, Any] | None = None, **settings: Any
) -> World:
    path = write_keys(root / "keys.yaml", keys, tenants)
    return make_world(tokenizer, root, api_keys_file=path, **settings)


@dataclass(frozen=True)
class Beginning:
    """What an answer begins with."""

    status: int
    headers: dict[str, str]
    body: bytes


async def begin(
    app: FastAPI,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    *,
    body: bytes = b"",
    raw_path: bytes | None = None,
    server: tuple[str, int] = ("server", 80),
) -> Beginning:
    """The status, the headers and the first piece of an answer; then the caller is gone."""
    given = {"host": "server", "content-length": str(len(body)), **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": raw_path or path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()],
        "client": ("10.0.0.1", 5),
        "server": server,
        "scheme": "http",
    }
    sent: list[Any] = []
    received = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return received.pop(0) if received else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start = sent[0]
    pairs = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
    return Beginning(start["status"], pairs, b"".join(each.get("body", b"") for each in sent[1:]))
