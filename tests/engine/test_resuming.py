"""What is taken up again after a start: pins, within the slots there are, and the sweep of what a crash left."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from peft_serve.adapters.catalog import Catalog
from peft_serve.core import AdapterId
from peft_serve.engine.resuming import resume, resume_beside
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from tests.adapters.store.memory_disk import MemoryDisk
from tests.adapters.store.store_fakes import checkpoint, make_catalog, write_folder
from tests.adapters.store.test_store_power import FOUR, ONE, ROOT, TWO, Server


class Slots:
    """As much of an engine as is asked here."""

    def __init__(self, num_slots: int = 8) -> None:
        self.num_slots = num_slots
        self.loaded: list[AdapterId] = []
        self.pinned: set[AdapterId] = set()

    def load(self, adapter: AdapterId) -> None:
        self.loaded.append(adapter)

    def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        (self.pinned.add if pinned else self.pinned.discard)(adapter)

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            state=EngineState.RUNNING, resident=(), num_slots=self.num_slots, block_size=16, num_blocks=9
        )


def resumed(catalog: Catalog, num_slots: int = 8) -> Slots:
    engine = Slots(num_slots)
    resume(catalog, engine)  # type: ignore[arg-type]
    return engine


def restarted(server: Server) -> Server:
    return Server(MemoryDisk(server.disk.tree()))


@pytest.fixture
def server() -> Server:
    made = Server(MemoryDisk())
    for name, files in (("a", ONE), ("b", TWO), ("c", FOUR)):
        made.put(name, files)
        made.catalog.pins.add(files.digest(), name)
    return made


def test_pins_outlive_the_process(server: Server) -> None:
    server.put("a", checkpoint(5))  # the pin is the files'
    engine = resumed(restarted(server).catalog)
    assert engine.pinned == {ONE.digest(), TWO.digest(), FOUR.digest()}
    assert set(engine.loaded) == engine.pinned
    server.catalog.pins.remove([TWO.digest()])
    assert resumed(restarted(server).catalog).pinned == {ONE.digest(), FOUR.digest()}


def test_one_slot_stays_free_when_there_are_fewer(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    again = restarted(server)
    assert resumed(again.catalog, num_slots=3).pinned == {ONE.digest(), TWO.digest()}
    assert "'c' is not pinned again" in caplog.text
    assert len(restarted(again).catalog.pins.all()) == 3, "with more slots it is"


def test_the_pin_of_what_is_gone_is_forgotten(server: Server) -> None:
    server.catalog.changes.delete("b")
    again = restarted(server)
    assert resumed(again.catalog).pinned == {ONE.digest(), FOUR.digest()}
    assert set(restarted(again).catalog.pins.all()) == {ONE.digest(), FOUR.digest()}


def test_a_disk_that_cannot_be_read_loses_no_pin(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    again = restarted(server)
    again.disk.fault = lambda kind, path, _call: (
        OSError(errno.EIO, "Input/output error") if kind == "read" and path.name == "a.json" else None
    )
    engine = resumed(again.catalog)
    assert (engine.pinned, set(engine.loaded)) == (
        {ONE.digest(), TWO.digest(), FOUR.digest()},
        {TWO.digest(), FOUR.digest()},
    )
    assert "'a' is pinned and cannot be loaded" in caplog.text
    again.disk.fault = lambda *_: OSError(errno.EIO, "Input/output error")
    resumed(Server(MemoryDisk(server.disk.tree())).catalog)
    assert set(again.catalog.pins.all()) == engine.pinned


def test_the_pin_of_a_folder_is_found_again_by_its_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "folders" / "kept", ONE)
    catalog = make_catalog(tmp_path / "store", tmp_path / "folders")
    catalog.pins.add(ONE.digest(), "kept")
    assert resumed(catalog).loaded == [ONE.digest()]
    write_folder(tmp_path / "folders" / "kept", checkpoint(77))
    assert resumed(catalog).pinned == set(), "other files, another pin"


def test_files_that_no_name_stands_for_are_swept_beside_the_first_requests(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.disk.remove_file(ROOT / "names" / "b.json")  # as if the power failed between the files and the record
    again = restarted(server)
    assert again.store.has_blob(TWO.digest())
    with caplog.at_level("INFO"):
        resume_beside(again.catalog, Slots()).join(10)  # type: ignore[arg-type]
    assert set(again.store.blob_ids()) == {ONE.digest(), FOUR.digest()}
    assert "files of 1 checkpoints" in caplog.text
