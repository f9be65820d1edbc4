"""Stand-ins for what is around a shared store: a bucket in memory that keeps every condition, a clock, and processes
that share the bucket."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.shared.bucket import Bucket, Found, Oversize
from peft_serve.adapters.shared.folder_bucket import FolderBucket
from peft_serve.adapters.shared.object_bucket import ObjectBucket
from peft_serve.adapters.shared.store import SharedStore
from peft_serve.adapters.store_protocol import Store
from tests.adapters.store.store_fakes import NOON, FakeGate, UnsyncedFileSystem

GRACE_S = 3600.0

BucketFault = Callable[[str, str], BaseException | None]
"""Asked before each act: what it is, and on which key. An error makes the act fail."""


def healthy(_act: str, _key: str) -> BaseException | None:
    return None


def away(_act: str, _key: str) -> BaseException:
    return OSError(errno.EIO, os.strerror(errno.EIO))


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Names:
    """Names that are given once, by whichever process."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __call__(self) -> str:
        return f"n{next(self._numbers)}"


class Contents:
    """What several memory buckets have in common: the place behind them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.found: dict[str, Found] = {}


class MemoryBucket:
    """One process's way to `Contents`. `lost_answers` of conditional writes that take place are told to be lost."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.fault: BucketFault = healthy
        self.acts: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda _act, _key: None
        self.lost_answers = 0

    def _act(self, act: str, key: str) -> None:
        self.acts.append((act, key))
        self.before(act, key)
        failed = self.fault(act, key)
        if failed is not None:
            raise failed

    def get(self, key: str, *, max_bytes: int) -> Found | None:
        self._act("get", key)
        with self.contents.lock:
            found = self.contents.found.get(key)
        if found is not None and len(found.content) > max_bytes:
            raise Oversize(key)
        return found

    def put(self, key: str, content: bytes) -> None:
        self._act("put", key)
        with self.contents.lock:
            self._set(key, content)

    def put_new(self, key: str, content: bytes) -> str | None:
        self._act("put_new", key)
        with self.contents.lock:
            return None if key in self.contents.found else self._set(key, content)

    def replace(self, key: str, content: bytes, tag: str) -> str | None:
        self._act("replace", key)
        with self.contents.lock:
            found = self.contents.found.get(key)
            return None if found is None or found.tag != tag else self._set(key, content)

    def _set(self, key: str, content: bytes) -> str | None:
        steps = key.split("/")
        assert "." in steps[-1], "the last step of a key has a dot"
        assert not any("." in step for step in steps[:-1]), "no other step has"
        tag = str(next(self.contents.numbers))
        self.contents.found[key] = Found(content=content, tag=tag)
        if self.lost_answers:
            self.lost_answers -= 1
            return None
        return tag

    def tags(self, prefix: str) -> dict[str, str]:
        self._act("tags", prefix)
        with self.contents.lock:
            return {key: found.tag for key, found in self.contents.found.items() if key.startswith(prefix)}

    def remove(self, key: str) -> None:
        self._act("remove", key)
        with self.contents.lock:
            for each in [
                each for each in self.contents.found if each == key or (key[-1] == "/" and each.startswith(key))
            ]:
                del self.contents.found[each]

    def require_room(self, num_bytes: int) -> None:
        self._act("require_room", "")

    def tidy(self) -> None:
        self._act("tidy", "")


def folder_bucket(root: Path, clock: Clock, names: Names | None = None, **options: Any) -> FolderBucket:
    return FolderBucket(root, UnsyncedFileSystem(), clock=clock, new_name=names or Names(), grace_s=GRACE_S, **options)


def object_bucket(endpoint: str, prefix: str) -> ObjectBucket:
    """A place in the bucket `bucket` of a server; it gives up at once."""
    from obstore.store import S3Store

    store = S3Store(
        "bucket",
        prefix=prefix,
        endpoint=endpoint,
        access_key_id="key",
        secret_access_key="secret",
        region="us-east-1",
        client_options={"allow_http": True, "timeout": timedelta(seconds=10)},
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
    )
    return ObjectBucket(store)


class Replica:
    """One process: a store over a bucket of its own, and the catalog over that."""

    def __init__(self, bucket: Bucket, clock: Clock, names: Names) -> None:
        self.bucket = bucket
        self.store = SharedStore(bucket, clock=clock, new_name=names, grace_s=GRACE_S)
        self.gate = FakeGate()
        self.catalog = catalog_over(self.store, self.gate)

    @property
    def memory(self) -> MemoryBucket:
        assert isinstance(self.bucket, MemoryBucket)
        return self.bucket


def catalog_over(store: Store, gate: FakeGate, *folders: Path) -> Catalog:
    return Catalog(
        store,
        CheckpointFolders(folders, UnsyncedFileSystem(), base_name="demo-llama"),
        gate,
        checked_for="demo",
        base_name="demo-llama",
        now=lambda: NOON,
    )


class Replicas:
    """Processes over one place in memory."""

    def __init__(self) -> None:
        self.contents = Contents()
        self.clock = Clock()
        self.names = Names()

    def make(self) -> Replica:
        return Replica(MemoryBucket(self.contents), self.clock, self.names)
