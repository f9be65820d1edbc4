"""Who owns a name is part of its record: it outlives the process, and a delete ends it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.ownership import OPERATOR, Kept, Publisher
from peft_serve.adapters.sealed import SealError
from peft_serve.adapters.store import AdapterStore
from peft_serve.core import AdapterId
from peft_serve.errors import Forbidden, StorageQuotaExceeded
from tests.api.api_fakes import checkpoint, checkpoint_files, fake_gate

ANN = Publisher(tenant="ann", is_operator=False)
BOB = Publisher(tenant="bob", is_operator=False)


def opened(root: Path) -> Catalog:
    disk = DiskFileSystem()
    return Catalog(
        AdapterStore(root / "store", disk),
        CheckpointFolders([root / "folders"] if (root / "folders").is_dir() else [], disk, base_name="base-name"),
        fake_gate,
        checked_for="test",
        base_name="base-name",
        now=lambda: datetime(2026, 1, 2, tzinfo=UTC),
    )


def publish(catalog: Catalog, name: str, by: Publisher, text: str = "") -> AdapterId:
    return catalog.changes.publish(name, checkpoint_files(checkpoint(text or name)), publisher=by).version.id


def reopened(catalog: Catalog, root: Path) -> Catalog:
    catalog._store.close()
    return opened(root)


def test_an_owner_outlives_the_process(tmp_path: Path) -> None:
    catalog = opened(tmp_path)
    publish(catalog, "x", ANN)
    catalog = reopened(catalog, tmp_path)
    assert catalog.get("x").owner == "ann"
    with pytest.raises(Forbidden, match="belongs to somebody else"):
        publish(catalog, "x", BOB, "theft")
    publish(catalog, "x", OPERATOR, "mended")
    catalog = reopened(catalog, tmp_path)
    assert catalog.get("x").owner == "ann", "the operator mends, and takes nothing over"
    publish(catalog, "x", ANN, "again")
    catalog.changes.delete("x")
    catalog = reopened(catalog, tmp_path)
    publish(catalog, "x", BOB)
    assert catalog.get("x").owner == "bob", "what is deleted is free"
    catalog.check()


def test_what_is_nobodys_is_the_operators(tmp_path: Path) -> None:
    folder = tmp_path / "folders" / "lying"
    folder.mkdir(parents=True)
    for name, content in checkpoint("lying").items():
        (folder / name).write_bytes(content)
    catalog = opened(tmp_path)
    publish(catalog, "old", OPERATOR)
    for name in ("old", "lying"):
        with pytest.raises(Forbidden):
            publish(catalog, name, ANN, "mine")
        publish(catalog, name, OPERATOR, "new")
        assert catalog.get(name).owner == ""


def test_what_is_kept_is_counted_over_restarts(tmp_path: Path) -> None:
    catalog = opened(tmp_path)
    size = checkpoint_files(checkpoint("1")).num_bytes
    bounded = Publisher(tenant="ann", is_operator=False, max_adapters=2, max_bytes=2 * size)
    publish(catalog, "one", bounded, "1")
    publish(catalog, "two", bounded, "1")
    assert catalog.changes.kept("ann") == Kept(num_adapters=2, num_bytes=size), "the same files once"
    catalog = reopened(catalog, tmp_path)
    assert catalog.changes.kept("ann") == Kept(num_adapters=2, num_bytes=size)
    with pytest.raises(StorageQuotaExceeded, match="max_adapters"):
        publish(catalog, "three", bounded, "1")
    publish(catalog, "one", bounded, "2")
    blobs = set(catalog._store.blob_ids())
    with pytest.raises(StorageQuotaExceeded, match="max_bytes"):
        publish(catalog, "one", bounded, "3")
    assert set(catalog._store.blob_ids()) == blobs, "what was refused is not kept"
    publish(catalog, "one", OPERATOR, "4")
    assert catalog.changes.kept("ann").num_bytes == 3 * size, "what the operator does to a name counts to its owner"
    assert catalog.changes.kept("bob") == Kept(num_adapters=0, num_bytes=0)


def test_a_record_of_before_has_no_owner() -> None:
    old = {"name": "x", "next": 2, "current": 1}
    version = {"number": 1, "id": f"sha256:{'0' * 64}", "created": "2026-01-02T00:00:00Z"}
    record = NameRecord.from_json({**old, "versions": [version]})
    assert (record.owner, record.versions[0].num_bytes) == ("", 0)
    assert record.to_json() == {**old, "versions": [version]}
    newer = record.deleted().published(record.versions[0].id, "2026", owner="ann", num_bytes=7)
    assert NameRecord.from_json(newer.to_json()) == newer
    for change in ({"owner": 7}, {"versions": [{**version, "bytes": "7"}]}, {"versions": [{**version, "bytes": -1}]}):
        with pytest.raises(SealError):
            NameRecord.from_json({**old, "versions": [version], **change})
