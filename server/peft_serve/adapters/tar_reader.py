"""A reader of .tar and .tar.gz archives that trusts no number in them.

It reads POSIX ustar with the long names of GNU tar and pax (POSIX.1-2001) and refuses the rest: links, devices,
sparse files, a global pax header that renames or resizes. It goes through the stream once; of what it does not
need it keeps nothing, and everything a .gz unpacks to is counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol

from peft_serve.adapters.gunzip import Gunzip
from peft_serve.adapters.members import MIB, Member, UploadLimits, is_wanted, printable, split_member
from peft_serve.errors import MalformedUpload

_BLOCK: Final = 512
_ZERO_BLOCK: Final = bytes(_BLOCK)
_MAX_NAME_BYTES: Final = 64 * 1024  # of a long name, or of one pax header
_MAX_METADATA_BYTES: Final = 1 * MIB  # of all of them
_CHUNK: Final = 1 * MIB
_REGULAR: Final = b"0\0007"  # type flags of a regular file: POSIX, old, contiguous
_FOLDER: Final = b"5"
_GNU_LONG_NAME: Final = b"L"
_PAX: Final = b"x"
_PAX_GLOBAL: Final = b"g"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    path: str
    kind: bytes
    num_bytes: int


def is_gzip(head: bytes) -> bool:
    return head.startswith(b"\x1f\x8b")


def is_tar(head: bytes) -> bool:
    """Whether 512 bytes are the first header of a .tar: by their checksum, since old ones have no magic."""
    return len(head) == _BLOCK and head[0] != 0 and _checksum_holds(head)


def read_tar(source: BinaryIO, size: int, limits: UploadLimits) -> Iterator[Member]:
    """Members in order. Raises MalformedUpload and PayloadTooLarge."""
    source.seek(0)
    packed = is_gzip(source.read(2))
    source.seek(0)
    if not packed:
        yield from _members(_Stream(source, limits, size), limits)
        return
    yield from _members(_Stream(Gunzip(source), limits, limits.max_archive_bytes(size)), limits)


class _Source(Protocol):
    def read(self, num_bytes: int, /) -> bytes: ...


class _Stream:
    """A source that is read once, in order, up to a bound."""

    def __init__(self, source: _Source, limits: UploadLimits, max_bytes: int) -> None:
        self._source = source
        self._limits = limits
        self._left = max_bytes
        self._metadata_left = _MAX_METADATA_BYTES

    def take(self, num_bytes: int) -> bytes:
        """Up to `num_bytes`; fewer at the end of the source only."""
        try:
            content = self._source.read(min(num_bytes, self._left + 1))
        except (OSError, EOFError, zlib.error) as error:
            raise _bad("its gzip stream is damaged or cut short") from error
        self._left -= len(content)
        if self._left < 0:
            raise self._limits.too_much()
        return content

    def exactly(self, num_bytes: int) -> bytes:
        content = self.take(num_bytes)
        if len(content) != num_bytes:
            raise _bad("it is cut short")
        return content

    def body(self, num_bytes: int) -> bytes:
        """A member's content; the padding after it is passed over."""
        content = self.exactly(num_bytes)
        self.exactly(-num_bytes % _BLOCK)
        return content

    def metadata(self, num_bytes: int) -> bytes:
        """A long name or a pax header. Their sum is bounded, for each of its records is looked at."""
        self._metadata_left -= num_bytes
        if num_bytes > _MAX_NAME_BYTES or self._metadata_left < 0:
            raise _bad(
                f"the names of its members and their pax headers have more than {_MAX_NAME_BYTES} bytes for one of "
                f"them, or {_MAX_METADATA_BYTES} for all; use plain tar"
            )
        return self.body(num_bytes)

    def skip(self, num_bytes: int) -> None:
        """Pass over a member's content and its padding."""
        num_bytes += -num_bytes % _BLOCK
        while num_bytes:
            num_bytes -= len(self.exactly(min(num_bytes, _CHUNK)))


def _members(stream: _Stream, limits: UploadLimits) -> Iterator[Member]:
    overrides: dict[str, str] = {}  # what the headers in front of a member say about it
    num_members = 0
    while (block := stream.exactly(_BLOCK)) != _ZERO_BLOCK:
        num_members += 1
        limits.check_count(num_members)
        header = _parse(block)
        if header.kind == _GNU_LONG_NAME:
            overrides["path"] = _long_name(stream, header)
        elif header.kind in (_PAX, _PAX_GLOBAL):
            records = _pax_records(stream, header)
            if header.kind == _PAX:
                overrides.update(records)
            elif {"path", "size", "linkpath"} & records.keys():
                raise _bad("a global header renames or resizes its members; use plain tar")
        else:
            yield from _member(stream, _overridden(header, overrides), limits)
            overrides = {}
    _check_rest(stream)


def _member(stream: _Stream, header: _Header, limits: UploadLimits) -> Iterator[Member]:
    """The member itself, if it is a file; its content if that is wanted."""
    name = split_member(header.path)[1]
    if header.kind == _FOLDER or header.path.endswith("/"):
        stream.skip(header.num_bytes)
    elif header.kind not in _REGULAR:
        raise _bad(
            f"'{printable(header.path)}' is a link, a device or a sparse file; "
            "send regular files (tar --dereference follows links)"
        )
    elif not is_wanted(header.path):
        stream.skip(header.num_bytes)
        yield header.path, None
    else:
        limits.check_file(name, header.num_bytes)
        yield header.path, stream.body(header.num_bytes)


def _check_rest(stream: _Stream) -> None:
    """Read to the end, so that a .gz checks its checksum; only padding may follow the last member."""
    while rest := stream.take(_CHUNK):
        if rest.strip(b"\0"):
            raise _bad("bytes follow its last member; send one archive")


def _parse(block: bytes) -> _Header:
    if not _checksum_holds(block):
        raise _bad("the header of a member is damaged")
    path = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return _Header(
        path=f"{prefix}/{path}" if prefix else path,
        kind=block[156:157],
        num_bytes=_number(block[124:136]),
    )


def _overridden(header: _Header, overrides: dict[str, str]) -> _Header:
    if any(key.startswith("GNU.sparse.") for key in overrides):
        raise _bad("it holds a sparse file; use tar without --sparse")
    num_bytes = header.num_bytes
    if "size" in overrides:
        num_bytes = _decimal(overrides["size"])
    return _Header(path=overrides.get("path", header.path), kind=header.kind, num_bytes=num_bytes)


def _long_name(stream: _Stream, header: _Header) -> str:
    return _text(stream.metadata(header.num_bytes))


def _pax_records(stream: _Stream, header: _Header) -> dict[str, str]:
    """The records of a pax header, each `<length> <key>=<value>` and a newline."""
    content = stream.metadata(header.num_bytes)
    records: dict[str, str] = {}
    start = 0
    while start < len(content):
        length_text, space, _ = content[start : start + 20].partition(b" ")
        length = _decimal(length_text.decode("ascii", "replace"))
        key_at, end = start + len(length_text) + 1, start + length
        key, equals, value = content[key_at : end - 1].partition(b"=")
        if not space or not equals or not key_at + 1 < end <= len(content):
            raise _bad("a pax header is damaged")
        records[_text(key)] = value.decode("utf-8", "replace")
        start = end
    return records


def _checksum_holds(block: bytes) -> bool:
    """The header's own sum of its bytes, the field itself read as blanks; unsigned, or signed as old tars do."""
    counted = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(counted)
    signed = unsigned - 256 * sum(byte > 127 for byte in counted)
    digits = block[148:156].strip(b" \0")
    return _is_octal(digits) and int(digits, 8) in (unsigned, signed)


def _number(field: bytes) -> int:
    """A size: octal digits, or (GNU) base 256 when the top bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not _is_octal(digits):
        raise _bad("the size of a member is not a number")
    return int(digits, 8)


def _is_octal(digits: bytes) -> bool:
    return bool(digits) and all(byte in b"01234567" for byte in digits)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise _bad("a pax header is damaged")
    return int(text)


def _text(field: bytes) -> str:
    """A name up to its NUL; bytes that are not UTF-8 are replaced."""
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _bad(why: str) -> MalformedUpload:
    return MalformedUpload(f"the .tar cannot be read: {why}")
