"""Records in memory: a slow disk holds up the one name that is read, and a late read never undoes a write."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_serve.adapters.bounded_folder import BoundedFolder
from peft_serve.adapters.name_ledger import NameLedger
from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.store import AdapterStore
from peft_serve.errors import StoreFull
from tests.adapters.store.memory_disk import MemoryDisk
from tests.adapters.store.store_fakes import no_room
from tests.adapters.store.test_store_power import ONE, ROOT, TWO, begun


class Slow(MemoryDisk):
    """Reads of `a.json` give what was there, once they are let."""

    def __init__(self) -> None:
        super().__init__(begun())
        self.begun, self.may_end = threading.Event(), threading.Event()

    def read(self, path: Path) -> bytes:
        content = super().read(path)
        if path.name == "a.json" and not self.begun.is_set():
            self.begun.set()
            assert self.may_end.wait(10)
        return content


@pytest.fixture
def disk() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.may_end.set()


def test_one_slow_record_holds_up_nobody_else(disk: Slow) -> None:
    ledger = NameLedger(AdapterStore(ROOT, disk))
    reader = threading.Thread(target=ledger.record, args=("a",))
    reader.start()
    assert disk.begun.wait(10)
    assert ledger.peek("a") is None
    assert ledger.peek("unheard-of") == NameRecord(name="unheard-of")
    assert ledger.record("b").ids == {TWO.digest()}
    ledger.write(ledger.record("c").published(ONE.digest(), ""), replaces=ledger.record("c"))
    assert reader.is_alive()
    disk.may_end.set()
    reader.join(10)
    assert ledger.record("a").ids == {ONE.digest()}
    ledger.check()


@pytest.mark.parametrize("fails", [False, True], ids=["", "and failed after its rename"])
def test_what_was_read_before_a_write_is_not_remembered_after_it(disk: Slow, fails: bool) -> None:
    store = AdapterStore(ROOT, disk)
    ledger = NameLedger(store)
    seen: list[NameRecord] = []
    reader = threading.Thread(target=lambda: seen.append(ledger.record("a")))
    reader.start()
    assert disk.begun.wait(10)
    older = store.read_name("a")
    newer = older.published(TWO.digest(), "")
    if fails:
        disk.fault = lambda kind, path, _call: no_room() if (kind, path.name) == ("sync_dir", "names") else None
        with pytest.raises(StoreFull):
            ledger.write(newer, replaces=older)
    else:
        ledger.write(newer, replaces=older)
    disk.may_end.set()
    reader.join(10)
    assert ledger.record("a") == newer == seen[0]


def test_files_that_can_be_made_again_leave_room_for_those_that_cannot() -> None:
    disk = MemoryDisk(begun(), free_bytes=1500)
    names = iter("xyz")
    folder = BoundedFolder(
        ROOT / "compiled", disk, max_bytes=10_000, new_name=lambda: next(names), now_s=lambda: 0.0, min_free_bytes=1000
    )
    folder.write("one.abc", bytes(500))
    with pytest.raises(OSError, match="can be made again"):
        folder.write("two.abd", bytes(501))
    assert list(folder.names()) == ["one.abc"]
    assert disk.list_dir(ROOT / "compiled" / "tmp") == []
