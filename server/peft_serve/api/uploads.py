"""Reading an upload off a request: an archive or a form, its digest checked, nothing kept.

Owns the temporary file of one upload. What is inside an archive is `adapters.archive`'s business, and whether
the adapter is good is the gate's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import BinaryIO, Final, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from peft_serve.adapters.archive import files_from_parts, read_upload
from peft_serve.adapters.members import WANTED, UploadLimits
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.verdict import quoted
from peft_serve.api.store_threads import StoreThreads
from peft_serve.config import MIB
from peft_serve.errors import BadRequest, MalformedUpload, UnsupportedMediaType

MAX_PARTS: Final = 16
FLUSH_BYTES: Final = 1 * MIB
ARCHIVE_PART: Final = "archive"
NAME_PART: Final = "name"

_CHARSETS: Final = frozenset({"utf-8", "utf8", "us-ascii"})
_HASHES: Final = {"sha-256": "sha256", "sha-512": "sha512"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A checkpoint as it came, and the name that came with it (in forms only)."""

    files: CheckpointFiles
    name: str | None = None


async def receive_upload(request: Request, limits: UploadLimits, threads: StoreThreads) -> Upload:
    """The checkpoint in the request's body, read on `threads`; raises what a bad upload is refused with."""
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared == "application/json":
        raise UnsupportedMediaType(
            "content-type: application/json is not read here: send the files themselves, as an archive or in a form "
            "(multipart/form-data); to have a source fetched, POST {name, source} to /adapters"
        )
    if declared == "multipart/form-data":
        return await _from_form(request, limits, threads)
    with tempfile.TemporaryFile() as spool:
        content = cast(BinaryIO, spool)
        await _spool(request, content, threads)
        files = await threads.run(read_upload, content, request.headers.get("content-type"), limits=limits)
        return Upload(files=files)


async def _spool(request: Request, file: BinaryIO, threads: StoreThreads) -> None:
    """Write the body to `file`, a chunk at a time beside the event loop, and check its digest."""
    wanted = _content_digest(request)
    found = hashlib.new(wanted[0]) if wanted is not None else None
    waiting = bytearray()
    async for chunk in request.stream():
        waiting += chunk
        if found is not None:
            found.update(chunk)
        if len(waiting) >= FLUSH_BYTES:
            await threads.run(file.write, bytes(waiting))
            waiting.clear()
    await threads.run(file.write, bytes(waiting))
    if found is not None and wanted is not None and found.digest() != wanted[1]:
        raise MalformedUpload("content-digest: the body is not the one that was announced; send it again")


def _content_digest(request: Request) -> tuple[str, bytes] | None:
    """The hash and its value by RFC 9530: `sha-256=:<base64>:`."""
    given = request.headers.get("content-digest")
    if given is None:
        return None
    for item in given.split(","):
        algorithm, _, value = item.strip().partition("=")
        if algorithm.strip().lower() in _HASHES and len(value) > 2 and value[0] == value[-1] == ":":
            try:
                digest = base64.b64decode(value[1:-1], validate=True)
            except (binascii.Error, ValueError):
                break
            return _HASHES[algorithm.strip().lower()], digest
    raise BadRequest("content-digest: should read sha-256=:<base64>: (or sha-512)", param="content-digest")


async def _from_form(request: Request, limits: UploadLimits, threads: StoreThreads) -> Upload:
    if request.headers.get("content-digest") is not None:
        raise BadRequest("content-digest: is checked for archives only; leave it out", param="content-digest")
    _check_charset(request)
    parser = _FormParser(request, max_part_size=limits.max_json_bytes)
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, ValueError, KeyError) as error:
        raise MalformedUpload("the form cannot be read: not a complete multipart/form-data body") from error
    try:
        return await threads.run(_read_form, form, limits)
    finally:
        await form.close()


class _FormParser(MultiPartParser):
    """Sees to it that a form comes to its end: a part that is cut off would be left out, and not missed."""

    def __init__(self, request: Request, *, max_part_size: int) -> None:
        self._has_ended = False
        super().__init__(
            request.headers,
            self._whole(request.stream()),
            max_files=MAX_PARTS,
            max_fields=MAX_PARTS,
            max_part_size=max_part_size,
        )

    def on_end(self) -> None:
        self._has_ended = True

    async def _whole(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The stream, of which each chunk is parsed by the time the next one is asked for."""
        async for chunk in stream:
            yield chunk
        if not self._has_ended:
            raise MalformedUpload("the form ends before its last boundary; send it again, and whole")


def _check_charset(request: Request) -> None:
    """Raise MalformedUpload for a form in another charset than UTF-8: some of Python's take a square of their time."""
    _, options = parse_options_header(request.headers["content-type"])
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in _CHARSETS:
        raise MalformedUpload(f"the form's charset is {quoted(charset)}; forms are read as utf-8: leave charset out")


def _read_form(form: FormData, limits: UploadLimits) -> Upload:
    name: str | None = None
    parts: dict[str, bytes | None] = {}
    archive: UploadFile | None = None
    for key, value in form.multi_items():
        if key == NAME_PART and isinstance(value, str):
            if name is not None:
                raise MalformedUpload("the form holds name twice; send it once")
            name = value
        elif key == ARCHIVE_PART and isinstance(value, UploadFile):
            if archive is not None:
                raise MalformedUpload("the form holds two archives; send one checkpoint")
            archive = value
        else:
            file = _part_name(key, value)
            if parts.get(file) is not None:
                raise MalformedUpload(f"the form holds {file} twice; send one checkpoint")
            if file in WANTED:
                parts[file] = value.encode() if isinstance(value, str) else value.file.read()
            elif file and not isinstance(value, str):
                parts[file] = None  # it is not read, and a refusal may name it
    if archive is not None and parts:
        raise MalformedUpload("the form holds an archive and single files; send one of them")
    if archive is not None:
        return Upload(files=read_upload(archive.file, None, limits=limits), name=name)
    return Upload(files=files_from_parts(parts, limits=limits), name=name)


def _part_name(key: str, value: UploadFile | str) -> str:
    """The file a part is: by the field's name, else by the file's own."""
    if key in WANTED or isinstance(value, str):
        return key
    return (value.filename or "").rsplit("/", 1)[-1]
