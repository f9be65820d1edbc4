"""Uploads: put adapter folders on a running server, by ``PUT /adapters/{name}`` with a zip."""

import asyncio
import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp


def zip_of(folder: Path) -> bytes:
    """The folder's files as an uncompressed zip (random weights do not shrink)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return buffer.getvalue()


async def upload_adapter(session: aiohttp.ClientSession, folder: Path, *, name: str | None = None) -> int:
    """Upload one folder (under its own name if none is given) and answer with the status, 200 or 201;
    RuntimeError with the server's words for any other."""
    target = name or folder.name
    headers = {"Content-Type": "application/zip"}
    body = await asyncio.to_thread(zip_of, folder)
    async with session.put(f"/adapters/{target}", data=body, headers=headers) as response:
        if response.status not in (200, 201):
            said = (await response.text())[:500]
            raise RuntimeError(f"upload of {target} was refused with {response.status}: {said}")
        return response.status


async def upload_adapters(
    url: str,
    folders: Sequence[Path],
    *,
    api_key: str | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Upload every folder under its own name, one after the other."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(base_url=url, headers=headers) as session:
        for folder in folders:
            await upload_adapter(session, folder)
            on_done()
