import threading
from pathlib import Path

import pytest

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.changes import etag
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.holds import BlobHolds
from peft_serve.adapters.once_each import OnceEach
from peft_serve.adapters.records import CheckpointFiles, VersionState
from peft_serve.adapters.store import AdapterStore
from peft_serve.core import BASE, AdapterId
from peft_serve.errors import (
    AdapterInvalid,
    AdapterUnavailable,
    Forbidden,
    InvalidParameter,
    PreconditionFailed,
    StoreFull,
    UnknownAdapter,
)
from tests.adapters.store.store_fakes import (
    FakeGate,
    FaultyFileSystem,
    checkpoint,
    corrupt,
    make_catalog,
    no_room,
    opened,
    summary_of,
    tree,
    write_folder,
)

ONE, TWO, THREE = checkpoint(1), checkpoint(2), checkpoint(3)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return make_catalog(tmp_path / "store")


def blobs(tmp_path: Path) -> set[str]:
    return {f"sha256:{path.name}" for path in (tmp_path / "store" / "blobs" / "sha256").iterdir()}


def test_an_upload_is_resolved_with_what_the_gate_found(catalog: Catalog) -> None:
    outcome = catalog.changes.publish("a", ONE)
    assert (outcome.created, outcome.previous) == (True, None)
    assert outcome.version.created == "2026-01-02T12:00:00Z"
    found = catalog.resolve("a")
    assert (found.name, found.number, found.id, found.peft_type) == ("a", 1, ONE.digest(), "LORA")
    assert found.num_virtual_tokens == 3
    assert list(found.profile.choices or ()) == ["b", "a"]
    assert catalog.resolve("a@1") == catalog.resolve(f"a@{ONE.digest()}") == found
    assert catalog.files(found.id) == ONE


def test_a_second_upload_is_version_two_and_the_first_can_still_be_named(catalog: Catalog) -> None:
    catalog.changes.publish("a", ONE)
    outcome = catalog.changes.publish("a", TWO)
    assert outcome.previous is not None
    assert (outcome.version.number, outcome.previous.number, outcome.previous.id) == (2, 1, ONE.digest())
    assert catalog.resolve("a").id == TWO.digest()
    assert catalog.resolve("a@1").id == ONE.digest()
    assert [version.number for version in catalog.versions("a")] == [1, 2]


def test_the_same_files_again_change_nothing(catalog: Catalog) -> None:
    catalog.changes.publish("a", ONE)
    again = catalog.changes.publish("a", ONE)
    assert not again.created
    assert again.version.number == 1
    assert len(catalog.versions("a")) == 1


def test_older_files_again_are_a_new_version(catalog: Catalog) -> None:
    for files in (ONE, TWO, ONE):
        catalog.changes.publish("a", files)
    assert catalog.resolve("a").number == 3
    assert catalog.resolve(f"a@{ONE.digest()}").number == 3


@pytest.mark.parametrize("ref", ["b", "a@2", "a@0", f"a@{TWO.digest()}", "A", "base", "../a", ""])
def test_what_is_not_there_is_unknown(catalog: Catalog, ref: str) -> None:
    catalog.changes.publish("a", ONE)
    with pytest.raises(UnknownAdapter, match="GET /adapters"):
        catalog.resolve(ref)


@pytest.mark.parametrize("name", ["base", "Demo-Llama", "../a", ""])
def test_a_bad_name_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    gate = FakeGate()
    catalog = make_catalog(tmp_path / "store", gate=gate)
    with pytest.raises(InvalidParameter):
        catalog.changes.publish(name, ONE)
    for act in (catalog.changes.delete, catalog.get, catalog.versions, lambda name: catalog.changes.rollback(name, 1)):
        with pytest.raises(UnknownAdapter):
            act(name)
    assert gate.calls == 0


def test_a_refused_upload_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(AdapterInvalid):
        catalog.changes.publish("a", checkpoint(1, peft_type="NONSENSE"))
    assert tree(tmp_path) == before


def test_a_dry_run_tells_and_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    catalog.changes.publish("a", ONE)
    before = tree(tmp_path)
    outcome = catalog.changes.publish("a", TWO, dry_run=True)
    assert (outcome.version.number, outcome.created) == (2, True)
    assert outcome.version.summary == summary_of(TWO)
    assert tree(tmp_path) == before
    with pytest.raises(PreconditionFailed):
        catalog.changes.publish("a", TWO, dry_run=True, create_only=True)


def test_preconditions(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match="does not exist"):
        catalog.changes.publish("a", ONE, if_match="*")
    catalog.changes.publish("a", ONE, create_only=True)
    with pytest.raises(PreconditionFailed, match="exists already"):
        catalog.changes.publish("a", TWO, create_only=True)
    for wrong in (etag(TWO.digest()), f"W/{etag(ONE.digest())}", "", "x", ONE.digest()):
        with pytest.raises(PreconditionFailed, match="If-Match"):
            catalog.changes.publish("a", TWO, if_match=wrong)
    assert blobs(tmp_path) == {ONE.digest()}
    assert catalog.changes.publish("a", TWO, if_match=f'"x", {etag(ONE.digest())}').created
    assert catalog.changes.publish("a", THREE, if_match="*").created


def test_etag_is_the_digest_in_quotes() -> None:
    assert etag(ONE.digest()) == '"sha256-' + ONE.digest().removeprefix("sha256:") + '"'


def test_two_writers_with_the_same_etag_do_not_both_win(catalog: Catalog) -> None:
    catalog.changes.publish("a", ONE)
    won: list[int] = []
    barrier = threading.Barrier(4)

    def write(i: int) -> None:
        barrier.wait()
        try:
            catalog.changes.publish("a", checkpoint(10 + i), if_match=etag(ONE.digest()))
            won.append(i)
        except PreconditionFailed:
            pass

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert catalog.resolve("a").id == checkpoint(10 + won[0]).digest()
    catalog.check()


def test_rollback_moves_the_name_and_keeps_the_numbers(catalog: Catalog) -> None:
    catalog.changes.publish("a", ONE)
    catalog.changes.publish("a", TWO)
    assert catalog.changes.rollback("a", 1).id == ONE.digest()
    assert catalog.changes.rollback("a", 1).number == 1
    assert catalog.resolve("a").id == ONE.digest()
    assert catalog.changes.publish("a", THREE).version.number == 3
    for name, number in (("a", 9), ("b", 1), ("a", 0)):
        with pytest.raises(UnknownAdapter):
            catalog.changes.rollback(name, number)


def test_delete_removes_the_files_and_never_the_counter(catalog: Catalog, tmp_path: Path) -> None:
    catalog.changes.publish("a", ONE)
    catalog.changes.publish("a", TWO)
    assert catalog.changes.delete("a") == 0
    assert blobs(tmp_path) == set()
    for ref in ("a", "a@1", f"a@{ONE.digest()}"):
        with pytest.raises(UnknownAdapter):
            catalog.resolve(ref)
    with pytest.raises(UnknownAdapter):
        catalog.changes.delete("a")
    assert catalog.list() == ()
    assert catalog.changes.publish("a", ONE).version.number == 3


def test_a_request_in_flight_keeps_the_files_of_a_deleted_version(catalog: Catalog, tmp_path: Path) -> None:
    catalog.changes.publish("a", ONE)
    found = catalog.resolve("a", hold=True)
    catalog.retain(found.id)
    assert catalog.in_flight(found.id) == catalog.get("a").in_flight == 2
    assert catalog.changes.delete("a") == 2
    assert catalog.files(found.id) == ONE
    catalog.release(found.id)
    assert catalog.files(found.id) == ONE
    catalog.release(found.id)
    assert blobs(tmp_path) == set()
    with pytest.raises(UnknownAdapter):
        catalog.retain(found.id)
    with pytest.raises(AdapterUnavailable):
        catalog.files(found.id)
    catalog.check()


def test_files_that_another_name_has_or_that_come_back_stay(catalog: Catalog, tmp_path: Path) -> None:
    catalog.changes.publish("a", ONE)
    catalog.changes.publish("b", ONE)
    catalog.changes.delete("a")
    assert catalog.files(catalog.resolve("b").id) == ONE
    catalog.retain(ONE.digest())
    assert catalog.changes.delete("b") == 1
    catalog.changes.publish("c", ONE)
    catalog.release(ONE.digest())
    assert blobs(tmp_path) == {ONE.digest()}
    catalog.check()


def test_the_base_is_never_counted(catalog: Catalog) -> None:
    catalog.retain(BASE)
    catalog.release(BASE)
    assert catalog.in_flight(BASE) == 0


def test_a_hold_is_given_back_once(catalog: Catalog) -> None:
    catalog.changes.publish("a", ONE)
    with pytest.raises(AssertionError):
        catalog.release(ONE.digest())


def test_a_restart_reads_everything_back_and_no_weights(tmp_path: Path) -> None:
    gate = FakeGate()
    with opened(tmp_path, gate) as catalog:
        catalog.changes.publish("a", ONE)
        catalog.changes.publish("a", TWO)
        catalog.changes.publish("B", THREE)
        catalog.changes.rollback("a", 1)
        before = (catalog.list(), catalog.resolve("a"), catalog.resolve("a@2"), catalog.versions("a"))
    with opened(tmp_path, gate) as catalog:
        assert (catalog.list(), catalog.resolve("a"), catalog.resolve("a@2"), catalog.versions("a")) == before
        assert [entry.name for entry in catalog.list()] == ["B", "a"]
    assert gate.calls == 3


def test_a_manifest_for_another_base_is_worked_out_again_once(tmp_path: Path) -> None:
    make_catalog(tmp_path, store=(store := AdapterStore(tmp_path, FaultyFileSystem(10**9, no_room())))).changes.publish(
        "a", ONE
    )
    gate = FakeGate()
    catalog = make_catalog(tmp_path, gate=gate, store=store, checked_for="another")
    assert catalog.get("a").version is not None
    assert catalog.get("a").version.summary is None
    assert catalog.resolve("a") == catalog.resolve("a@1")
    assert gate.calls == 1
    assert catalog.get("a").version.summary == summary_of(ONE)


def test_a_checkpoint_that_another_base_refuses_says_why(tmp_path: Path) -> None:
    def refusing(files: CheckpointFiles) -> None:
        make_gate(CheckpointFiles(config=b'{"peft_type": "OFT"}', weights=b""))

    make_gate = FakeGate()
    store = AdapterStore(tmp_path, FaultyFileSystem(10**9, no_room()))
    make_catalog(tmp_path, store=store).changes.publish("a", ONE)
    catalog = make_catalog(tmp_path, gate=refusing, store=store, checked_for="another")
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match=r"adapter 'a' version 1.*OFT is not known here"):
            catalog.resolve("a")
    assert make_gate.calls == 1


def test_a_damaged_checkpoint_fails_alone_and_the_same_upload_mends_it(catalog: Catalog, tmp_path: Path) -> None:
    catalog.changes.publish("a", ONE)
    catalog.changes.publish("b", TWO)
    corrupt(tmp_path / "store", ONE.digest())
    with pytest.raises(AdapterUnavailable):
        catalog.files(ONE.digest())
    with pytest.raises(AdapterUnavailable, match=r"adapter 'a' version 1: .*upload it again"):
        catalog.resolve("a")
    entry = catalog.get("a")
    assert entry.version is not None
    assert entry.version.state is VersionState.QUARANTINED
    assert "upload it again" in entry.problem
    with pytest.raises(AdapterUnavailable):
        catalog.changes.rollback("a", 1)
    assert catalog.resolve("b").id == TWO.digest()
    assert not catalog.changes.publish("a", ONE).created
    assert catalog.files(catalog.resolve("a").id) == ONE
    assert catalog.get("a").problem == ""


def test_a_damaged_record_fails_its_name_alone_and_nothing_is_collected(tmp_path: Path) -> None:
    with opened(tmp_path) as catalog:
        catalog.changes.publish("a", ONE)
        catalog.changes.publish("b", TWO)
    (tmp_path / "names" / "a.json").write_bytes(b"{}")
    with opened(tmp_path) as catalog:
        assert catalog.resolve("b").id == TWO.digest()
        assert "damaged" in catalog.get("a").problem
        for act in (catalog.resolve, catalog.changes.delete, lambda name: catalog.changes.publish(name, THREE)):
            with pytest.raises(AdapterUnavailable, match="adapter 'a'"):
                act("a")
        catalog.changes.delete("b")
        assert catalog.changes.collect() == 0
        assert (tmp_path / "blobs" / "sha256" / ONE.digest().removeprefix("sha256:")).is_dir()


def test_collect_removes_what_a_crash_left(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, FaultyFileSystem(10**9, no_room()))
    catalog = make_catalog(tmp_path, store=store)
    catalog.changes.publish("a", ONE)
    store.detach_blob(TWO.digest())
    make_catalog(tmp_path, store=store).changes.publish("orphan", TWO)
    (tmp_path / "names" / "orphan.json").unlink()
    catalog = make_catalog(tmp_path, store=store)
    catalog.retain(TWO.digest())
    assert catalog.changes.collect() == 0
    catalog.release(TWO.digest())
    assert not store.has_blob(TWO.digest())
    assert catalog.changes.collect() == 0
    assert catalog.files(ONE.digest()) == ONE


def test_a_full_disk_leaves_the_name_where_it_was_and_no_new_files(tmp_path: Path) -> None:
    k, refused = 0, True
    while refused:
        root = tmp_path / str(k)
        fs = FaultyFileSystem(10**9, no_room())
        catalog = make_catalog(root, store=AdapterStore(root, fs))
        catalog.changes.publish("a", ONE)
        fs.fails_at = fs.num_acts + k
        try:
            catalog.changes.publish("a", TWO)
            refused = False
        except StoreFull:
            found = catalog.resolve("a")
            assert catalog.files(found.id) in (ONE, TWO)
            kept = {path.name for path in (root / "blobs" / "sha256").iterdir()}
            assert kept <= {version.id.removeprefix("sha256:") for version in catalog.versions("a")}
            assert list((root / "tmp").iterdir()) == []
            catalog.check()
        k += 1
    assert k > 10


def test_thousands_of_names_start_by_listing_alone(tmp_path: Path) -> None:
    class Counting(FaultyFileSystem):
        reads = 0

        def read(self, path: Path) -> bytes:
            Counting.reads += 1
            return super().read(path)

    fs = Counting(10**9, no_room())
    store = AdapterStore(tmp_path, fs)
    make_catalog(tmp_path, store=store).changes.publish("a0", ONE)
    record = (tmp_path / "names" / "a0.json").read_bytes()
    for i in range(1, 500):
        (tmp_path / "names" / f"a{i}.json").write_bytes(record)
    Counting.reads = 0
    catalog = make_catalog(tmp_path, store=store)
    assert Counting.reads == 0
    catalog.resolve("a0")
    assert Counting.reads == 2


# folders


def test_a_folder_is_served_as_version_zero_and_read_on_first_use(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapters" / "a", ONE)
    gate = FakeGate()
    catalog = make_catalog(tmp_path / "store", tmp_path / "adapters", gate=gate)
    (entry,) = catalog.list()
    assert (entry.name, entry.version, entry.is_folder, gate.calls) == ("a", None, True, 0)
    assert catalog.versions("a") == ()
    found = catalog.resolve("a", hold=True)
    assert (found.number, found.id) == (0, ONE.digest())
    assert catalog.resolve("a@0") == catalog.resolve(f"a@{ONE.digest()}") == found
    assert gate.calls == 1
    (version,) = catalog.versions("a")
    assert version.summary == summary_of(ONE)
    assert version.created.endswith("Z")
    assert catalog.get("a").in_flight == 1
    assert catalog.files(found.id) == ONE
    catalog.retain(found.id)
    catalog.release(found.id)
    catalog.release(found.id)
    for ref in ("a@1", f"a@{TWO.digest()}", "b"):
        with pytest.raises(UnknownAdapter):
            catalog.resolve(ref)
    with pytest.raises(Forbidden, match="read-only folder"):
        catalog.changes.delete("a")


def test_what_ships_with_a_demo_base_is_told_apart_from_what_the_operator_named(tmp_path: Path) -> None:
    named, shipped = tmp_path / "named", tmp_path / "shipped"
    write_folder(named / "a", ONE)
    write_folder(shipped / "b", TWO)
    folders = CheckpointFolders([named, shipped], DiskFileSystem(), base_name="base", shipped=shipped)
    assert "take it out of the folder that --adapters names" in folders.why_kept("a")
    assert "ships with the demo base" in folders.why_kept("b")
    assert "--adapters" not in folders.why_kept("b")


def test_a_folder_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "adapters" / "a", ONE)
    catalog = make_catalog(tmp_path / "store", tmp_path / "adapters")
    assert catalog.resolve("a").id == ONE.digest()
    write_folder(place, checkpoint(222))
    with pytest.raises(AdapterUnavailable, match="changed on the disk"):
        catalog.files(ONE.digest())
    found = catalog.resolve("a")
    assert found.id == checkpoint(222).digest()
    assert catalog.files(found.id) == checkpoint(222)
    write_folder(place, checkpoint(3, peft_type="NONSENSE"))
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match=r"adapter 'a' does not fit.*NONSENSE"):
            catalog.resolve("a")
    assert "NONSENSE" in catalog.get("a").problem
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterUnavailable, match="holds no adapter_model"):
        catalog.resolve("a")


def test_an_upload_shadows_a_folder_until_it_is_deleted(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapters" / "a", ONE)
    catalog = make_catalog(tmp_path / "store", tmp_path / "adapters")
    with pytest.raises(PreconditionFailed):
        catalog.changes.publish("a", TWO, create_only=True)
    with pytest.raises(PreconditionFailed):
        catalog.changes.publish("a", TWO, if_match=etag(THREE.digest()))
    outcome = catalog.changes.publish("a", TWO, if_match=etag(ONE.digest()))
    assert outcome.previous is not None
    assert (outcome.version.number, outcome.previous.number) == (1, 0)
    assert catalog.resolve("a").id == TWO.digest()
    assert catalog.resolve("a@0").id == ONE.digest()
    assert [version.number for version in catalog.versions("a")] == [0, 1]
    assert not catalog.get("a").is_folder
    catalog.changes.delete("a")
    assert catalog.resolve("a").id == ONE.digest()
    assert catalog.get("a").is_folder


# the small parts


def test_many_threads_that_want_one_value_make_it_once() -> None:
    once: OnceEach[str, int] = OnceEach()
    started, go, made = threading.Semaphore(0), threading.Event(), []

    def make() -> int:
        started.release()
        go.wait(5)
        made.append(1)
        return 7

    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(once.get("k", make))) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert started.acquire(timeout=5)
    assert once.get("other", lambda: 8) == 8  # not held up
    go.set()
    for thread in threads:
        thread.join()
    assert (results, len(made)) == ([7] * 5, 1)


def test_what_fails_is_not_remembered() -> None:
    once: OnceEach[str, int] = OnceEach()
    with pytest.raises(ZeroDivisionError):
        once.get("k", lambda: 1 // 0)
    assert once.peek("k") is None
    assert once.get("k", lambda: 2) == 2
    once.drop("k")
    assert once.get("k", lambda: 3) == 3


def test_holds_free_in_two_steps_and_only_when_nobody_is_left() -> None:
    log: list[str] = []

    def detach(adapter: AdapterId):
        log.append(f"detach {adapter}")
        return lambda: log.append(f"free {adapter}")

    holds = BlobHolds(detach)
    one, two = AdapterId("1"), AdapterId("2")
    assert not holds.hold(one, lambda: False)
    assert holds.hold(one, lambda: True)
    assert holds.forget([one, two]) == 1
    assert log == ["detach 2", "free 2"]
    holds.check()
    holds.hold(one, lambda: False)  # what is held is there
    holds.release(one)
    assert holds.count(one) == 1
    holds.release(one)
    assert log[2:] == ["detach 1", "free 1"]
    holds.check()
