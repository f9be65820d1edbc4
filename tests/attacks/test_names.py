"""Hostile names wherever a request can name an adapter: nothing is opened outside the store, and none is our fault.

`PEFT_SERVE_ATTACKS=all` sends each name to every place; otherwise each goes to two of them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

import peft_serve
from peft_serve.adapters.names import is_name
from tests.api.api_fakes import World, checkpoint, make_world, zipped
from tests.api.conftest import http, populate, running
from tests.attacks.hostile_names import hostile_names
from tests.attacks.opened import outside, watch

CODE = Path(peft_serve.__file__).parent  # which the web framework looks at once for each route that refuses
ZIP = {"content-type": "application/zip"}
FILES = checkpoint("hostile")
Send = Callable[[httpx.AsyncClient, str], Awaitable[httpx.Response]]


def _json(path: str, make: Callable[[str], dict[str, Any]]) -> Send:
    async def send(client: httpx.AsyncClient, name: str) -> httpx.Response:
        content = json.dumps(make(name)).encode()
        return await client.post(path, content=content, headers={"content-type": "application/json"})

    return send


async def _query(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post(f"/generate?adapter={_quoted(name)}", json={"inputs": "x"})


async def _header(client: httpx.AsyncClient, name: str) -> httpx.Response:
    value = name.encode("utf-8", "surrogatepass").translate(None, b"\r\n\x00")
    return await client.post("/generate", json={"inputs": "x"}, headers=[(b"x-adapter", value)])


def _on_path(method: str, ending: str = "", **given: Any) -> Send:
    async def send(client: httpx.AsyncClient, name: str) -> httpx.Response:
        return await client.request(method, f"/adapters/{_dotted(_quoted(name))}{ending}", **given)

    return send


async def _raw_path(client: httpx.AsyncClient, name: str) -> httpx.Response:
    """The name's slashes as they are, so that the path has more steps."""
    quoted = quote(name, safe="/\\;:@+", errors="surrogatepass") or "%20"
    return await client.get(f"/adapters/{_dotted(quoted)}")


def _form(name: str, *, file_name: str, field: str, text_name: str) -> tuple[bytes, dict[str, str]]:
    """A form by hand: a client's library would clean the names."""
    parts = [f'name="{NAME_FIELD}"\r\n\r\n'.encode() + _raw(text_name)]
    for own, content in FILES.items():
        header = b'name="' + _raw(field or own) + b'"; filename="' + _raw(file_name or name) + b'"'
        parts.append(header + b"\r\nContent-Type: application/octet-stream\r\n\r\n" + content)
    body = b"".join(b"--edge\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--edge--\r\n"
    return body, {"content-type": "multipart/form-data; boundary=edge"}


NAME_FIELD = "name"


async def _form_name(client: httpx.AsyncClient, name: str) -> httpx.Response:
    content, headers = _form(name, file_name="x", field="", text_name=name)
    return await client.post("/adapters", content=content, headers=headers)


async def _file_name(client: httpx.AsyncClient, name: str) -> httpx.Response:
    content, headers = _form(name, file_name=name, field="", text_name="by-file-name")
    return await client.post("/adapters", content=content, headers=headers)


async def _file_path(client: httpx.AsyncClient, name: str) -> httpx.Response:
    content, headers = _form(name, file_name=f"{name}/adapter_config.json", field="files", text_name="by-file-path")
    return await client.post("/adapters", content=content, headers=headers)


PLACES: dict[str, Send] = {
    "query": _query,
    "header": _header,
    "body": _json("/generate", lambda name: {"inputs": "x", "adapter": name}),
    "adapter_id": _json("/", lambda name: {"inputs": "x", "parameters": {"adapter_id": name}}),
    "model": _json("/v1/completions", lambda name: {"model": name, "prompt": "x", "max_tokens": 1}),
    "chat": _json("/v1/chat/completions", lambda name: {"model": name, "messages": [{"role": "user", "content": "x"}]}),
    "path": _on_path("GET"),
    "raw path": _raw_path,
    "put": _on_path("PUT", content=zipped(FILES), headers=ZIP),
    "delete": _on_path("DELETE"),
    "pin": _on_path("POST", "/pin"),
    "rollback": _on_path("POST", "/rollback"),
    "form name": _form_name,
    "file name": _file_name,
    "file path": _file_path,
    "source": _json("/adapters", lambda name: {"name": name, "source": f"file:{name}"}),
    "source path": _json("/adapters", lambda name: {"name": "fetched", "source": name}),
}


def _quoted(name: str) -> str:
    return quote(name, safe="", errors="surrogatepass")


def _dotted(quoted: str) -> str:
    """With its dots spelt as well: the client would follow steps upwards by itself."""
    return quoted.replace(".", "%2E")


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass").replace(b'"', b"%22").replace(b"\r", b"").replace(b"\n", b"")


@pytest.fixture
def guarded(tiny_tokenizer: Any, tmp_path: Path) -> Iterator[World]:
    made = make_world(tiny_tokenizer, tmp_path)
    populate(made)
    with running(made):
        yield made


def test_there_are_enough_names() -> None:
    names = hostile_names()
    assert len(names) >= 400
    assert len(PLACES) >= 5
    assert sum(is_name(name) for name in names) < 20, "nearly none of them is a name at all"


@pytest.mark.parametrize("share", range(4))
async def test_nothing_is_opened_outside_the_store(guarded: World, tmp_path: Path, share: int) -> None:
    (tmp_path / "secret").write_text("not yours")
    is_whole = os.environ.get("PEFT_SERVE_ATTACKS") == "all"
    places = list(PLACES.items())
    store = tmp_path / "store"
    async with http(guarded) as client:
        for _, send in places:  # what is loaded once is loaded now
            await send(client, "plain0")
            await send(client, "../plain0")
        known = set(await _names(client))
        for number, name in list(enumerate(hostile_names()))[share::4]:
            chosen = places if is_whole else [places[(number + step) % len(places)] for step in (0, 8)]
            for place, send in chosen:
                with watch().watching() as heard:
                    answer = await send(client, name)
                strangers = [each for each in outside(heard, store, CODE) if not _is_spool(*each)]
                assert not strangers, (place, name, strangers)
                assert answer.status_code < 500, (place, name, answer.text)
                assert "not yours" not in answer.text
                assert len(answer.content) < 20_000, (place, name)
        assert all(is_name(name) for name in set(await _names(client)) - known)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "store"]


async def _names(client: httpx.AsyncClient) -> list[str]:
    return [entry["name"] for entry in (await client.get("/adapters")).json()["adapters"]]


def _is_spool(event: str, path: str) -> bool:
    """A body's own file in the system's temporary folder: without a name, or with one of the system's choice."""
    folder, given = Path(tempfile.gettempdir()), Path(path)
    return event == "open" and (given == folder or (given.parent == folder and given.name.startswith("tmp")))


def test_the_watch_hears_what_is_opened(tmp_path: Path) -> None:
    outer, inner = tmp_path / "secret", tmp_path / "store" / "x"
    inner.parent.mkdir()
    outer.write_text("a")
    inner.write_text("b")
    with watch().watching() as heard:
        inner.read_text()
        assert not outside(heard, inner.parent)
        outer.read_text()
        (inner.parent / ".." / "secret").stat()
        os.listdir(tmp_path)
    assert {event for event, _ in outside(heard, inner.parent)} == {"open", "os.listdir"}
