"""The store on a real disk: what is kept, what is swept, and what every kind of crash leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_serve.adapters.filesystem import DiskFileSystem, FileSystem
from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.sealed import SealError, seal, unseal
from peft_serve.adapters.store import AdapterStore
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterUnavailable, StoreFull, Unavailable
from tests.adapters.store.store_fakes import (
    Crash,
    FaultyFileSystem,
    LoggingFileSystem,
    UnsyncedFileSystem,
    checkpoint,
    corrupt,
    manifest_of,
    no_room,
)

HERE = Path(__file__).parents[3]
FILES = checkpoint(9, profile=b'{"template": "{text}"}')
ID = FILES.digest()


def put(store: AdapterStore, files: CheckpointFiles) -> AdapterId:
    store.put_blob(files.digest(), files, manifest_of(files))
    return files.digest()


def publish(store: AdapterStore, name: str, files: CheckpointFiles) -> None:
    record = store.read_name(name).published(put(store, files), "2026-01-02T12:00:00Z")
    store.write_name(record)


def test_what_is_put_is_read_back_after_a_restart(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "deep" / "store", DiskFileSystem())
    publish(store, "Tweets", FILES)
    store.close()
    again = AdapterStore(tmp_path / "deep" / "store", DiskFileSystem())
    assert again.names() == ["Tweets"]
    assert again.read_name("Tweets").ids == {ID}
    assert again.read_blob(ID) == FILES
    assert again.read_manifest(ID) == manifest_of(FILES)
    assert again.blob_ids() == [ID]


def test_a_checkpoint_without_a_profile_keeps_its_digest(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, UnsyncedFileSystem())
    assert store.read_blob(put(store, checkpoint(2))) == checkpoint(2)


def test_names_that_differ_in_case_are_two_files(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, UnsyncedFileSystem())
    publish(store, "sql", checkpoint(1))
    publish(store, "SQL", checkpoint(2))
    files = {path.name for path in (tmp_path / "names").iterdir()}
    assert len({file.lower() for file in files}) == 2
    assert set(store.names()) == {"sql", "SQL"}
    assert store.read_name("sql").ids != store.read_name("SQL").ids


def test_a_store_has_one_owner(tmp_path: Path) -> None:
    first = AdapterStore(tmp_path, DiskFileSystem())
    with pytest.raises(Unavailable, match="--store"):
        AdapterStore(tmp_path, DiskFileSystem())
    first.close()
    AdapterStore(tmp_path, DiskFileSystem()).close()


def test_leftovers_and_strangers_are_swept_or_passed_over(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, UnsyncedFileSystem())
    publish(store, "a", FILES)
    store.close()
    (tmp_path / "tmp" / "7").mkdir()
    (tmp_path / "tmp" / "7" / "adapter_config.json").write_bytes(b"half")
    (tmp_path / "names" / "B.json").write_bytes(b"{}")
    (tmp_path / "names" / "a.json~").write_bytes(b"{}")
    (tmp_path / "blobs" / "sha256" / "lost+found").mkdir()
    store = AdapterStore(tmp_path, UnsyncedFileSystem())
    assert list((tmp_path / "tmp").iterdir()) == []
    assert store.names() == ["a"]
    assert store.blob_ids() == [ID]


def test_a_damaged_blob_is_set_aside_and_the_same_upload_mends_it(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, UnsyncedFileSystem())
    put(store, FILES)
    for _ in range(2):  # the second time there is one in quarantine already
        corrupt(tmp_path, ID)
        with pytest.raises(AdapterUnavailable, match="upload it again"):
            store.read_blob(ID)
        assert not store.has_blob(ID)
        assert [path.name for path in (tmp_path / "quarantine").iterdir()] == [ID.removeprefix("sha256:")]
        with pytest.raises(AdapterUnavailable, match="upload it again"):
            store.read_blob(ID)
        put(store, FILES)
        assert store.read_blob(ID) == FILES


def test_an_upload_mends_a_damaged_blob_that_nobody_noticed(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, UnsyncedFileSystem())
    put(store, FILES)
    corrupt(tmp_path, ID)
    put(store, FILES)
    assert store.read_blob(ID) == FILES


def test_a_damaged_manifest_is_none(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, UnsyncedFileSystem())
    put(store, FILES)
    path = tmp_path / "blobs" / "sha256" / ID.removeprefix("sha256:") / "manifest.json"
    whole = path.read_bytes()
    for damaged in (whole.replace(b'"rank":4', b'"rank":8'), whole[:50], b"", b"[]", b"\xff", seal({"format": 9})):
        path.write_bytes(damaged)
        assert store.read_manifest(ID) is None
    path.write_bytes(whole)
    assert store.read_manifest(ID) == manifest_of(FILES)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body | {"current": 9},
        lambda body: body | {"current": None},
        lambda body: body | {"next": 1},
        lambda body: body | {"versions": body["versions"] * 2},
        lambda body: body | {"versions": [{"number": 1, "id": "sha256:../..", "created": ""}]},
        lambda body: body | {"versions": None},
        lambda body: body | {"name": "b"},
        lambda _body: {},
    ],
)
def test_a_record_that_contradicts_itself_is_damaged(tmp_path: Path, change: Callable[[dict], dict]) -> None:
    store = AdapterStore(tmp_path, UnsyncedFileSystem())
    publish(store, "a", FILES)
    path = tmp_path / "names" / "a.json"
    path.write_bytes(seal(change(unseal(path.read_bytes()))))
    with pytest.raises(AdapterUnavailable, match="adapter 'a'") as refusal:
        store.read_name("a")
    assert str(tmp_path) not in refusal.value.message


def test_a_seal_notices_every_flipped_bit() -> None:
    document = seal({"a": 1, "b": [1.5, None, "é"]})
    assert json.loads(document)["body"] == unseal(document)
    for at in range(len(document) - 1):
        for bit in (1, 4, 32):
            flipped = bytearray(document)
            flipped[at] ^= bit
            try:
                body = unseal(bytes(flipped))
            except SealError:
                continue
            assert body == unseal(document)  # white space, or the other spelling of the same text


def test_detaching_frees_the_bytes_in_two_steps(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, UnsyncedFileSystem())
    put(store, FILES)
    finish = store.detach_blob(ID)
    assert not store.has_blob(ID)
    assert list((tmp_path / "tmp").iterdir()) != []
    finish()
    assert list((tmp_path / "tmp").iterdir()) == []
    store.detach_blob(ID)()  # one that is gone already


def num_acts(root: Path, work: Callable[[AdapterStore], None]) -> int:
    fs = FaultyFileSystem(10**9, no_room())
    store = AdapterStore(root, fs)
    before = fs.num_acts
    work(store)
    return fs.num_acts - before


def replace_a(store: AdapterStore) -> None:
    publish(store, "a", checkpoint(2))


@pytest.mark.parametrize("error", [no_room(), OSError(5, "Input/output error")])
def test_a_disk_that_fails_at_any_act_leaves_the_old_version_or_the_new(tmp_path: Path, error: OSError) -> None:
    refusal = StoreFull if error.errno == no_room().errno else Unavailable
    acts = num_acts(tmp_path / "count", replace_a)
    assert acts > 10
    for k in range(acts):
        root = tmp_path / str(k)
        fs = FaultyFileSystem(10**9, error)
        store = AdapterStore(root, fs)
        publish(store, "a", checkpoint(1))
        fs.fails_at = fs.num_acts + k
        with pytest.raises(refusal):
            replace_a(store)
        assert list((root / "tmp").iterdir()) == []
        record = store.read_name("a")
        assert record.current_version is not None
        assert store.read_blob(record.current_version.id) in (checkpoint(1), checkpoint(2))
        fs.fails_at = 10**9
        replace_a(store)
        assert store.read_blob(store.read_name("a").versions[-1].id) == checkpoint(2)
        store.close()


def test_a_failure_while_opening_gives_the_lock_back(tmp_path: Path) -> None:
    for k in range(1, 8):
        with pytest.raises(StoreFull):
            AdapterStore(tmp_path, FaultyFileSystem(k, no_room()))
    AdapterStore(tmp_path, UnsyncedFileSystem()).close()


def check_after_crash(root: Path, acknowledged: dict[str, CheckpointFiles], begun: list[CheckpointFiles]) -> None:
    """What was acknowledged is there; what is there is whole."""
    store = AdapterStore(root, UnsyncedFileSystem())
    assert list((root / "tmp").iterdir()) == []
    assert acknowledged.keys() <= set(store.names())
    for name in store.names():
        record = store.read_name(name)
        assert record.current_version is not None
        files = store.read_blob(record.current_version.id)
        assert files in begun
        if name in acknowledged:
            assert begun.index(files) >= begun.index(acknowledged[name]), "an older version than acknowledged"
    for adapter in store.blob_ids():
        assert store.read_blob(adapter) in begun
    store.close()


SCRIPT = [("a", checkpoint(1)), ("b", FILES), ("a", checkpoint(2)), ("A", checkpoint(3))]


def test_a_process_that_dies_at_any_act_loses_nothing_acknowledged(tmp_path: Path) -> None:
    k, finished = 0, False
    while not finished:
        root = tmp_path / str(k)
        acknowledged: dict[str, CheckpointFiles] = {}
        try:
            store = AdapterStore(root, FaultyFileSystem(k, Crash()))
            for name, files in SCRIPT:
                publish(store, name, files)
                acknowledged[name] = files
            finished = True
        except Crash:
            pass
        if "store" in locals():
            store.close()
            del store
        check_after_crash(root, acknowledged, [files for _, files in SCRIPT])
        k += 1
    assert k > 40


def test_kill_9_in_the_middle_of_changes() -> None:
    """STORE_KILLS=200 kills more often; `tests.adapters.store.kills` says what happens, and kills whole servers."""
    num_kills = os.environ.get("STORE_KILLS", "40")
    command = [sys.executable, "-m", "tests.adapters.store.kills", "store", "--kills", num_kills]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE, check=False, timeout=280)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"{num_kills} kills, "), ended.stdout
    assert ": 0 lost, 0 partly visible" in ended.stdout


def test_the_records_of_names_count_up_for_ever() -> None:
    record = NameRecord(name="a").published(ID, "x").published(checkpoint(2).digest(), "y").rolled_back(1)
    assert record.current_version == record.numbered(1)
    gone = NameRecord.from_json(record.deleted().to_json())
    assert (gone.current, gone.versions, gone.next_number) == (None, (), 3)
    assert gone.published(ID, "z").current == 3


def test_both_file_systems_are_file_systems(tmp_path: Path) -> None:
    systems: list[FileSystem] = [DiskFileSystem(), LoggingFileSystem(tmp_path), FaultyFileSystem(9, no_room())]
    assert [fs.stamp(tmp_path / "none") for fs in systems] == [None, None, None]
    assert [fs.stamp(tmp_path) for fs in systems] == [None, None, None]
