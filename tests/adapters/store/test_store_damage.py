"""Files that are not what was written: their own version fails with words, is set aside, and is mended by an upload."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_serve.adapters.records import VersionState
from peft_serve.adapters.store import AdapterStore
from peft_serve.errors import AdapterDamaged, AdapterUnavailable, StoreFull, Unavailable
from tests.adapters.store.memory_disk import READS, MemoryDisk, Tree
from tests.adapters.store.store_fakes import checkpoint
from tests.adapters.store.test_store_power import FOUR, ONE, ROOT, THREE, TWO, UPLOAD, Server, begun

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

Damage = Callable[[Tree], object]


def flipped(file: str, at: int) -> Damage:
    def damage(blob: Tree) -> None:
        content = blob[file]
        assert isinstance(content, bytes)
        blob[file] = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    return damage


DAMAGES: dict[str, Damage] = {
    "a bit of the weights": flipped(WEIGHTS, 7),
    "a bit of the config": flipped(CONFIG, 0),
    "half of the weights": lambda blob: blob.update({WEIGHTS: blob[WEIGHTS][:9]}),  # type: ignore[index]
    "weights of zeros": lambda blob: blob.update({WEIGHTS: bytes(len(blob[WEIGHTS]))}),
    "empty weights": lambda blob: blob.update({WEIGHTS: b""}),
    "no weights": lambda blob: blob.pop(WEIGHTS),
    "no config": lambda blob: blob.pop(CONFIG),
    "a profile more": lambda blob: blob.update({"peft_serve.json": b"{}"}),
    "nothing in it": lambda blob: blob.clear(),
}


def inside(tree: Tree, *names: str) -> Tree:
    for name in (*ROOT.parts[1:], *names):
        found = tree[name]
        assert isinstance(found, dict)
        tree = found
    return tree


def blob_of(tree: Tree, files: object = ONE) -> Tree:
    return inside(tree, "blobs", "sha256", files.digest().removeprefix("sha256:"))  # type: ignore[attr-defined]


def no_writing(kind: str, _path: Path, _call: int) -> OSError | None:
    return None if kind in READS or kind == "free_bytes" else OSError(errno.EROFS, os.strerror(errno.EROFS))


def two_versions() -> Tree:
    """`a` is FOUR, then ONE; `b` is TWO."""
    disk = MemoryDisk()
    server = Server(disk)
    for name, files in (("a", FOUR), ("b", TWO), ("a", ONE)):
        server.put(name, files)
    return disk.tree()


@pytest.mark.parametrize("is_read_only", [False, True], ids=["", "read-only"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_fails_its_own_version_and_an_upload_mends_it(kind: str, is_read_only: bool) -> None:
    tree = two_versions()
    DAMAGES[kind](blob_of(tree))
    disk = MemoryDisk(tree)
    if is_read_only:
        disk.fault = no_writing
    server = Server(disk)
    if kind != "nothing in it":
        assert server.catalog.resolve("a").id == ONE.digest(), "what is not read is not known to be damaged"
    for _ in range(2):
        with pytest.raises(AdapterDamaged, match="upload it again") as refusal:
            server.catalog.files(ONE.digest())
        assert refusal.value.retry_after_s is None, "waiting does not help"
        assert str(ROOT) not in refusal.value.message
    with pytest.raises(AdapterUnavailable, match="adapter 'a' version 2"):
        server.catalog.resolve("a")
    entry = server.catalog.get("a")
    assert "upload it again" in entry.problem
    assert [v.state for v in server.catalog.versions("a")] == [VersionState.ACTIVE, VersionState.QUARANTINED]
    assert server.catalog.get("b").problem == ""
    assert server.catalog.files(server.catalog.resolve("b").id) == TWO
    assert server.catalog.files(server.catalog.resolve("a@1").id) == FOUR, "the version before it still serves"
    if is_read_only:
        return
    assert disk.list_dir(ROOT / "quarantine") == [ONE.digest().removeprefix("sha256:")]
    server.put("a", ONE)
    assert server.catalog.get("a").problem == ""
    assert Server(MemoryDisk(disk.tree())).catalog.files(ONE.digest()) == ONE


def test_a_blob_that_is_gone_whole_is_told_and_mended() -> None:
    tree = two_versions()
    del inside(tree, "blobs", "sha256")[ONE.digest().removeprefix("sha256:")]
    server = Server(MemoryDisk(tree))
    with pytest.raises(AdapterUnavailable, match=r"adapter 'a' version 2: .*upload it again"):
        server.catalog.resolve("a")
    assert server.catalog.resolve("a@1").id == FOUR.digest()
    server.catalog.changes.rollback("a", 1)
    assert server.catalog.resolve("a").id == FOUR.digest()
    server.put("a", ONE)
    assert server.catalog.files(server.catalog.resolve("a").id) == ONE


@pytest.mark.parametrize("document", [b"", b"{", b"\0" * 100, b'{"sha256":"0","body":{}}\n'])
def test_damaged_pins_are_none_and_can_be_said_again(document: bytes, caplog: pytest.LogCaptureFixture) -> None:
    tree = begun()
    inside(tree)["pins.json"] = document
    disk = MemoryDisk(tree)
    server = Server(disk)
    assert server.catalog.pins.all() == {}
    assert "damaged" in caplog.text
    server.catalog.pins.add(ONE.digest(), "a")
    assert Server(MemoryDisk(disk.tree())).catalog.pins.all() == {ONE.digest(): "a"}


# a store that this process may not write to


def read_only(tree: Tree) -> Server:
    return Server(MemoryDisk(tree, fault=no_writing))


def test_a_read_only_store_serves_and_takes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    server = read_only(begun())
    assert server.store.is_read_only
    assert "read-only" in caplog.text
    assert server.state() == Server(MemoryDisk(begun())).state()
    before = server.disk.tree()
    for act in (UPLOAD, lambda s: s.catalog.changes.delete("a"), lambda s: s.put("a", ONE), lambda s: s.put("a", FOUR)):
        with pytest.raises(Unavailable, match="read-only: its adapters are served") as refusal:
            act(server)
        assert not isinstance(refusal.value, StoreFull | AdapterUnavailable)
        assert refusal.value.retry_after_s
    server.catalog.pins.add(ONE.digest(), "a")
    assert server.catalog.pins.all() == {ONE.digest(): "a"}, "as long as the process lives"
    assert server.catalog.changes.collect() == 0
    assert server.disk.tree() == before
    assert server.state()[:-2] == Server(MemoryDisk(begun())).state()[:-2]
    server.store.close()


def test_a_read_only_disk_without_a_store_is_no_store() -> None:
    with pytest.raises(Unavailable, match="cannot be opened"):
        read_only({})
    half = begun()
    del inside(half)["names"]
    with pytest.raises(Unavailable, match="cannot be opened"):
        read_only(half)


def test_readers_beside_the_one_that_writes_see_versions_whole() -> None:
    """As on a folder that several servers share: one may write to it, the others see it read-only."""
    disk = MemoryDisk(begun())
    writer = Server(disk)
    with pytest.raises(Unavailable, match="in use by another server"):
        Server(disk)
    disk.fault = no_writing
    reader = Server(disk)
    assert reader.store.is_read_only
    assert reader.catalog.resolve("a").id == ONE.digest()
    disk.fault = lambda *_: None
    writer.put("a", FOUR)
    writer.put("c", THREE)
    writer.catalog.changes.delete("b")
    disk.fault = no_writing
    assert reader.catalog.resolve("a").id == ONE.digest(), "a reader goes on with what it has read"
    assert reader.catalog.files(ONE.digest()) == ONE
    with pytest.raises(AdapterUnavailable):
        reader.catalog.files(TWO.digest())
    again = Server(disk)
    assert (again.catalog.resolve("a").id, again.catalog.resolve("c").id) == (FOUR.digest(), THREE.digest())
    assert again.store.names() == ["a", "b", "c"]


def test_a_disk_that_becomes_read_only_is_told_so_and_goes_on_being_read() -> None:
    disk = MemoryDisk(begun())
    server = Server(disk)
    disk.fault = no_writing
    with pytest.raises(Unavailable, match="read-only"):
        UPLOAD(server)
    assert server.state() == Server(MemoryDisk(begun())).state()
    disk.fault = lambda *_: None
    UPLOAD(server)
    assert server.catalog.files(checkpoint(3, profile=b'{"template": "{text}"}').digest()) == THREE


def test_a_real_store_has_one_writer_and_a_crash_frees_it(tmp_path: Path) -> None:
    from peft_serve.adapters.filesystem import DiskFileSystem

    first = AdapterStore(tmp_path, DiskFileSystem())
    assert not first.is_read_only
    with pytest.raises(Unavailable, match="in use"):
        AdapterStore(tmp_path, DiskFileSystem())
    first.close()
    AdapterStore(tmp_path, DiskFileSystem()).close()
