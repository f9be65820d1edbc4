"""The compiled store: a cache that gives what it was given or nothing, whatever the disk and other processes do."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import random
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_serve.adapters.bounded_folder import BoundedFolder
from peft_serve.adapters.compiled_store import CompiledEvent, CompiledStore
from peft_serve.adapters.filesystem import FileSystem
from peft_serve.adapters.primitives import Adapter, Affine, LowRank
from peft_serve.adapters.shared_primitives import Rescaled
from peft_serve.core import AdapterId
from tests.adapters.same_bits import assert_same_bits
from tests.adapters.store.store_fakes import (
    Crash,
    DiskAfterPowerLoss,
    FaultyFileSystem,
    LoggingFileSystem,
    UnsyncedFileSystem,
    no_room,
)

BASE = "the base, the limits and the code"
KIB = 1024


def digest(number: int) -> AdapterId:
    return AdapterId(f"sha256:{hashlib.sha256(bytes([number])).hexdigest()}")


def adapter(number: int, *, kib: int = 1, id: AdapterId | None = None) -> Adapter:
    torch.manual_seed(number)
    edit = Affine(delta=LowRank(torch.randn(4, 8 * kib), torch.randn(56 * kib, 4)))
    return Adapter(id=id or digest(number), method="LORA", sites={"q": edit})


class Store:
    """A store over a folder, as one process opens it, and the events it told."""

    def __init__(self, root: Path, fs: FileSystem | None = None, **options: Any) -> None:
        self.events: Counter[CompiledEvent] = Counter()
        self.root = root
        numbers = itertools.count()
        self.folder = BoundedFolder(
            root,
            fs or UnsyncedFileSystem(),
            max_bytes=options.pop("max_bytes", 1024 * KIB),
            new_name=lambda: f"{id(self)}-{next(numbers)}",
            now_s=options.pop("now_s", lambda: 0.0),
        )
        self.store = CompiledStore(
            self.folder, on_event=lambda event: self.events.update([event]), **{"compiled_for": BASE, **options}
        )

    def keep(self, *adapters: Adapter) -> None:
        for each in adapters:
            self.store.keep(each)
        assert self.store.settle(10)

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())


@pytest.fixture
def opened(tmp_path: Path) -> Store:
    return Store(tmp_path / "compiled")


def test_what_is_kept_is_there_for_the_next_process_too(opened: Store) -> None:
    assert opened.store.get(digest(1)) is None
    opened.keep(adapter(1), adapter(2))
    for store in (opened, Store(opened.root)):
        for number in (1, 2):
            assert store.store.has(digest(number))
            assert_same_bits(store.store.get(digest(number)), adapter(number))
        assert not store.store.has(digest(3))
        assert store.store.get(digest(3)) is None
    assert opened.events == {"hit": 2, "miss": 2, "written": 2}
    assert [path.parent.parent for path in opened.files()] == [opened.root, opened.root]
    assert all(path.name.partition(".")[2].startswith(path.parent.name) for path in opened.files())


def test_what_waits_to_be_written_is_there_already(tmp_path: Path) -> None:
    class SlowFileSystem(UnsyncedFileSystem):
        gate = threading.Event()

        def write(self, path: Path, content: bytes) -> None:
            assert self.gate.wait(10)
            super().write(path, content)

    opened = Store(tmp_path, SlowFileSystem(), max_waiting_bytes=10 * KIB)
    first = adapter(1, kib=100)
    opened.store.keep(first)  # larger than what may wait, and alone
    opened.store.keep(first)
    opened.store.keep(adapter(2))
    assert opened.store.has(first.id)
    assert opened.store.get(first.id) is first
    assert not opened.store.settle(0.01)
    SlowFileSystem.gate.set()
    assert opened.store.settle(10)
    assert opened.events == {"hit": 1, "passed_over": 1, "written": 1}
    assert opened.store.get(first.id) is not first
    assert opened.store.get(digest(2)) is None


@pytest.mark.parametrize("id", [f"{digest(1)}#2", f"{digest(1)}*0.5", f"{digest(1)}+{digest(2)}*-1e-05"])
def test_combinations_and_tasks_have_files_of_their_own(id: str, opened: Store) -> None:
    opened.keep(adapter(1), adapter(9, id=AdapterId(id)))
    assert_same_bits(opened.store.get(AdapterId(id)), adapter(9, id=AdapterId(id)))
    assert_same_bits(opened.store.get(digest(1)), adapter(1))


def test_the_longest_combination_has_a_name_that_a_disk_takes(opened: Store) -> None:
    made = adapter(1, id=AdapterId("+".join(f"{digest(number)}*-1.2345678901234567" for number in range(1, 9))))
    opened.keep(made)
    assert_same_bits(opened.store.get(made.id), made)


def test_what_was_compiled_for_another_base_is_not_found(opened: Store) -> None:
    opened.keep(adapter(1))
    other = Store(opened.root, compiled_for="another base")
    assert other.store.get(digest(1)) is None
    other.keep(replace(adapter(2), id=digest(1)))
    assert_same_bits(opened.store.get(digest(1)), adapter(1))
    assert len(opened.files()) == 2


def test_without_a_folder_nothing_is_kept() -> None:
    store = CompiledStore(None, compiled_for=BASE)
    store.keep(adapter(1))
    store.forget(digest(1))
    assert store.settle(1)
    assert store.get(digest(1)) is None
    assert not store.has(digest(1))


# ---- uploads


def test_what_is_made_of_an_upload_is_found_and_written_when_it_took_place(opened: Store) -> None:
    task = AdapterId(f"{digest(1)}#2")
    opened.store.withhold(digest(1))
    opened.keep(adapter(1), adapter(9, id=task), adapter(2))
    assert len(opened.files()) == 1, "the one of another checkpoint"
    for id in (digest(1), task):
        assert opened.store.has(id)
        assert opened.store.get(id) is not None
    opened.store.settle_upload(digest(1), took_place=True)
    assert opened.store.settle(10)
    assert len(opened.files()) == 3
    assert_same_bits(Store(opened.root).store.get(task), adapter(9, id=task))
    opened.keep(adapter(1, id=AdapterId(f"{digest(1)}*0.5")))
    assert len(opened.files()) == 4, "it is an upload no more"


def test_what_is_made_of_a_refused_upload_goes_with_the_last_that_brings_these_files(tmp_path: Path) -> None:
    opened = Store(tmp_path, max_waiting_bytes=10 * KIB)
    for _ in range(2):
        opened.store.withhold(digest(1))
    opened.keep(adapter(1, kib=100))
    opened.store.settle_upload(digest(1), took_place=False)
    assert opened.store.get(digest(1)) is not None, "the other one needs it"
    opened.store.settle_upload(digest(1), took_place=False)
    assert opened.store.get(digest(1)) is None
    assert not opened.store.has(digest(1))
    opened.keep(adapter(2, kib=100))
    opened.keep(adapter(1))
    assert opened.events[CompiledEvent.PASSED_OVER] == 0, "it takes no room among those that wait"
    assert opened.store.has(digest(1))


def test_an_upload_that_took_place_is_written_while_the_same_files_are_uploaded_again(opened: Store) -> None:
    for _ in range(2):
        opened.store.withhold(digest(1))
    opened.keep(adapter(1))
    opened.store.settle_upload(digest(1), took_place=True)
    assert opened.store.settle(10)
    assert len(opened.files()) == 1
    opened.store.settle_upload(digest(1), took_place=False)
    assert_same_bits(opened.store.get(digest(1)), adapter(1))


# ---- shared factors


def sharing(number: int, key: str = "k", *, seed: int = 0) -> Adapter:
    torch.manual_seed(seed)
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    torch.manual_seed(100 + number)
    sites = {
        path: Affine(maps=(Rescaled(key, a, b, torch.randn(4), torch.randn(size)),))
        for path, size in (("q", 64), ("k", 32))
    }
    return Adapter(id=digest(number), method="VERA", sites=sites)


def factors_of(found: Adapter | None) -> tuple[torch.Tensor, ...]:
    assert found is not None
    return tuple(
        tensor
        for edit in found.sites.values()
        if isinstance(edit, Affine)
        for each in edit.maps
        if isinstance(each, Rescaled)
        for tensor in each.factors
    )


def test_shared_factors_are_written_once_and_are_one_in_memory(tmp_path: Path) -> None:
    opened = Store(tmp_path, min_shared_bytes=1024)
    opened.keep(sharing(1), sharing(2), sharing(3, "other", seed=5))
    names = [path.name.partition(".")[0] for path in opened.files()]
    assert names.count("shared") == 2
    assert len(names) == 5
    found = [opened.store.get(digest(number)) for number in (1, 2, 3)]
    for number, each in enumerate(found[:2], 1):
        assert_same_bits(each, sharing(number))
    assert_same_bits(found[2], sharing(3, "other", seed=5))
    first, second, third = (factors_of(each) for each in found)
    assert {id(tensor) for tensor in first} == {id(tensor) for tensor in second}
    assert not {id(tensor) for tensor in first} & {id(tensor) for tensor in third}
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in first)


def test_small_factors_are_written_with_each_adapter(opened: Store) -> None:
    opened.keep(sharing(1))
    assert len(opened.files()) == 1
    assert_same_bits(opened.store.get(digest(1)), sharing(1))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")])
def test_adapters_whose_shared_factors_are_gone_are_not_here(tmp_path: Path, damage: Any) -> None:
    opened = Store(tmp_path, min_shared_bytes=1024)
    opened.keep(sharing(1), sharing(2))
    damage(next(path for path in opened.files() if path.name.startswith("shared")))
    assert opened.store.get(digest(1)) is None
    opened.keep(sharing(1))
    for number in (1, 2):
        assert_same_bits(opened.store.get(digest(number)), sharing(number))


# ---- damage


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "foreign"])
def test_a_damaged_file_is_deleted_and_made_again(damage: str, opened: Store, caplog: pytest.LogCaptureFixture) -> None:
    opened.keep(adapter(1))
    (path,) = opened.files()
    content = path.read_bytes()
    flipped = content[:99] + bytes([content[99] ^ 4]) + content[100:]
    other = Store(opened.root.parent / "other")
    other.keep(adapter(2))
    damaged = {
        "flip": flipped,
        "cut": content[:-64],
        "empty": b"",
        "longer": content * 2,
        "foreign": other.files()[0].read_bytes(),
    }
    path.write_bytes(damaged[damage])
    assert opened.store.get(digest(1)) is None
    assert opened.files() == []
    assert opened.events["damaged"] == 1
    assert "compiled again" in caplog.text
    opened.keep(adapter(1))
    assert_same_bits(opened.store.get(digest(1)), adapter(1))


def test_a_file_larger_than_the_folder_may_be_is_not_read(opened: Store) -> None:
    opened.keep(adapter(1))
    os.truncate(opened.files()[0], 1 << 40)  # sparse
    assert opened.store.get(digest(1)) is None
    opened.keep(adapter(1))
    assert_same_bits(opened.store.get(digest(1)), adapter(1))


# ---- a disk that fails


def test_wherever_the_disk_is_full_nothing_raises_and_nothing_is_left_in_between(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    num_acts = 10  # two files of five acts each
    for fails_at in range(num_acts):
        fs = FaultyFileSystem(fails_at, no_room())
        opened = Store(tmp_path / str(fails_at), fs, min_shared_bytes=1024)
        opened.keep(sharing(1))
        assert opened.events == {"failed": 1}
        assert not opened.store.has(digest(1))
        assert list((tmp_path / str(fails_at)).glob("tmp/*")) == []
        opened.keep(sharing(1))
        assert_same_bits(opened.store.get(digest(1)), sharing(1))
    assert caplog.text.count("cannot be kept") == num_acts


def test_a_crash_at_any_act_leaves_whole_files_or_none(tmp_path: Path) -> None:
    outcomes = set()
    for fails_at in range(6):
        root = tmp_path / str(fails_at)
        folder = Store(root, FaultyFileSystem(fails_at, Crash())).folder
        good = Store(tmp_path / "good")
        good.keep(adapter(1))
        (source,) = good.files()
        try:
            folder.write(source.name, source.read_bytes())
        except Crash:
            outcomes.add("crash")
        found = Store(root).store.get(digest(1))
        outcomes.add("whole" if found is not None else "none")
        if found is not None:
            assert_same_bits(found, adapter(1))
    assert outcomes == {"crash", "none", "whole"}


def test_after_a_power_cut_files_are_whole_or_not_found(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    fs = LoggingFileSystem(tmp_path / "live")
    Store(tmp_path / "live" / "compiled", fs, min_shared_bytes=1024).keep(sharing(1), adapter(2), sharing(1))
    rng, num_found = random.Random(3), 0
    for number in range(60):
        log = fs.log[: rng.randint(1, len(fs.log))]
        DiskAfterPowerLoss(log, keeps=lambda _index: rng.random() < 0.8).rebuild(tmp_path / str(number))
        after = Store(tmp_path / str(number) / "compiled", min_shared_bytes=1024)
        for wanted in (sharing(1), adapter(2)):
            found = after.store.get(wanted.id)
            num_found += found is not None
            if found is not None:
                assert_same_bits(found, wanted)
    assert num_found > 5


def test_a_disk_that_cannot_be_read_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class UnreadableFileSystem(UnsyncedFileSystem):
        def read_into(self, path: Path, buffer: memoryview) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    good = Store(tmp_path)
    good.keep(adapter(1))
    opened = Store(tmp_path, UnreadableFileSystem())
    with caplog.at_level(logging.WARNING):
        assert [opened.store.get(digest(1)) for _ in range(3)] == [None] * 3
    assert opened.events == {"failed": 3, "miss": 3}
    assert caplog.text.count("cannot be kept") == 1
    assert_same_bits(good.store.get(digest(1)), adapter(1))


def test_a_disk_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    class ReadOnlyFileSystem(UnsyncedFileSystem):
        def touch(self, path: Path) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        make_dir = remove_file = touch

    Store(tmp_path).keep(adapter(1))
    opened = Store(tmp_path, ReadOnlyFileSystem())
    assert_same_bits(opened.store.get(digest(1)), adapter(1))
    opened.keep(adapter(2))
    opened.store.forget(digest(1))
    assert opened.store.settle(10)
    assert opened.store.get(digest(2)) is None
    assert_same_bits(opened.store.get(digest(1)), adapter(1))
    assert opened.events["failed"] == 2


def test_what_cannot_be_written_is_done_without(opened: Store) -> None:
    opened.keep(replace(adapter(1), sites={"q": object()}))  # type: ignore[dict-item]
    assert opened.events == {"failed": 1}
    opened.keep(adapter(1))
    assert opened.store.get(digest(1)) is not None


# ---- the budget


def age(opened: Store, *numbers: int) -> None:
    """The files of these adapters were used at 1, 2, 3 ... seconds."""
    for second, number in enumerate(numbers, 1):
        (path,) = (path for path in opened.files() if path.name.startswith(f"{digest(number)[7:23]}."))
        os.utime(path, (second, second))


def test_beyond_the_budget_those_go_that_were_not_used_for_longest(tmp_path: Path) -> None:
    num_bytes = sum(tensor.nbytes for tensor in adapter(1, kib=8).tensors())
    opened = Store(tmp_path, max_bytes=int(5.5 * num_bytes))
    opened.keep(*(adapter(number, kib=8) for number in range(1, 6)))
    age(opened, 3, 1, 5, 2, 4)
    assert opened.store.get(digest(3)) is not None  # used now
    opened.keep(adapter(6, kib=8))
    here = [number for number in range(1, 7) if opened.store.has(digest(number))]
    assert here == [2, 3, 4, 6], "five do not fit into nine tenths"
    assert opened.events["evicted"] == 2
    assert sum(path.stat().st_size for path in opened.files()) <= 5.5 * num_bytes


def test_an_adapter_larger_than_the_budget_does_not_stay(tmp_path: Path) -> None:
    opened = Store(tmp_path, max_bytes=10 * KIB)
    opened.keep(adapter(1, kib=100))
    assert opened.files() == []
    opened.keep(adapter(2))
    assert opened.store.get(digest(2)) is not None


def test_files_of_an_earlier_process_count(tmp_path: Path) -> None:
    num_bytes = sum(tensor.nbytes for tensor in adapter(1, kib=8).tensors())
    Store(tmp_path).keep(*(adapter(number, kib=8) for number in range(1, 9)))
    opened = Store(tmp_path, max_bytes=4 * num_bytes)
    opened.keep(adapter(9, kib=8))
    assert sum(path.stat().st_size for path in opened.files()) <= 4 * num_bytes
    assert opened.store.has(digest(9))


def test_nothing_is_looked_through_before_the_first_write(tmp_path: Path) -> None:
    class Listless(UnsyncedFileSystem):
        def list_dir(self, path: Path) -> list[str]:
            raise AssertionError("nobody asked for that")

    Store(tmp_path).keep(adapter(1))
    opened = Store(tmp_path, Listless())
    assert opened.store.get(digest(1)) is not None
    assert opened.store.has(digest(1))
    assert opened.store.get(digest(2)) is None


def test_what_a_crash_left_is_deleted_once_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    for name, second in (("old", 1_000), ("being-written", 9_000)):
        (tmp_path / "tmp" / name).write_bytes(b"half")
        os.utime(tmp_path / "tmp" / name, (second, second))
    Store(tmp_path, now_s=lambda: 10_000.0).keep(adapter(1))
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["being-written"]


# ---- deleting, and other processes


def test_forgetting_a_checkpoint_deletes_all_that_was_made_of_it(opened: Store) -> None:
    both = AdapterId(f"{digest(1)}*0.5+{digest(2)}")
    opened.keep(adapter(1), adapter(2), adapter(3, id=both), adapter(4, id=AdapterId(f"{digest(1)}#1")))
    Store(opened.root, compiled_for="another base").keep(adapter(1))
    opened.store.forget(digest(1))
    assert opened.store.settle(10)
    assert [path.name[:16] for path in opened.files()] == [digest(2)[7:23]]
    opened.store.forget(digest(5))
    assert opened.store.settle(10)
    assert opened.store.get(digest(2)) is not None


def test_what_is_written_before_a_delete_goes_with_it(opened: Store) -> None:
    opened.store.keep(adapter(1))
    opened.store.forget(digest(1))
    assert opened.store.settle(10)
    assert opened.files() == []


def test_processes_on_one_folder_do_not_hurt_each_other(tmp_path: Path) -> None:
    num_bytes = sum(tensor.nbytes for tensor in adapter(1).tensors())
    wanted = {digest(number): adapter(number) for number in range(12)}
    stores = [Store(tmp_path, max_bytes=6 * num_bytes) for _ in range(3)]
    problems: list[BaseException] = []

    def use(opened: Store, seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                id = rng.choice(list(wanted))
                found = opened.store.get(id)
                if found is None:
                    opened.store.keep(wanted[id])
                else:
                    assert_same_bits(found, wanted[id])
                if rng.random() < 0.1:
                    opened.store.forget(id)
            assert opened.store.settle(10)
        except BaseException as problem:  # noqa: BLE001 (told by the thread that started this one)
            problems.append(problem)

    threads = [threading.Thread(target=use, args=(opened, seed)) for seed, opened in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    for opened in stores:
        assert opened.events["failed"] == opened.events["damaged"] == 0
    stores[0].keep(adapter(20))
    stores[0].folder.make_room()
    left = sum(path.stat().st_size for path in stores[0].files())
    assert left <= 3 * 6 * num_bytes, "each process keeps to the budget with what it knows"
    assert list(tmp_path.glob("tmp/*")) == []
