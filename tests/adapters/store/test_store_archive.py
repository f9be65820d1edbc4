import gzip
import io
import random
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.adapters.archive import files_from_parts, is_pickle, read_upload
from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.records import CONFIG_FILE, PROFILE_FILE, WEIGHTS_FILE
from peft_serve.errors import MalformedUpload, PayloadTooLarge, UnsupportedMediaType

CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * 8
GOOD = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS}
SMALL = UploadLimits(max_bytes=64_000, max_json_bytes=1000, max_members=20, ratio_slack_bytes=1000)

Members = dict[str, bytes]


def zipped(members: Members, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members: Members, *, form: int = tarfile.PAX_FORMAT, **fields: object) -> bytes:
    """`fields` are set on the last member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for i, (name, content) in enumerate(members.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if i == len(members) - 1:
                for key, value in fields.items():
                    setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def targz(members: Members) -> bytes:
    return gzip.compress(tarred(members))


PACKERS: list[Callable[[Members], bytes]] = [
    zipped,
    lambda m: zipped(m, zipfile.ZIP_STORED),
    tarred,
    lambda m: tarred(m, form=tarfile.USTAR_FORMAT),
    lambda m: tarred(m, form=tarfile.GNU_FORMAT),
    targz,
]


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("folder", ["", "./", "my adapter/", "./checkpoint-10/"])
def test_the_files_are_found_at_the_top_or_one_folder_deep(pack: Callable[[Members], bytes], folder: str) -> None:
    members = {folder + name: content for name, content in {**GOOD, PROFILE_FILE: b"{}"}.items()}
    files = read_upload(pack({**members, folder + "README.md": b"hello"}), "application/octet-stream")
    assert (files.config, files.weights, files.profile) == (CONFIG, WEIGHTS, b"{}")
    assert files.ignored == (folder + "README.md",)


def test_a_file_object_reads_like_bytes_and_folders_are_no_members() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("out")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in GOOD.items():
            member = tarfile.TarInfo(f"out/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert read_upload(buffer, None) == read_upload(zipped({"out/": b"", **GOOD}), "application/zip; x=y")


def test_a_zip_written_to_a_pipe_is_read() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError("a pipe has no place")

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CONFIG_FILE, CONFIG)
        with archive.open(WEIGHTS_FILE, "w", force_zip64=True) as member:
            member.write(WEIGHTS)
    assert read_upload(pipe.getvalue(), None).weights == WEIGHTS


def test_long_names_of_other_files_do_not_hurt() -> None:
    name = "x" * 300 + ".md"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        files = read_upload(tarred({**GOOD, name: b"long"}, form=form), None)
        assert files.ignored[0].startswith("xxx")
        assert len(files.ignored[0]) == 100


def test_what_is_ignored_is_listed_up_to_a_bound_and_printable() -> None:
    others = {f"notes-{i}\u202e.txt": b"" for i in range(50)}
    files = read_upload(zipped({**GOOD, **others}), None)
    assert len(files.ignored) == 33
    assert files.ignored[-1] == "and 18 more"
    assert all(name.isascii() and name.isprintable() for name in files.ignored)


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def central(content: bytes, index: int = 0) -> int:
    at = -1
    for _ in range(index + 1):
        at = content.index(b"PK\x01\x02", at + 1)
    return at


def linked(kind: bytes) -> bytes:
    return tarred({CONFIG_FILE: CONFIG, WEIGHTS_FILE: b""}, type=kind, linkname="/etc/passwd")


def unix_zip(mode: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(CONFIG_FILE, CONFIG)
        member = zipfile.ZipInfo(WEIGHTS_FILE)
        member.create_system, member.external_attr = 3, mode << 16
        archive.writestr(member, b"/etc/passwd")
    return buffer.getvalue()


def lying(content: bytes, num_bytes: int) -> bytes:
    """The second member's headers agree that it unpacks to `num_bytes`."""
    size = struct.pack("<I", num_bytes)
    local = content.index(b"PK\x03\x04", 4)
    return patched(patched(content, local + 22, size), central(content, 1) + 24, size)


def overlapping() -> bytes:
    """The second member's entry points at the first one's bytes."""
    content = zipped(GOOD, zipfile.ZIP_STORED)
    return patched(content, central(content, 1) + 42, struct.pack("<I", 0))


def swallowing() -> bytes:
    """The first member claims the second one's bytes too."""
    content = zipped({"a.txt": b"x" * 10, **GOOD}, zipfile.ZIP_STORED)
    return patched(content, central(content) + 20, struct.pack("<II", 200, 200))


def doubled() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore", UserWarning)  # zipfile's own opinion of what is done here
        for content in (CONFIG, WEIGHTS, b"other"):
            archive.writestr(CONFIG_FILE if content is CONFIG else WEIGHTS_FILE, content)
    return buffer.getvalue()


def pax_size(size: str) -> bytes:
    return tarred(GOOD, pax_headers={"size": size})


def global_path() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", pax_headers={"path": WEIGHTS_FILE}) as archive:
        for name in GOOD:
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


ZIP = zipped(GOOD)
STORED = zipped(GOOD, zipfile.ZIP_STORED)
TAR = tarred(GOOD)
END = ZIP.index(b"PK\x05\x06")

HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "json": lambda: CONFIG,
    "raw safetensors": lambda: struct.pack("<Q", 2) + b"{}",
    "rar": lambda: b"Rar!\x1a\x07\x00" + bytes(600),
    "git-lfs pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "pickle": lambda: b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
    "torch.save": lambda: zipped({"archive/data.pkl": b"\x80\x02.", "archive/data/0": b"0"}, zipfile.ZIP_STORED),
    "weights are a pickle": lambda: zipped({CONFIG_FILE: CONFIG, WEIGHTS_FILE: b"\x80\x04\x95abcdefgh"}),
    "weights are a zip": lambda: zipped({CONFIG_FILE: CONFIG, WEIGHTS_FILE: STORED}),
    "weights are a git-lfs pointer": lambda: zipped(
        {CONFIG_FILE: CONFIG, WEIGHTS_FILE: b"version https://git-lfs.github.com/spec/v1\n"}
    ),
    "no config": lambda: zipped({WEIGHTS_FILE: WEIGHTS}),
    "no weights": lambda: zipped({CONFIG_FILE: CONFIG}),
    "only a .bin": lambda: zipped({CONFIG_FILE: CONFIG, "adapter_model.bin": WEIGHTS}),
    "empty zip": lambda: zipped({}),
    "empty tar": lambda: tarred({}),
    "two folders deep": lambda: zipped({f"a/b/{name}": content for name, content in GOOD.items()}),
    "side by side in two folders": lambda: zipped({f"a/{CONFIG_FILE}": CONFIG, f"b/{WEIGHTS_FILE}": WEIGHTS}),
    "a second copy in a folder": lambda: zipped({**GOOD, f"checkpoint-5/{WEIGHTS_FILE}": WEIGHTS}),
    "a second copy, same name": doubled,
    "a second copy in a tar": lambda: tarred({**GOOD, f"./{WEIGHTS_FILE}": WEIGHTS}),
    "tar in zip": lambda: zipped({"adapter.tar": TAR}),
    "tar in tar": lambda: tarred({"adapter.tar": TAR}),
    "gzip in gzip": lambda: gzip.compress(gzip.compress(TAR)),
    "zip in gzip": lambda: gzip.compress(ZIP),
    "parent folder in zip": lambda: zipped({**GOOD, "../x": b""}),
    "parent folder in tar": lambda: tarred({**GOOD, "a/../../x": b""}),
    "absolute path": lambda: tarred({**GOOD, "/etc/x": b""}),
    "backslash": lambda: zipped({**GOOD, "..\\x": b""}),
    "control character": lambda: tarred({**GOOD, "a\nb": b""}),
    "symlink in tar": lambda: linked(tarfile.SYMTYPE),
    "hardlink": lambda: linked(tarfile.LNKTYPE),
    "character device": lambda: linked(tarfile.CHRTYPE),
    "block device": lambda: linked(tarfile.BLKTYPE),
    "fifo": lambda: linked(tarfile.FIFOTYPE),
    "sparse": lambda: linked(tarfile.GNUTYPE_SPARSE),
    "pax sparse": lambda: tarred(GOOD, pax_headers={"GNU.sparse.realsize": "9"}),
    "pax size beyond the file": lambda: pax_size("60000"),
    "pax size that is none": lambda: pax_size("-5"),
    "global pax path": global_path,
    "symlink in zip": lambda: unix_zip(0o120777),
    "device in zip": lambda: unix_zip(0o020666),
    "encrypted": lambda: patched(ZIP, central(ZIP) + 8, b"\x01\x00"),
    "encrypted in the local header": lambda: patched(ZIP, 6, b"\x01\x00"),
    "lzma": lambda: zipped(GOOD, zipfile.ZIP_LZMA),
    "bzip2": lambda: zipped(GOOD, zipfile.ZIP_BZIP2),
    "another method in the local header": lambda: patched(STORED, 8, b"\x08\x00"),
    "another name in the local header": lambda: patched(ZIP, 30, b"b"),
    "another size in the local header": lambda: patched(STORED, 22, b"\x01\x00\x00\x00"),
    "wrong checksum": lambda: STORED.replace(CONFIG, CONFIG.replace(b"LORA", b"LOHA")),
    "damaged deflate stream": lambda: patched(ZIP, 30 + len(CONFIG_FILE), b"\xff\xff\xff"),
    "unpacks to less than it says": lambda: lying(ZIP, 2049),
    "unpacks to more than it says": lambda: lying(ZIP, 5),
    "zip64 sizes": lambda: patched(ZIP, central(ZIP) + 20, b"\xff" * 8),
    "zip64 end record": lambda: patched(ZIP, END + 8, b"\xff" * 4),
    "more members than counted": lambda: patched(ZIP, END + 8, b"\x01\x00\x01\x00"),
    "fewer members than counted": lambda: patched(ZIP, END + 8, b"\x03\x00\x03\x00"),
    "part of several": lambda: patched(ZIP, END + 4, b"\x01\x00"),
    "directory elsewhere": lambda: patched(ZIP, END + 16, b"\x00\x00\x00\x00"),
    "offset beyond the end": lambda: patched(ZIP, central(ZIP) + 42, b"\xff\xff\xff\x7f"),
    "bytes after the end": lambda: ZIP + b"x",
    "same bytes twice": overlapping,
    "one member over another": swallowing,
    "zip cut short": lambda: ZIP[:-10],
    "zip without its end": lambda: ZIP[:END],
    "tar cut in a member": lambda: TAR[:700],
    "tar cut between members": lambda: TAR[:1024],
    "gzip cut short": lambda: gzip.compress(TAR)[:-20],
    "gzip with a wrong checksum": lambda: patched(gzip.compress(TAR), len(gzip.compress(TAR)) - 8, b"\0\0\0\0"),
    "gzip of garbage": lambda: b"\x1f\x8b\x08" + bytes(40),
    "tar with a damaged header": lambda: patched(TAR, 1024, b"x"),
    "two tars": lambda: TAR + TAR,
    "too many members": lambda: zipped({**GOOD, **{str(i): b"" for i in range(30)}}),
    "too many members in a tar": lambda: tarred({**GOOD, **{str(i): b"" for i in range(30)}}),
}

TOO_LARGE: dict[str, Callable[[], bytes]] = {
    "the upload": lambda: bytes(64_001),
    "the config": lambda: zipped({CONFIG_FILE: CONFIG + b" " * 1000, WEIGHTS_FILE: WEIGHTS}),
    "the config in a tar": lambda: tarred({CONFIG_FILE: CONFIG + b" " * 1000, WEIGHTS_FILE: WEIGHTS}),
    "the weights": lambda: zipped({CONFIG_FILE: CONFIG, WEIGHTS_FILE: zlib.compress(WEIGHTS) * 300}),
    "a bomb": lambda: zipped({CONFIG_FILE: CONFIG, WEIGHTS_FILE: bytes(60_000)}),
    "a bomb in a .gz": lambda: targz({CONFIG_FILE: CONFIG, WEIGHTS_FILE: bytes(60_000)}),
    "a bomb that is ignored": lambda: targz({**GOOD, "x.txt": bytes(1_000_000)}),
    "a bomb that is ignored in a zip": lambda: zipped({**GOOD, "x.txt": bytes(1_000_000)}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_malformed(case: str) -> None:
    with pytest.raises(MalformedUpload) as refusal:
        read_upload(HOSTILE[case](), "application/zip", limits=SMALL)
    assert refusal.value.message.isprintable()
    assert refusal.value.message.isascii()


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_is_too_large_says_so(case: str) -> None:
    with pytest.raises(PayloadTooLarge):
        read_upload(TOO_LARGE[case](), None, limits=SMALL)


PACKED = {"zip": zipped, "tar.gz": targz}


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("name", ["notes.txt", "a/b/c.bin", WEIGHTS_FILE])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
def test_what_an_archive_unpacks_to_counts_in_each_form_whether_it_is_read_or_not(
    form: str, name: str, is_first: bool
) -> None:
    noise = random.Random(1).randbytes(2000)  # so that 20 times the archive's size is more than 40,000 bytes
    others = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS, "noise": noise}
    for num_bytes, is_taken in ((30_000, True), (60_000, False)):
        large = {name: bytes(num_bytes)}
        content = PACKED[form]({**large, **others, **large} if is_first else {**others, **large})
        if is_taken:
            assert len(read_upload(content, None, limits=SMALL).weights) in (len(WEIGHTS), num_bytes)
        else:
            with pytest.raises(PayloadTooLarge, match="20 times its size; send the checkpoint's files alone"):
                read_upload(content, None, limits=SMALL)


@pytest.mark.parametrize("form", PACKED)
def test_more_than_the_server_accepts_is_refused_unread(form: str) -> None:
    noise = [random.Random(seed).randbytes(1000) for seed in range(4)]
    members = {**GOOD, **{f"{i}.bin": (noise[i] * 16)[:16_000] for i in range(4)}}  # 64,000 and the checkpoint
    with pytest.raises(PayloadTooLarge, match="more than this server accepts"):
        read_upload(PACKED[form](members), None, limits=replace(SMALL, max_ratio=10**6))


REASONS = {
    "git-lfs pointer": "git lfs pull",
    "weights are a git-lfs pointer": "git lfs pull",
    "side by side in two folders": "different folders",
    "a second copy in a folder": "twice",
    "a second copy, same name": "twice",
    "parent folder in tar": "plain relative paths",
    "hardlink": "--dereference",
    "pax size beyond the file": "cut short",
    "pax sparse": "sparse",
    "symlink in zip": "a link",
    "encrypted": "password",
    "lzma": "method 14",
    "wrong checksum": "checksum",
    "unpacks to less than it says": "not as long",
    "unpacks to more than it says": "not as long",
    "zip64 sizes": "zip64",
    "same bytes twice": "same bytes",
    "one member over another": "overlaps",
    "gzip with a wrong checksum": "gzip stream is damaged",
    "two tars": "bytes follow",
    "too many members": "more than 20 members",
}


@pytest.mark.parametrize("case", REASONS)
def test_the_refusal_says_what_is_wrong(case: str) -> None:
    with pytest.raises(MalformedUpload, match=REASONS[case]):
        read_upload(HOSTILE[case](), None, limits=SMALL)


@pytest.mark.parametrize("case", ["only a .bin", "weights are a pickle", "torch.save", "pickle"])
def test_a_pickle_is_told_the_way_out(case: str) -> None:
    with pytest.raises(MalformedUpload, match="safe_serialization=True"):
        read_upload(HOSTILE[case](), None)


def test_a_pickle_beside_the_weights_is_only_ignored() -> None:
    files = read_upload(zipped({**GOOD, "optimizer.pt": b"\x80\x02."}), None)
    assert files.ignored == ("optimizer.pt",)


def test_a_safetensors_header_length_is_not_taken_for_a_pickle() -> None:
    assert not is_pickle(struct.pack("<Q", 0x0280) + b"{}")
    assert not is_pickle(b"")
    assert is_pickle(b"\x80\x02}q\x00(X\x01\x00")


def test_a_bomb_is_never_unpacked_whole() -> None:
    content = lying(zipped({CONFIG_FILE: CONFIG, WEIGHTS_FILE: bytes(50_000_000)}), 2048)
    assert len(content) > 40_000  # the stream is there; every header says that it gives 2,048 bytes
    tracemalloc.start()
    with pytest.raises(MalformedUpload, match="not as long"):
        read_upload(content, None)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000


@pytest.mark.parametrize("media_type", ["application/json", "text/plain", "image/png", "multipart/form-data"])
def test_another_media_type_is_refused(media_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="application/zip"):
        read_upload(ZIP, media_type)


@pytest.mark.parametrize("source", [ZIP, STORED, TAR, gzip.compress(TAR, mtime=0)])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mutated_archive_gives_the_files_or_a_refusal(source: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(source) - 1))
    mutated = patched(source, at, data.draw(st.binary(min_size=1, max_size=8)))
    cut = data.draw(st.integers(0, len(mutated)) | st.just(len(mutated)))
    try:
        files = read_upload(mutated[:cut], None, limits=SMALL)
    except (MalformedUpload, PayloadTooLarge):
        return
    assert len(files.config) <= 1000
    assert len(files.weights) <= 64_000


def test_the_parts_of_a_form_are_held_to_the_same_rules() -> None:
    files = files_from_parts({**GOOD, "README.md": b""})
    assert (files.config, files.weights, files.ignored) == (CONFIG, WEIGHTS, ("README.md",))
    with pytest.raises(MalformedUpload, match=r"adapter_config\.json"):
        files_from_parts({WEIGHTS_FILE: WEIGHTS})
    with pytest.raises(MalformedUpload, match="safe_serialization"):
        files_from_parts({CONFIG_FILE: CONFIG, "adapter_model.bin": b""})
    with pytest.raises(MalformedUpload, match="plain relative"):
        files_from_parts({**GOOD, "../../x": b""})
    with pytest.raises(PayloadTooLarge, match=r"adapter_config\.json"):
        files_from_parts({**GOOD, CONFIG_FILE: bytes(2000)}, limits=SMALL)
