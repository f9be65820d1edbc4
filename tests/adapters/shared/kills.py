"""Processes that `kill -9` ends at each act of an upload to a shared folder, and in the middle of each write.

    python -m tests.adapters.shared.kills

After each kill a server that ran meanwhile and one that starts both see the version before the upload or the one that
it made, whole; the next upload has the next number; and after the time of grace no file is left of what broke off. It
says what it counted, and ends with 1 when that does not hold.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from peft_serve.adapters.shared.folder_bucket import FolderBucket
from peft_serve.adapters.shared.store import RELIST_S, SharedStore
from tests.adapters.shared.shared_fakes import GRACE_S, Clock, Names, Replica, catalog_over, folder_bucket
from tests.adapters.store.store_fakes import FakeGate, UnsyncedFileSystem, checkpoint

NAME = "a"
OLD, NEW, NEXT = checkpoint(1), checkpoint(2), checkpoint(3)


class KillingFileSystem(UnsyncedFileSystem):
    """Kills its own process before the act `dies_at`, counted from 0; a write has a second moment, half way."""

    def __init__(self, dies_at: int) -> None:
        self._dies_at = dies_at
        self._num_acts = 0

    def _act(self) -> None:
        if self._num_acts == self._dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._num_acts += 1

    def make_dir(self, path: Path) -> None:
        self._act()
        super().make_dir(path)

    def write(self, path: Path, content: bytes) -> None:
        self._act()
        with path.open("xb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            self._act()
            file.write(content[len(content) // 2 :])

    def sync_file(self, path: Path) -> None:
        self._act()
        super().sync_file(path)

    def sync_dir(self, path: Path) -> None:
        self._act()
        super().sync_dir(path)

    def link(self, old: Path, new: Path) -> None:
        self._act()
        super().link(old, new)

    def remove_file(self, path: Path) -> None:
        self._act()
        super().remove_file(path)

    def remove_tree(self, path: Path) -> None:
        self._act()
        super().remove_tree(path)


def was_killed(root: Path, dies_at: int) -> bool:
    """Let a process upload, and say whether it was killed before that was acknowledged."""
    child = os.fork()
    if child == 0:
        try:
            clock, names = Clock(), _names("child")
            fs = KillingFileSystem(dies_at)
            bucket = FolderBucket(root, fs, clock=clock, new_name=names, grace_s=GRACE_S)
            store = SharedStore(bucket, clock=clock, new_name=names, grace_s=GRACE_S)
            catalog_over(store, FakeGate()).changes.publish(NAME, NEW)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise RuntimeError(f"act {dies_at}: the upload failed by itself")
    return False


def check(root: Path, witness: Replica, clock: Clock, *, is_told: bool) -> bool:
    """Whether the upload took place. Raises RuntimeError where it did by half, or where something is left."""
    clock.now_s += RELIST_S
    witness.catalog.follow()
    started = Replica(folder_bucket(root, clock, names := _names("started")), clock, names)
    seen = []
    for server in (witness, started):
        found = server.catalog.resolve(NAME)
        _require(server.catalog.files(found.id).digest() == found.id, "files that are not whole")
        seen.append((found.number, found.id))
    _require(seen[0] == seen[1], f"two servers see {seen}")
    _require(seen[0] in ((1, OLD.digest()), (2, NEW.digest())), f"neither old nor new: {seen[0]}")
    _require(not is_told or seen[0][0] == 2, "an upload that was acknowledged is lost")
    following = started.catalog.changes.publish(NAME, NEXT).version.number
    _require(following == seen[0][0] + 1, f"version {following} behind {seen[0][0]}")
    for _ in range(5):
        clock.now_s += GRACE_S / 2
        started.catalog.tidy()
    _require_tidy(root, {version.id for version in started.catalog.versions(NAME)})
    return seen[0][0] == 2


def _require_tidy(root: Path, named: set[str]) -> None:
    _require(not list((root / "tmp").iterdir()), "tmp is not empty")
    _require(len(list((root / "names").iterdir())) == 1, "more than one content of the record is left")
    for blob in (root / "blobs" / "sha256").iterdir():
        places = [each for each in blob.iterdir() if each.is_dir() and any(each.iterdir())]
        wanted = 1 if f"sha256:{blob.name}" in named else 0
        _require(len(places) == wanted, f"{len(places)} places of files where {wanted} should be")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def _names(owner: str) -> Names:
    """Names that no other process gives."""
    names = Names()
    return type("Owned", (), {"__call__": lambda _self: f"{owner}{names()}"})()  # type: ignore[no-any-return]


def main() -> None:
    dies_at, num_new = 0, 0
    while True:
        with tempfile.TemporaryDirectory() as folder:
            root, clock, names = Path(folder) / "store", Clock(), _names("witness")
            witness = Replica(folder_bucket(root, clock, names), clock, names)
            witness.catalog.changes.publish(NAME, OLD)
            is_killed = was_killed(root, dies_at)
            try:
                num_new += check(root, witness, clock, is_told=not is_killed)
            except RuntimeError as error:
                sys.exit(f"FAILED: act {dies_at}: {error}")
            shutil.rmtree(root)
        if not is_killed:
            break
        dies_at += 1
    print(f"{dies_at} kills: 0 lost, 0 half seen, 0 left over ({num_new - 1} took place and were not acknowledged)")


if __name__ == "__main__":
    main()
