"""A shared folder: what is left behind goes in time, slow changes are refused, and what power may take."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_serve.adapters.shared.folder_bucket import FolderBucket
from tests.adapters.shared.shared_fakes import GRACE_S, Clock, Names, folder_bucket
from tests.adapters.store.memory_disk import MemoryDisk
from tests.adapters.store.store_fakes import UnsyncedFileSystem, tree

KEY = "names/a.json"


def content(bucket: FolderBucket, key: str = KEY) -> bytes | None:
    found = bucket.get(key, max_bytes=100)
    return None if found is None else found.content


def counted(bucket: FolderBucket, up_to: int) -> None:
    tag = bucket.put_new(KEY, b"1")
    for number in range(2, up_to + 1):
        assert tag is not None
        tag = bucket.replace(KEY, b"%d" % number, tag)


def test_what_was_replaced_goes_when_it_was_so_for_the_time_of_grace(tmp_path: Path) -> None:
    clock, names = Clock(), Names()
    one, two = folder_bucket(tmp_path, clock, names), folder_bucket(tmp_path, clock, names)
    counted(one, 3)
    assert content(two) == b"3"
    (tmp_path / "tmp" / "left").write_bytes(b"by a crash")
    two.tidy()
    assert tree(tmp_path) == {"names", "names/a.json", "names/a.json~2", "names/a.json~3", "tmp", "tmp/left"}
    clock.now_s += GRACE_S
    one.tidy()
    assert "names/a.json" in tree(tmp_path), "this one has looked once"
    two.tidy()
    assert tree(tmp_path) == {"names", "names/a.json~3", "tmp"}
    assert content(one) == content(folder_bucket(tmp_path, clock, names)) == b"3"
    assert one.tags("names/") == {KEY: "3"}
    assert one.put_new(KEY, b"x") is None
    assert one.replace(KEY, b"4", "3") == "4"
    assert content(two) == b"4"


@pytest.mark.parametrize("leaves", ["nothing", "an empty folder"])
def test_a_folder_that_is_away_is_no_folder_without_documents(leaves: str, tmp_path: Path) -> None:
    """As when a network's disk is not mounted: what is not seen is not gone."""
    root, away = tmp_path / "root", tmp_path / "away"
    bucket = folder_bucket(root, Clock(), Names())
    counted(bucket, 2)
    root.rename(away)
    if leaves != "nothing":
        root.mkdir()
    acts: list[Callable[[], object]] = [
        lambda: bucket.get(KEY, max_bytes=10),
        lambda: bucket.tags("names/"),
        lambda: bucket.put_new(KEY, b"x"),
        lambda: bucket.replace(KEY, b"x", "2"),
        lambda: bucket.put("marks/a.json", b"x"),
        bucket.tidy,
    ]
    for act in acts:
        with pytest.raises(OSError, match=r"away|No such file"):
            act()
    assert not root.exists() or not list(root.iterdir())
    if root.exists():
        root.rmdir()
    away.rename(root)
    assert content(bucket) == b"2"
    assert bucket.get("names/never.json", max_bytes=10) is None


def test_what_is_being_read_may_be_replaced_and_tidied_away(tmp_path: Path) -> None:
    clock, names = Clock(), Names()
    writer = folder_bucket(tmp_path, clock, names)
    counted(writer, 1)

    class Slow(UnsyncedFileSystem):
        def read(self, path: Path) -> bytes:
            if path.name == "a.json":
                assert writer.replace(KEY, b"2", "1") == "2"
                path.unlink()
            return super().read(path)

    reader = FolderBucket(tmp_path, Slow(), clock=clock, new_name=names, grace_s=GRACE_S)
    assert content(reader) == b"2"


def test_a_change_that_takes_too_long_is_refused(tmp_path: Path) -> None:
    clock, names = Clock(), Names()
    counted(folder_bucket(tmp_path, clock, names), 1)

    class Slow(UnsyncedFileSystem):
        def sync_file(self, path: Path) -> None:
            clock.now_s += GRACE_S

    slow = FolderBucket(tmp_path, Slow(), clock=clock, new_name=names, grace_s=GRACE_S)
    with pytest.raises(OSError, match="took so long"):
        slow.replace(KEY, b"2", "1")
    assert content(slow) == b"1"
    assert tree(tmp_path / "tmp") == set()


def test_room_that_must_stay_free(tmp_path: Path) -> None:
    bucket = folder_bucket(tmp_path, Clock(), min_free_bytes=1 << 60)
    with pytest.raises(OSError, match="stay free") as refused:
        bucket.require_room(1)
    assert refused.value.errno == errno.ENOSPC
    assert bucket.put_new("pins.json", b"a record has room") is not None


@pytest.mark.parametrize(
    ("act", "before", "after"),
    [
        (lambda bucket: bucket.put_new("blobs/sha256/0a/blob.json", b"new"), None, b"new"),
        (lambda bucket: bucket.replace("blobs/sha256/0a/blob.json", b"new", "1"), b"old", b"new"),
        (lambda bucket: bucket.put("blobs/sha256/0a/blob.json", b"new"), b"old", b"new"),
    ],
    ids=["put_new", "replace", "put"],
)
def test_after_a_power_cut_there_is_the_old_or_the_new_and_what_was_told(
    act: Callable[[FolderBucket], object], before: bytes | None, after: bytes
) -> None:
    root = Path("/srv/store")
    disk = MemoryDisk()
    first = FolderBucket(root, disk, clock=Clock(), new_name=Names(), grace_s=GRACE_S)
    if before is not None:
        first.put_new("blobs/sha256/0a/blob.json", before)
    num_before = len(disk.log)
    act(first)
    num_told = len(disk.log)
    disk.told(1)
    num_trees = 0
    for num_lines in range(num_before, len(disk.log) + 1):
        for left in disk.after_power_cut(num_lines):
            num_trees += 1
            mounted = FolderBucket(root, MemoryDisk(left), clock=Clock(), new_name=Names(), grace_s=GRACE_S)
            allowed = {after} if num_lines >= num_told else {before, after}
            assert content(mounted, "blobs/sha256/0a/blob.json") in allowed
    assert num_trees > 5
