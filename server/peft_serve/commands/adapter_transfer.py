"""Uploads and downloads of a command: the archive on its way, a bar while it is, and its digest at the end of it."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from peft_serve.commands.adapter_tables import address
from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.link import ServerLink, parsed, reaching, refusal_of, refuse
from peft_serve.commands.packing import CHUNK, Parcel, parcel
from peft_serve.commands.speech import Speech

_POLL_S: Final = 0.25
_WEIGHTS: Final = "adapter_model.safetensors"
_HUB_WEIGHTS: Final = "adapter.safetensors"  # AdapterHub's name for them, which the digest does not know


def pushed(
    link: ServerLink, speech: Speech, checkpoint: Path, name: str | None, *, validate: bool = False,
    headers: Mapping[str, str] | None = None, query: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Send a checkpoint, and give what the server says about it."""
    with parcel(checkpoint) as packed, _bar(speech, "sending", packed.num_bytes) as advance:
        method, path = ("POST", "/adapters/validate") if validate else ("PUT", address(name or packed.name))
        answer = link.ask(
            method,
            path,
            params=dict(query or {}),
            content=packed.chunks(advance),
            headers={**_described(packed), **(headers or {})},
        )
    found: dict[str, Any] = parsed(answer)
    return found


def fetched(
    link: ServerLink, speech: Speech, source: str, name: str, *, headers: Mapping[str, str],
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:  # fmt: skip
    """Let the server fetch an adapter from a source that it allows, and wait for what comes of it."""
    job = link.json("POST", "/adapters", json={"name": name, "source": source}, headers=dict(headers))
    path = f"/adapters/jobs/{job['id']}"
    with _bar(speech, "fetching", 0) as advance:
        seen = 0
        while job["state"] not in ("done", "failed"):
            sleep(_POLL_S)
            job = link.json("GET", path)
            advance(job["bytes"] - seen, total=job["total_bytes"])
            seen = job["bytes"]
    if job["state"] == "failed":
        raise refusal_of(job["error"]["status"], job["error"])
    found: dict[str, Any] = job["adapter"]
    return found


def _described(packed: Parcel) -> dict[str, str]:
    return {
        "content-type": packed.media_type,
        "content-length": str(packed.num_bytes),
        "content-digest": packed.digest,
    }


def pulled(link: ServerLink, speech: Speech, name: str, folder: Path) -> dict[str, Any]:
    """Bring a version's files into a new folder: all of them, and only if they are those of its digest."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandFailed(
            Exit.USAGE, f"{folder}: is there already; name a folder that is empty or new", code="folder"
        )
    with tempfile.TemporaryFile() as spool, reaching(link.url):
        with link.client.stream("GET", address(name, "archive")) as answer:
            refuse(answer, answer.read() if answer.status_code >= 400 else b"")
            _keep(answer, spool, speech)
        facts = _facts(answer.headers, name)
        spool.seek(0)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            digest = unpacked(spool, Path(beside))
            if digest != facts["digest"]:
                raise CommandFailed(Exit.FAILED, f"what came is {digest} and should be {facts['digest']}; pull again")
            folder.mkdir(exist_ok=True)
            for each in Path(beside).iterdir():
                each.replace(folder / each.name)
    return {**facts, "folder": str(folder)}


def _keep(answer: httpx.Response, spool: Any, speech: Speech) -> None:
    total = int(answer.headers.get("content-length", 0))
    with _bar(speech, "receiving", total) as advance:
        for chunk in answer.iter_bytes(CHUNK):
            spool.write(chunk)
            advance(len(chunk))


def _facts(headers: httpx.Headers, name: str) -> dict[str, Any]:
    digest = headers.get("etag", "").strip('"').replace("-", ":", 1)
    version = headers.get("x-adapter-version", "0")
    return {"name": headers.get("x-adapter", name), "version": int(version), "digest": digest}


def unpacked(spool: Any, folder: Path) -> str:
    """Write an archive's files into a folder, and give the digest of the checkpoint that they are.

    The digest is that of the server: sha256 over the files in their order, each behind its name and length.
    """
    h = hashlib.sha256()
    try:
        with tarfile.open(fileobj=spool, mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is None or os.path.basename(member.name) != member.name or member.name.startswith("."):
                    raise CommandFailed(Exit.FAILED, f"the archive holds {member.name!r}, which no checkpoint does")
                known_as = _WEIGHTS if member.name == _HUB_WEIGHTS else member.name
                h.update(f"{known_as}:{member.size}\n".encode())
                with (folder / member.name).open("xb") as file:
                    while piece := content.read(CHUNK):
                        h.update(piece)
                        file.write(piece)
    except (tarfile.TarError, OSError) as error:
        raise CommandFailed(Exit.FAILED, f"the archive cannot be unpacked: {error}; pull again") from None
    return f"sha256:{h.hexdigest()}"


@contextmanager
def _bar(speech: Speech, act: str, total: int) -> Iterator[Any]:
    """Something to call with the bytes that have passed; a bar where somebody watches."""
    columns = (TextColumn(act), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    silent = speech.as_json or not speech.err.is_terminal
    with Progress(*columns, console=speech.err, transient=True, disable=silent) as bars:
        task = bars.add_task(act, total=total or None)

        def advance(num_bytes: int, total: int | None = None) -> None:
            bars.update(task, advance=num_bytes, total=total if total is not None else bars.tasks[task].total)

        yield advance
