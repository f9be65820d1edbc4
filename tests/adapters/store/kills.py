"""Processes that are killed in the middle of changes, by `kill -9`, over and over on one store.

    python -m tests.adapters.store.kills store --kills 200     the store, the catalog and the gate; some 0.1 s a kill
    python -m tests.adapters.store.kills server --kills 5      a whole server, asked over HTTP; some 20 s a kill

After each kill a fresh start must find what was acknowledged: the state after the last acknowledged change, or after
the one that was under way; every file matches its digest, `tmp` is empty, and no files are left that nothing names.
It says what it counted, and ends with 1 when something was lost or seen half done.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.store import AdapterStore
from tests.attacks.hostile import base_of, honest, join, split

NAMES = ("a", "B", "c.d", "e-1")
MOST_MS = 60.0  # of life behind the first acknowledged change


@dataclass(frozen=True)
class Change:
    kind: str  # put, delete or pin
    name: str
    files: CheckpointFiles


@dataclass
class Expected:
    """What the acknowledged changes come to: a name's current digest, and what is pinned."""

    current: dict[str, str] = field(default_factory=dict)
    pins: frozenset[str] = frozenset()

    def after(self, change: Change) -> Expected:
        current, pins = dict(self.current), self.pins
        if change.kind == "put":
            current[change.name] = change.files.digest()
        elif change.kind == "delete":
            current.pop(change.name, None)
        elif change.name in current:
            pins = pins ^ {current[change.name]}
        return Expected(current, pins)


def variant(number: int) -> CheckpointFiles:
    """An honest checkpoint that differs from every other number's."""
    files = honest("lora")
    header, body = split(files.weights)
    first = struct.pack("<f", 0.001 * (number + 1))
    text = files.weights[8 : len(files.weights) - len(body)]
    assert header, "it has tensors"
    return CheckpointFiles(config=files.config, weights=join(text, first + body[4:]))


def changes(seed: int) -> Iterator[Change]:
    """What a process does until it is killed."""
    rng = random.Random(seed)
    while True:
        kind = rng.choices(["put", "delete", "pin"], [6, 3, 2])[0]
        yield Change(kind, rng.choice(NAMES), variant(rng.randrange(1 << 20)))


def opened(root: Path) -> tuple[Catalog, AdapterStore]:
    disk = DiskFileSystem()
    store = AdapterStore(root, disk)
    base, limits = base_of("llama"), GateLimits()
    catalog = Catalog(
        store,
        CheckpointFolders((), disk, base_name="demo"),
        lambda files: inspect(files, base, limits),
        checked_for="kills",
        base_name="demo",
        now=lambda: datetime.now(UTC),
    )
    return catalog, store


def carry_out(catalog: Catalog, change: Change) -> None:
    if change.kind == "put":
        catalog.changes.publish(change.name, change.files)
        return
    there = {entry.name: entry.version.id for entry in catalog.list() if entry.version is not None}
    if change.name not in there:
        return
    if change.kind == "delete":
        catalog.changes.delete(change.name)
    elif there[change.name] in catalog.pins.all():
        catalog.pins.remove([there[change.name]])
    else:
        catalog.pins.add(there[change.name], change.name)


def live(root: Path, seed: int, told: int) -> None:
    """The process that is killed: a byte for each change that is done."""
    catalog, _ = opened(root)
    for change in changes(seed):
        carry_out(catalog, change)
        os.write(told, b".")


def killed(root: Path, seed: int) -> int:
    """Start a process, kill it at some moment, and give how many changes it had acknowledged."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            live(root, seed, writing)
        finally:
            os._exit(1)
    os.close(writing)
    acknowledged = os.read(reading, 1)
    time.sleep(random.Random(-seed - 1).random() * MOST_MS / 1e3)
    os.kill(child, signal.SIGKILL)
    while chunk := os.read(reading, 4096):
        acknowledged += chunk
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        raise RuntimeError("the process ended by itself, before it was killed")
    return len(acknowledged)


def found(catalog: Catalog) -> Expected:
    """What a fresh start sees; every version of every name is read and checked against its digest."""
    current = {}
    for entry in catalog.list():
        if entry.problem or entry.version is None:
            raise RuntimeError(f"{entry.name}: {entry.problem}")
        for version in catalog.versions(entry.name):
            catalog.files(version.id)
        current[entry.name] = str(catalog.resolve(entry.name).id)
    return Expected(current, frozenset(catalog.pins.all()))


def check(root: Path, before: Expected, seed: int, num_acknowledged: int) -> tuple[Expected, bool]:
    """The state after the kill, and whether the change that was under way is in it. Raises RuntimeError."""
    script = changes(seed)
    expected = before
    for _ in range(num_acknowledged):
        expected = expected.after(next(script))
    next_one = expected.after(next(script))
    catalog, store = opened(root)
    try:
        if any((root / "tmp").iterdir()):
            raise RuntimeError("tmp is not empty after a start")
        now = found(catalog)
        if now not in (expected, next_one):
            raise RuntimeError(f"kill {seed}: {now} is neither {expected} nor {next_one}")
        catalog.changes.collect()
        named = {version.id for entry in catalog.list() for version in catalog.versions(entry.name)}
        if set(store.blob_ids()) != named or any((root / "quarantine").iterdir()):
            raise RuntimeError(f"kill {seed}: files are left that nothing names, or some were set aside")
        return now, now != expected
    finally:
        store.close()


def kill_store(num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    variant(0)
    base_of("llama")  # before any fork
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        state, num_acknowledged, num_under_way = Expected(), 0, 0
        for number in range(num_kills):
            acknowledged = killed(root, seed + number)
            state, was_under_way = check(root, state, seed + number, acknowledged)
            num_acknowledged += acknowledged
            num_under_way += was_under_way
    print(
        f"{num_kills} kills, {num_acknowledged} acknowledged changes: 0 lost, 0 partly visible "
        f"({num_under_way} more were done and not acknowledged)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill processes in the middle of changes, and look at what is left.")
    parser.add_argument("what", choices=["store", "server"])
    parser.add_argument("--kills", type=int, default=None, help="default: 200 of a store, 5 of a server")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        if given.what == "store":
            kill_store(given.kills or 200, given.seed)
        else:
            from tests.adapters.store.kill_server import kill_server

            kill_server(given.kills or 5, given.seed)
    except RuntimeError as error:
        sys.exit(f"FAILED: {error}")


if __name__ == "__main__":
    main()
