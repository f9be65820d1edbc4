"""A server process that uploads to one name when it is told to, at the same moment as another one like it.

    python -m tests.adapters.shared.rivals STORE SEED

Each line on stdin is a number: it uploads files that nobody else has. When they are kept, and before the name stands
for them, it says so in a line and waits for one. Then it writes a line of JSON with the version's number, its digest,
and how often another process was first. At the end of stdin it writes what it sees of the name.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path

from peft_serve.adapters.findings import Proof
from peft_serve.adapters.shared import names
from peft_serve.adapters.shared.bucket import Bucket
from peft_serve.adapters.shared.folder_bucket import FolderBucket
from peft_serve.adapters.shared.object_bucket import ObjectBucket
from peft_serve.adapters.shared.store import SharedStore
from peft_serve.adapters.store_protocol import RecordMoved
from tests.adapters.shared.shared_fakes import GRACE_S, catalog_over
from tests.adapters.store.store_fakes import FakeGate, UnsyncedFileSystem, checkpoint

NAME = "contested"


class Hesitant(UnsyncedFileSystem):
    """Waits before each link, so that both have looked what is there when both link."""

    def link(self, old: Path, new: Path) -> None:
        time.sleep(0.01)
        super().link(old, new)


class Moved(RecordMoved):
    """Counts how often it is raised."""

    count = 0

    def __init__(self, name: str) -> None:
        super().__init__(name)
        Moved.count += 1


def main(store: str, seed: int) -> None:
    names.RecordMoved = Moved  # type: ignore[misc]
    catalog = catalog_over(
        SharedStore(_bucket(store), clock=time.monotonic, new_name=_new_name, grace_s=GRACE_S), FakeGate()
    )
    _say({"ready": True})
    while line := sys.stdin.readline():
        before = Moved.count
        published = catalog.changes.publish(NAME, checkpoint(1000 * seed + int(line)), prove=_wait)
        version = published.version
        _say({"number": version.number, "id": version.id, "num_moved": Moved.count - before})
    catalog.follow()
    versions = [[version.number, version.id] for version in catalog.versions(NAME)]
    current = catalog.resolve(NAME)
    assert catalog.files(current.id).digest() == current.id
    _say({"versions": versions, "current": [current.number, current.id]})


def _bucket(store: str) -> Bucket:
    if store.startswith("s3://"):
        return ObjectBucket.at(store)
    return FolderBucket(Path(store), Hesitant(), clock=time.monotonic, new_name=_new_name, grace_s=GRACE_S)


def _new_name() -> str:
    return uuid.uuid4().hex


def _wait(_found: object) -> Proof:
    _say({"kept": True})
    sys.stdin.readline()
    return Proof()


def _say(words: object) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
