"""Hostile archives, one small builder each: what a careless reader would unpack, follow, overwrite or choke on."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE

CONFIG: Final = b'{"peft_type": "LORA"}'
WEIGHTS: Final = bytes(range(256)) * 8
GOOD: Final = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS}
OTHER: Final = b'{"peft_type": "LOHA"}'
Build = Callable[[], bytes]


# ---- zip, by the library and by hand


def zipped(members: Mapping[str, bytes] = MappingProxyType(GOOD), method: int = zipfile.ZIP_STORED) -> bytes:
    return zip_of(*members.items(), method=method)


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """Members as given, names twice too."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore", UserWarning)  # what the library thinks of two members of one name
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def local(content: bytes, number: int = 0) -> int:
    return _find(content, b"PK\x03\x04", number)


def central(content: bytes, number: int = 0) -> int:
    return _find(content, b"PK\x01\x02", number)


def _find(content: bytes, sign: bytes, number: int) -> int:
    at = -1
    for _ in range(number + 1):
        at = content.index(sign, at + 1)
    return at


def end(content: bytes) -> int:
    return content.rindex(b"PK\x05\x06")


def unix(name: str, mode: int, *, system: int = 3) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = system, mode << 16
    return member


def renamed(content: bytes, old: str, new: bytes) -> bytes:
    """A name exchanged for another of its length, in the directory and in the member's own header."""
    assert len(new) == len(old.encode())
    return content.replace(old.encode(), new)


def both_sizes(number: int, unpacked: int, *, packed: int | None = None) -> bytes:
    """A member of a deflated archive whose headers agree on sizes that are not so."""
    content = zipped(method=zipfile.ZIP_DEFLATED)
    at, there = local(content, number), central(content, number)
    content = patched(content, at + 22, struct.pack("<I", unpacked))
    content = patched(content, there + 24, struct.pack("<I", unpacked))
    if packed is not None:
        content = patched(content, at + 18, struct.pack("<I", packed))
        content = patched(content, there + 20, struct.pack("<I", packed))
    return content


def zip64_record(total: int = 0xFFFF) -> bytes:
    """An end record of zip64 and its locator in front of the plain one, which points at them."""
    content = zipped()
    at = end(content)
    _, _, _, here, _, length, start, _ = struct.unpack_from("<4s4H2IH", content, at)
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, here, here, length, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1)
    plain = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, total, total, length, start, 0)
    return content[:at] + record + locator + plain


def zip64_extra(unpacked: int) -> bytes:
    """Sizes in an extra field, the plain ones standing for "look there"."""
    content = bytearray(zipped())
    at = central(bytes(content), 1)
    name_length, extra_length = struct.unpack_from("<2H", content, at + 28)
    content[at + 20 : at + 28] = b"\xff" * 8
    content[at + 30 : at + 32] = struct.pack("<H", extra_length + 20)
    field = struct.pack("<2H2Q", 1, 16, unpacked, unpacked)
    content[at + 46 + name_length : at + 46 + name_length] = field
    grown = end(bytes(content)) + 12
    length = struct.unpack_from("<I", content, grown)[0] + 20
    content[grown : grown + 4] = struct.pack("<I", length)
    return bytes(content)


def quoted_zip() -> bytes:
    """Deflate streams inside of each other: every member's bytes are the next one's header and bytes as well."""
    content = zipped({"a.bin": zipped(), **GOOD})
    inner = local(content, 1)
    at = central(content, 3)  # the first of the outer directory
    return patched(content, at + 42, struct.pack("<I", inner))


# ---- tar, by the library and by hand


def header(
    name: bytes, num_bytes: int | bytes = 0, kind: bytes = b"0", *, link: bytes = b"", sign: bytes = b""
) -> bytes:
    """One ustar header, its checksum right."""
    size = b"%011o\0" % num_bytes if isinstance(num_bytes, int) else num_bytes
    block = name.ljust(100, b"\0")[:100] + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0" + b" " * 8
    block += kind + link.ljust(100, b"\0") + (sign or b"ustar\x0000")
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def entry(name: bytes, content: bytes = b"", kind: bytes = b"0", **more: bytes) -> bytes:
    return header(name, len(content), kind, **more) + content + bytes(-len(content) % 512)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return entry(b"pax", b"".join(map(record, records)), kind)


def record(text: bytes) -> bytes:
    length = len(text) + 2
    while len(b"%d" % length) + len(text) + 2 != length:
        length += 1
    return b"%d %s\n" % (length, text)


def tar(*parts: bytes, good: bool = True) -> bytes:
    """The parts, the honest files behind them unless told otherwise, and the end."""
    files = b"".join(entry(name.encode(), content) for name, content in GOOD.items()) if good else b""
    return b"".join(parts) + files + bytes(1024)


def tarred(members: Mapping[str, bytes] = MappingProxyType(GOOD), form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


# ---- gzip


def gz_name(num_bytes: int) -> bytes:
    """A stream whose header has a name of so many bytes, and then nothing."""
    return b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * num_bytes


def empty_streams(count: int) -> bytes:
    return gzip.compress(b"", mtime=0) * count


REFUSED: Final[Mapping[str, Build]] = MappingProxyType(
    {
        # links, devices and what else is no file
        "zip: symbolic link": lambda: zip_of((CONFIG_FILE, CONFIG), (unix(WEIGHTS_FILE, 0o120777), b"/etc/passwd")),
        "zip: symbolic link beside": lambda: zip_of(*GOOD.items(), (unix("readme", 0o120777), b"../../etc")),
        "zip: link made on a Mac": lambda: zip_of(*GOOD.items(), (unix("a", 0o120777, system=19), b"x")),
        "zip: socket": lambda: zip_of((CONFIG_FILE, CONFIG), (unix(WEIGHTS_FILE, 0o140777), WEIGHTS)),
        "zip: fifo": lambda: zip_of((CONFIG_FILE, CONFIG), (unix(WEIGHTS_FILE, 0o010777), WEIGHTS)),
        "zip: device": lambda: zip_of((CONFIG_FILE, CONFIG), (unix(WEIGHTS_FILE, 0o060777), WEIGHTS)),
        "tar: hard link": lambda: tar(entry(b"x", b"", b"1", link=b"/etc/passwd")),
        "tar: symbolic link": lambda: tar(entry(b"x", b"", b"2", link=b"../../etc/passwd")),
        "tar: link, then through it": lambda: tar(entry(b"d", b"", b"2", link=b"/etc"), entry(b"d/passwd", b"x")),
        "tar: character device": lambda: tar(entry(b"x", b"", b"3")),
        "tar: block device": lambda: tar(entry(b"x", b"", b"4")),
        "tar: fifo": lambda: tar(entry(b"x", b"", b"6")),
        "tar: sparse": lambda: tar(entry(b"x", b"", b"S")),
        "tar: multi-volume": lambda: tar(entry(b"x", b"", b"M")),
        "tar: dump folder": lambda: tar(entry(b"x", b"", b"D")),
        "tar: long link": lambda: tar(entry(b"x", b"/etc/passwd\0", b"K")),
        "tar: of a vendor's own": lambda: tar(entry(b"x", b"", b"Z")),
        "tar: pax sparse 1.0": lambda: tar(pax(b"GNU.sparse.major=1", b"GNU.sparse.name=x"), entry(b"y", b"")),
        "tar: pax sparse map": lambda: tar(pax(b"GNU.sparse.map=0,1"), entry(b"y", b"")),
        # names
        "zip: parent": lambda: zipped({**GOOD, "../x": b""}),
        "zip: parent in the middle": lambda: zipped({**GOOD, "a/../../x": b""}),
        "zip: absolute": lambda: zip_of(*GOOD.items(), (unix("/etc/x", 0o100644), b"")),
        "zip: backslash": lambda: zipped({**GOOD, "a\\..\\x": b""}),
        "zip: drive": lambda: zipped({**GOOD, "C:\\x": b""}),
        "zip: NUL": lambda: renamed(zipped({"notes.txt": b"", **GOOD}), "notes.txt", b"note\0.txt"),
        "zip: NUL behind a wanted name": lambda: renamed(
            zipped({f"{CONFIG_FILE}_.sh": CONFIG, WEIGHTS_FILE: WEIGHTS}),
            f"{CONFIG_FILE}_.sh",
            CONFIG_FILE.encode() + b"\0.sh",
        ),
        "zip: name that is no UTF-8": lambda: renamed(
            zipped({"\u00e9\u00e9": b"", **GOOD}), "\u00e9\u00e9", b"\xff\xfe\xff\xfe"
        ),
        "tar: parent": lambda: tar(entry(b"../x")),
        "tar: absolute": lambda: tar(entry(b"/etc/x")),
        "tar: control": lambda: tar(entry(b"a\x1b[2Jb")),
        "tar: long name that climbs": lambda: tar(entry(b"@", b"../" * 200 + b"x\0", b"L"), entry(b"x")),
        "tar: pax name that climbs": lambda: tar(pax(b"path=../../x"), entry(b"x")),
        "tar: pax name that is absolute": lambda: tar(pax(b"path=/etc/passwd"), entry(b"x")),
        "tar: ustar prefix that climbs": lambda: tar(
            (lambda h: h[:148] + b"%06o\0 " % sum(h[:148] + b" " * 8 + h[156:]) + h[156:])(
                entry(b"x")[:345] + b"../..".ljust(155, b"\0") + bytes(12)
            )
        ),
        # one thing twice, or two things in one
        "zip: a name twice": lambda: zip_of((CONFIG_FILE, CONFIG), (CONFIG_FILE, OTHER), (WEIGHTS_FILE, WEIGHTS)),
        "zip: a name twice, once in a folder": lambda: zipped({**GOOD, f"a/{CONFIG_FILE}": OTHER}),
        "zip: a name twice, once behind a dot": lambda: zipped({**GOOD, f"./{CONFIG_FILE}": OTHER}),
        "zip: two adapters": lambda: zipped({f"{x}/{name}": content for x in "ab" for name, content in GOOD.items()}),
        "tar: a name twice": lambda: tar(entry(CONFIG_FILE.encode(), OTHER)),
        "tar: a name twice by pax": lambda: tar(pax(b"path=" + CONFIG_FILE.encode()), entry(b"x", OTHER)),
        "tar: two adapters": lambda: tarred({f"{x}/{name}": content for x in "ab" for name, content in GOOD.items()}),
        "tar: two archives": lambda: tar() + tar(),
        "zip: another behind it": lambda: zipped() + zipped({**GOOD, CONFIG_FILE: OTHER}),
        "zip: something in front of it": lambda: b"PK\x03\x04" + b"\0" * 26 + zipped(),
        "zip: another in its comment": lambda: (lambda z: patched(z, len(z) - 2, struct.pack("<H", len(z))) + z)(
            zipped()
        ),
        "zip in zip": lambda: zipped({"adapter.zip": zipped()}),
        "tar in zip": lambda: zipped({"adapter.tar": tarred()}),
        "zip in gzip": lambda: gzip.compress(zipped()),
        "gzip in gzip": lambda: gzip.compress(gzip.compress(tarred())),
        # numbers that lie
        "zip: members share bytes": lambda: (lambda z: patched(z, central(z, 1) + 42, bytes(4)))(zipped()),
        "zip: one member inside another": quoted_zip,
        "zip: sizes too large": lambda: both_sizes(1, 1 << 30),
        "zip: sizes too small": lambda: both_sizes(1, 7),
        "zip: packed beyond the next": lambda: both_sizes(0, 30, packed=4000),
        "zip: zip64 record": zip64_record,
        "zip: zip64 record, plain counts": lambda: zip64_record(2),
        "zip: zip64 sizes of nothing": lambda: zip64_extra(0),
        "zip: zip64 sizes of everything": lambda: zip64_extra((1 << 64) - 1),
        "zip: offset at itself": lambda: (lambda z: patched(z, central(z, 1) + 42, struct.pack("<I", central(z))))(
            zipped()
        ),
        "zip: encrypted": lambda: (lambda z: patched(z, central(z) + 8, b"\x01"))(zipped()),
        "zip: strongly encrypted": lambda: (lambda z: patched(z, central(z) + 8, b"\x41"))(zipped()),
        "zip: encrypted directory": lambda: (lambda z: patched(z, central(z) + 9, b"\x20"))(zipped()),
        "zip: packed in a way of 2001": lambda: (lambda z: patched(z, central(z) + 10, b"\x09\0"))(zipped()),
        "zip: checksum of something else": lambda: zipped().replace(CONFIG, OTHER),
        "zip: other file by its own header": lambda: (lambda z: patched(z, local(z) + 30, b"b"))(zipped()),
        "tar: size in base 256": lambda: tar(header(b"x", b"\x80" + b"\xff" * 11)),
        "tar: size below zero": lambda: tar(header(b"x", b"\xff" * 12)),
        "tar: size that is no number": lambda: tar(header(b"x", b"0000000009z\0")),
        "tar: pax size": lambda: tar(pax(b"size=999999999999999"), entry(b"x", b"y")),
        "tar: pax size with a sign": lambda: tar(pax(b"size=-512"), entry(b"x", b"y")),
        "tar: pax size in other digits": lambda: tar(pax("size=\u0661".encode()), entry(b"x", b"y")),
        "tar: pax record without an end": lambda: tar(entry(b"pax", b"999999 path=x\n", b"x"), entry(b"x")),
        "tar: pax record of no length": lambda: tar(entry(b"pax", b"0 path=x\n", b"x"), entry(b"x")),
        "tar: global size": lambda: tar(pax(b"size=0", kind=b"g")),
        "tar: global name": lambda: tar(pax(b"path=" + WEIGHTS_FILE.encode(), kind=b"g")),
        "tar: wrong checksum": lambda: patched(tar(), 148, b"0000000\0"),
        # work for nothing
        "gzip: a name without an end": lambda: gz_name(4 << 20),
        "gzip: nothing, many times": lambda: empty_streams(100_000),
        "gzip: cut short": lambda: gzip.compress(tarred())[:-9],
        "gzip: other length at the end": lambda: gzip.compress(tarred())[:-4] + b"\0\0\0\1",
        "tar: names without an end": lambda: tar(*(entry(b"@", b"n" * 60_000, b"L") for _ in range(40))),
        "tar: pax records without an end": lambda: tar(pax(*[b"a="] * 12_000) * 40),
        "zip: many members": lambda: zipped({**{f"{n}.txt": b"" for n in range(1001)}, **GOOD}),
        "tar: many members": lambda: tar(*(entry(b"x") for _ in range(1001))),
        # what is to be run, not read
        "pickle for weights": lambda: zipped({CONFIG_FILE: CONFIG, WEIGHTS_FILE: pickle.dumps({"w": "x" * 99})}),
        "torch.save for weights": lambda: zipped(
            {CONFIG_FILE: CONFIG, WEIGHTS_FILE: zipped({"a/data.pkl": b"\x80\x02."})}
        ),
        "pickle beside the config": lambda: zipped({CONFIG_FILE: CONFIG, "adapter_model.bin": b"\x80\x02}q\0."}),
    }
)
"""MalformedUpload or PayloadTooLarge, each."""

WHOLE: Final = {WEIGHTS_FILE: WEIGHTS}


def mostly_zeros() -> bytes:
    """32 MiB that pack to less than a tenth, and to more than a twentieth."""
    return random.Random(1).randbytes(2 << 20) + bytes(30 << 20)


BOMBS: Final[Mapping[str, Build]] = MappingProxyType(
    {
        "zip: zeros": lambda: zipped({CONFIG_FILE: CONFIG, WEIGHTS_FILE: bytes(40 << 20)}, zipfile.ZIP_DEFLATED),
        "zip: zeros for a config": lambda: zipped(
            {CONFIG_FILE: b" " * (4 << 20), WEIGHTS_FILE: b""}, zipfile.ZIP_DEFLATED
        ),
        "gzip: zeros": lambda: gzip.compress(tarred({CONFIG_FILE: CONFIG, WEIGHTS_FILE: bytes(40 << 20)})),
        "zip: zeros that are not wanted": lambda: zipped({**GOOD, "x": bytes(40 << 20)}, zipfile.ZIP_DEFLATED),
        "zip: a member that says it is large": lambda: (
            lambda z: patched(z, central(z) + 24, struct.pack("<I", 1 << 30))
        )(zipped({"x": b"", **GOOD})),
        "gzip: zeros that are not wanted": lambda: gzip.compress(tarred({**GOOD, "x": bytes(40 << 20)})),
        "zip: a config as large as weights": lambda: zipped(
            {CONFIG_FILE: mostly_zeros(), **WHOLE}, zipfile.ZIP_DEFLATED
        ),
        "gzip: a config as large as weights": lambda: gzip.compress(tarred({CONFIG_FILE: mostly_zeros(), **WHOLE})),
        "gzip: zeros behind the end": lambda: gzip.compress(tarred() + bytes(40 << 20)),
        "gzip: a header of zeros": lambda: gzip.compress(header(b"x", 1 << 32) + bytes(40 << 20)),
        "deflate: zeros of zeros": lambda: zipped({"z": zlib.compress(bytes(8 << 20)), CONFIG_FILE: bytes(2 << 20)}),
    }
)
"""Small as they are sent, and much more unpacked."""

HARMLESS: Final[Mapping[str, Build]] = MappingProxyType(
    {
        "zip: another case": lambda: zipped({**GOOD, CONFIG_FILE.upper(): OTHER, "Adapter_Model.SafeTensors": b"x"}),
        "zip: full-width letters": lambda: zipped({**GOOD, "\uff41dapter_config.json": OTHER}),
        "zip: a ligature that unfolds": lambda: zipped({**GOOD, "adapter_con\ufb01g.json": OTHER}),
        "zip: deeper": lambda: zipped({**GOOD, f"a/b/{CONFIG_FILE}": OTHER}),
        "zip: a space behind the name": lambda: zipped({**GOOD, f"{CONFIG_FILE} ": OTHER}),
        "zip: reserved names": lambda: zipped({**GOOD, "CON": b"", "aux.txt": b"", "a:b": b"", "-rf": b""}),
        "zip: programs": lambda: zipped({**GOOD, "setup.py": b"1/0", ".bashrc": b"", "modeling.py": b"1/0"}),
        "zip: a pickle beside": lambda: zipped({**GOOD, "optimizer.pt": b"\x80\x02cos\nsystem\n."}),
        "tar: another case": lambda: tar(entry(CONFIG_FILE.upper().encode(), OTHER)),
        "tar: NUL ends the name": lambda: tar(entry(b"x\0" + CONFIG_FILE.encode(), OTHER)),
        "tar: pax facts": lambda: tar(
            pax(b"uname=root", b"SCHILY.xattr.security.capability=x", b"mtime=-1"), entry(b"x")
        ),
        "tar: setuid root": lambda: tar(patched_mode(entry(b"x", b"#!"))),
        "tar: zeros behind": lambda: tar() + bytes(10_240),
        "gzip: in two streams": lambda: gzip.compress(tar()[:1500]) + gzip.compress(tar()[1500:]) + bytes(64),
        "gzip: all fields of a header": lambda: gz_with_fields(tar()),
    }
)
"""The honest files come out of these, and nothing else does."""


def patched_mode(block: bytes) -> bytes:
    block = patched(block, 100, b"0006777\0")
    counted = block[:148] + b" " * 8 + block[156:512]
    return patched(block, 148, b"%06o\0 " % sum(counted))


def gz_with_fields(content: bytes) -> bytes:
    """A header with an extra field, a name, a comment and a checksum of its own."""
    head = b"\x1f\x8b\x08\x1e" + bytes(6) + struct.pack("<H", 4) + b"abcd" + b"../../name\0" + b"comment\0"
    head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    tail = struct.pack("<2I", zlib.crc32(content), len(content))
    return head + packer.compress(content) + packer.flush() + tail
