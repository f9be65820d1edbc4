"""Three servers over one folder against a small model of it: uploads, deletes, aliases and pins, processes that die
between any two acts, looks and collections at any time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from peft_serve.adapters.alias_record import Target
from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.shared.folder_bucket import FolderBucket
from peft_serve.adapters.shared.store import RELIST_S, SharedStore
from peft_serve.core import AdapterId
from peft_serve.errors import Conflict, UnknownAdapter
from tests.adapters.shared.shared_fakes import GRACE_S, Clock, Names, catalog_over
from tests.adapters.store.store_fakes import Crash, FakeGate, FaultyFileSystem, checkpoint

NAMES = st.sampled_from(["a", "A", "b.c"])
SERVERS = st.integers(0, 2)
SEEDS = st.integers(0, 3)
IDS = [checkpoint(seed).digest() for seed in range(4)]
NEVER = 1 << 40

Versions = dict[int, AdapterId]


class Server:
    def __init__(self, root: Path, clock: Clock, names: Names) -> None:
        self.fs = FaultyFileSystem(NEVER, Crash())
        bucket = FolderBucket(root, self.fs, clock=clock, new_name=names, grace_s=GRACE_S)
        self.store = SharedStore(bucket, clock=clock, new_name=names, grace_s=GRACE_S)
        self.catalog: Catalog = catalog_over(self.store, FakeGate())


class SharedMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name) / "store"
        self.clock, self.names = Clock(), Names()
        self.servers = [self.started() for _ in range(3)]
        self.versions: dict[str, Versions] = {}  # of names that are not deleted
        self.current: dict[str, int] = {}
        self.counter: dict[str, int] = {}
        self.alias: str | None = None  # what `best` points to
        self.pins: dict[AdapterId, str] = {}

    def started(self) -> Server:
        return Server(self.root, self.clock, self.names)

    def teardown(self) -> None:
        self.folder.cleanup()

    # what takes place

    @rule(at=SERVERS, name=NAMES, seed=SEEDS)
    def publish(self, at: int, name: str, seed: int) -> None:
        outcome = self.servers[at].catalog.changes.publish(name, checkpoint(seed))
        assert outcome.created == (self.now(name) != IDS[seed])
        self.published(name, IDS[seed])
        assert outcome.version.number == self.current[name]

    def now(self, name: str) -> AdapterId | None:
        return self.versions[name][self.current[name]] if name in self.current else None

    def published(self, name: str, adapter: AdapterId) -> None:
        if self.now(name) != adapter:
            self.counter[name] = number = self.counter.get(name, 0) + 1
            self.versions.setdefault(name, {})[number] = adapter
            self.current[name] = number

    @rule(at=SERVERS, name=NAMES)
    def delete(self, at: int, name: str) -> None:
        server = self.servers[at]
        server.catalog.follow()
        try:
            server.catalog.changes.delete(name)
        except UnknownAdapter:
            assert name not in self.current
        except Conflict:
            assert self.alias == name
        else:
            assert name in self.current
            assert self.alias != name
            self.deleted(name)

    def deleted(self, name: str) -> None:
        del self.versions[name], self.current[name]

    @rule(at=SERVERS, name=NAMES)
    def point(self, at: int, name: str) -> None:
        try:
            self.servers[at].catalog.aliases.put("best", [Target(adapter=name)])
        except UnknownAdapter:
            assert name not in self.current
        else:
            assert name in self.current
            self.alias = name

    @rule(at=SERVERS, seed=SEEDS, is_pinned=st.booleans())
    def pin(self, at: int, seed: int, is_pinned: bool) -> None:
        pins = self.servers[at].catalog.pins
        if is_pinned:
            pins.add(IDS[seed], "a")
            self.pins[IDS[seed]] = "a"
        else:
            pins.remove([IDS[seed]])
            self.pins.pop(IDS[seed], None)

    # what goes wrong, and time

    @rule(at=SERVERS, name=NAMES, seed=SEEDS, act=st.integers(0, 40), is_delete=st.booleans())
    def die(self, at: int, name: str, seed: int, act: int, is_delete: bool) -> None:
        """A process dies in the middle of a change: it took place, or it did not."""
        server = self.servers[at]
        server.catalog.follow()
        server.fs.fails_at = server.fs.num_acts + act

        def change() -> None:
            if is_delete:
                server.catalog.changes.delete(name)
            else:
                server.catalog.changes.publish(name, checkpoint(seed))

        died = _dies(change)
        server.fs.fails_at = NEVER
        if died:
            server = self.servers[at] = self.started()
        record = server.store.read_name(name)
        before = (self.versions.get(name, {}), self.current.get(name))
        took_place = ({v.number: v.id for v in record.versions}, record.current) != before
        if took_place and is_delete:
            self.deleted(name)
        elif took_place:
            self.published(name, IDS[seed])

    @rule(at=SERVERS)
    def restart(self, at: int) -> None:
        self.servers[at] = self.started()

    @rule(at=SERVERS)
    def tidy(self, at: int) -> None:
        self.servers[at].catalog.tidy()

    @rule(seconds=st.sampled_from([1.0, RELIST_S, GRACE_S / 2, GRACE_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule(at=SERVERS)
    def look(self, at: int) -> None:
        """A look is enough to know what was acknowledged; what a dying process did not tell is found in a minute."""
        self.clock.now_s += RELIST_S
        server = self.servers[at]
        server.catalog.follow()
        for name in ("a", "A", "b.c"):
            if name not in self.current:
                assert _is_unknown(server.catalog, name)
                continue
            found = server.catalog.resolve(name)
            assert (found.number, found.id) == (self.current[name], self.now(name))
            for number, adapter in self.versions[name].items():
                assert server.catalog.resolve(f"{name}@{number}").id == adapter
        assert {entry.name for entry in server.catalog.list()} == self.current.keys()
        alias = server.catalog.aliases.find("best")
        assert (alias and alias.now.targets[0].adapter) == self.alias
        assert server.catalog.pins.all() == self.pins
        server.catalog.check()

    @invariant()
    def files_that_are_named_are_there_and_whole(self) -> None:
        named = {adapter for versions in self.versions.values() for adapter in versions.values()}
        for adapter in named:
            assert self.servers[0].store.read_blob(adapter).digest() == adapter


def _dies(change: Callable[[], None]) -> bool:
    try:
        change()
    except Crash:
        return True
    except (UnknownAdapter, Conflict):
        return False
    return False


def _is_unknown(catalog: Catalog, name: str) -> bool:
    try:
        catalog.resolve(name)
    except UnknownAdapter:
        return True
    return False


SharedMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestSharedMachine = SharedMachine.TestCase
