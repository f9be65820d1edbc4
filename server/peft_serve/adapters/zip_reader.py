"""A reader of .zip archives that trusts no number in them.

It reads what a checkpoint needs of PKWARE's APPNOTE 6.3.10 and refuses the rest: STORED and DEFLATE members,
no encryption, no links, no second disk, no bytes that belong to two members or to none in front of the first.
Offsets, sizes and names are taken from the central directory and compared with the local headers.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, Final

from peft_serve.adapters.members import MIB, Member, UploadLimits, is_wanted, printable, split_member
from peft_serve.errors import MalformedUpload

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_MAX_COMMENT: Final = 0xFFFF
_MAX_DIRECTORY_BYTES: Final = 1 * MIB
_SENTINEL: Final = 0xFFFFFFFF
_STORED: Final = 0
_DEFLATED: Final = 8
_ENCRYPTED: Final = 1 << 0 | 1 << 6 | 1 << 13
_HAS_DESCRIPTOR: Final = 1 << 3
_IS_UTF8: Final = 1 << 11


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A member, as the central directory has it."""

    path: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed_bytes: int
    unpacked_bytes: int
    offset: int
    end: int  # where the next member, or the central directory, begins


def is_zip(head: bytes) -> bool:
    """Whether an archive begins like a .zip, or like an empty one."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def read_zip(source: BinaryIO, size: int, limits: UploadLimits) -> Iterator[Member]:
    """Members in the order of the directory. Raises MalformedUpload and PayloadTooLarge.

    What all of them say that they unpack to counts, as every byte of a .tar.gz does.
    """
    entries = _entries(source, size, limits)
    _check_sizes(entries, size, limits)
    for entry in entries:
        if entry.path.endswith("/"):
            continue
        yield entry.path, _content(source, entry) if is_wanted(entry.path) else None


def _check_sizes(entries: list[_Entry], size: int, limits: UploadLimits) -> None:
    """Whatever a member says here it is held to when it is read."""
    for entry in entries:
        if is_wanted(entry.path):
            limits.check_file(split_member(entry.path)[1], entry.unpacked_bytes)
    if sum(entry.unpacked_bytes for entry in entries) > limits.max_archive_bytes(size):
        raise limits.too_much()


def _entries(source: BinaryIO, size: int, limits: UploadLimits) -> list[_Entry]:
    num_entries, start, length = _find_directory(source, size)
    limits.check_count(num_entries)
    directory = _read_at(source, start, length)
    entries: list[_Entry] = []
    position = 0
    for _ in range(num_entries):
        entry, position = _parse_entry(directory, position)
        entries.append(entry)
    if position != length:
        raise _bad("its directory does not have the members it counts")
    return _with_ends(entries, start)


def _find_directory(source: BinaryIO, size: int) -> tuple[int, int, int]:
    """Count, offset and length of the central directory, from the record at the end of the archive."""
    tail_at = max(0, size - _END.size - _MAX_COMMENT)
    tail = _read_at(source, tail_at, size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise _bad("it has no end record; it may have been cut short")
    _, disk, first_disk, here, total, length, start, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise _bad("bytes follow its end record")
    if disk or first_disk or here != total:
        raise _bad("it is one part of several; send one file")
    if total == 0xFFFF or _SENTINEL in (length, start):
        raise _bad("it says that it needs zip64, which a checkpoint does not")
    if start + length != tail_at + at:
        raise _bad("its directory is not where its end record says")
    if length > _MAX_DIRECTORY_BYTES:
        raise _bad(f"its directory is larger than {_MAX_DIRECTORY_BYTES} bytes; send the checkpoint alone")
    return total, start, length


def _parse_entry(directory: bytes, position: int) -> tuple[_Entry, int]:
    if position + _CENTRAL.size > len(directory):
        raise _bad("its directory is cut short")
    fields = _CENTRAL.unpack_from(directory, position)
    signature, made_by, _, flags, method, _, _, crc, packed, unpacked = fields[:10]
    name_length, extra_length, comment_length, disk, _, attributes, offset = fields[10:]
    name_at = position + _CENTRAL.size
    extra_at = name_at + name_length
    end = extra_at + extra_length + comment_length
    if signature != b"PK\x01\x02" or end > len(directory):
        raise _bad("its directory is damaged")
    raw_name = directory[name_at:extra_at]
    path = _decoded(raw_name, flags)
    split_member(path)  # refuses an unsafe name
    shown = printable(path)
    if flags & _ENCRYPTED:
        raise _bad(f"'{shown}' is encrypted; send it without a password")
    if method not in (_STORED, _DEFLATED):
        raise _bad(f"'{shown}' is packed by method {method}; use plain zip (stored or deflate)")
    if _SENTINEL in (packed, unpacked, offset) or disk:
        raise _bad(f"'{shown}' says that it needs zip64, which a checkpoint does not")
    _check_kind(shown, made_by, attributes)
    entry = _Entry(
        path=path,
        raw_name=raw_name,
        flags=flags,
        method=method,
        crc=crc,
        packed_bytes=packed,
        unpacked_bytes=unpacked,
        offset=offset,
        end=0,
    )
    return entry, end


def _check_kind(shown: str, made_by: int, attributes: int) -> None:
    """Refuse a link or a device; only an archive made on Unix can say that a member is one."""
    kind = stat.S_IFMT(attributes >> 16)
    if made_by >> 8 in (3, 19) and kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _bad(f"'{shown}' is a link or a device; send regular files (zip follows links by default)")


def _with_ends(entries: list[_Entry], directory_at: int) -> list[_Entry]:
    """The entries with the place each must end before; members that overlap are refused."""
    ends: dict[int, int] = {}
    following = directory_at
    for offset in sorted((entry.offset for entry in entries), reverse=True):
        if offset in ends:
            raise _bad("two of its members are the same bytes")
        ends[offset] = following
        following = offset
    if entries and following != 0:
        raise _bad("bytes stand in front of its first member")
    placed = []
    for entry in entries:
        end = ends[entry.offset]
        if entry.offset + _LOCAL.size + len(entry.raw_name) + entry.packed_bytes > end:
            raise _bad(f"'{printable(entry.path)}' overlaps what follows it")
        placed.append(replace(entry, end=end))
    return placed


def _content(source: BinaryIO, entry: _Entry) -> bytes:
    name = split_member(entry.path)[1]
    packed = _read_at(source, _data_offset(source, entry, name), entry.packed_bytes)
    content = packed if entry.method == _STORED else _inflated(packed, entry.unpacked_bytes, name)
    if len(content) != entry.unpacked_bytes:
        raise _bad(f"{name} is not as long as the directory says")
    if zlib.crc32(content) != entry.crc:
        raise _bad(f"{name} does not match its checksum")
    return content


def _data_offset(source: BinaryIO, entry: _Entry, name: str) -> int:
    """Where a member's bytes begin, once its local header has been found to agree with the directory."""
    header = _read_at(source, entry.offset, _LOCAL.size)
    signature, _, flags, method, _, _, crc, packed, unpacked, name_length, extra_length = _LOCAL.unpack(header)
    local_name = _read_at(source, entry.offset + _LOCAL.size, name_length)
    agrees = (signature, method, local_name) == (b"PK\x03\x04", entry.method, entry.raw_name)
    if not flags & _HAS_DESCRIPTOR:
        sizes = {(entry.crc, entry.packed_bytes, entry.unpacked_bytes), (entry.crc, _SENTINEL, _SENTINEL)}
        agrees = agrees and (crc, packed, unpacked) in sizes  # the sentinels: the sizes stand in a zip64 field
    if not agrees or flags & _ENCRYPTED:
        raise _bad(f"the header of {name} and the directory disagree")
    start: int = entry.offset + _LOCAL.size + name_length + extra_length
    if start + entry.packed_bytes > entry.end:
        raise _bad(f"{name} overlaps what follows it")
    return start


def _inflated(packed: bytes, unpacked_bytes: int, name: str) -> bytes:
    """At most one byte more than the directory promised is ever unpacked."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(packed, unpacked_bytes + 1)
    except zlib.error as error:
        raise _bad(f"{name} cannot be unpacked") from error
    if len(content) > unpacked_bytes or inflater.unconsumed_tail or inflater.unused_data or not inflater.eof:
        raise _bad(f"{name} is not as long as the directory says")
    return content


def _decoded(raw_name: bytes, flags: int) -> str:
    try:
        return raw_name.decode("utf-8" if flags & _IS_UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise _bad("the name of a member is not UTF-8, as it says it is") from error


def _read_at(source: BinaryIO, offset: int, num_bytes: int) -> bytes:
    source.seek(offset)
    content = source.read(num_bytes)
    if len(content) != num_bytes:
        raise _bad("it is cut short")
    return content


def _bad(why: str) -> MalformedUpload:
    return MalformedUpload(f"the .zip cannot be read: {why}")
