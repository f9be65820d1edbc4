"""Following a shared store: what leaves the engine's memory, what is pinned, and how soon a change is seen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_serve.adapters.combined import Part, combined_id
from peft_serve.adapters.shared.store import SharedStore
from peft_serve.adapters.store import AdapterStore
from peft_serve.config import Settings
from peft_serve.core import AdapterId
from peft_serve.engine.adapter_places import default_store, local_folder, make_follower, open_store
from peft_serve.engine.following import StoreFollower
from peft_serve.engine.resuming import resume
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from peft_serve.errors import Unavailable
from tests.adapters.shared.shared_fakes import Replica, Replicas, away, catalog_over
from tests.adapters.store.store_fakes import FakeGate, checkpoint

ONE, TWO = checkpoint(1), checkpoint(2)
BOTH = combined_id([Part(id=ONE.digest()), Part(id=TWO.digest())])


class Memory:
    """As much of an engine as is asked here."""

    def __init__(self) -> None:
        self.host: list[AdapterId] = [BOTH]
        self.unloaded: list[AdapterId] = []
        self.loaded: list[AdapterId] = []
        self.pinned: set[AdapterId] = set()
        self.num_slots = 3

    def load(self, adapter: AdapterId) -> None:
        self.loaded.append(adapter)

    def unload(self, adapter: AdapterId) -> None:
        self.unloaded.append(adapter)

    def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        (self.pinned.add if pinned else self.pinned.discard)(adapter)

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            state=EngineState.RUNNING,
            resident=(),
            num_slots=self.num_slots,
            block_size=16,
            num_blocks=9,
            host_adapters=tuple(self.host),
        )


class Following:
    """A server that follows what `other` does."""

    def __init__(self, draw: Callable[[], float] = lambda: 0.5) -> None:
        self.replicas = Replicas()
        self.other = self.replicas.make()
        self.own: Replica = self.replicas.make()
        self.engine = Memory()
        self.follower = StoreFollower(self.own.catalog, self.engine, poll_s=1.0, draw=draw)  # type: ignore[arg-type]


@pytest.fixture
def following() -> Following:
    return Following()


def test_what_is_deleted_elsewhere_leaves_the_engine(following: Following) -> None:
    following.other.catalog.changes.publish("a", ONE)
    assert following.follower.look()
    following.own.catalog.resolve("a")
    following.other.catalog.changes.delete("a")
    assert following.follower.look()
    assert set(following.engine.unloaded) == {ONE.digest(), BOTH}


def test_pins_of_others_are_ours_within_the_slots(following: Following) -> None:
    other = following.other.catalog
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        other.changes.publish(name, checkpoint(seed))
        other.pins.add(checkpoint(seed).digest(), name)
    following.follower.look()
    assert following.engine.pinned == {ONE.digest(), TWO.digest()}, "one slot is everybody's"
    assert set(following.engine.loaded) == following.engine.pinned
    other.pins.remove([ONE.digest()])
    following.follower.look()
    assert following.engine.pinned == {TWO.digest()}
    assert set(other.pins.all()) == {TWO.digest(), checkpoint(3).digest()}, "for want of slots nothing is unpinned"


def test_a_pin_that_is_younger_than_what_is_known_stays(following: Following) -> None:
    following.other.catalog.changes.publish("a", ONE)
    following.other.catalog.pins.add(ONE.digest(), "a")
    resume(following.own.catalog, following.engine)  # type: ignore[arg-type]
    assert following.other.catalog.pins.all() == following.replicas.make().catalog.pins.all() == {ONE.digest(): "a"}


def test_a_store_that_is_away_is_told_once_and_then_that_it_is_back(
    following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    following.own.memory.fault = away
    assert [following.follower.look() for _ in range(3)] == [False] * 3
    following.own.memory.fault = lambda _act, _key: None
    assert following.follower.look()
    assert following.follower.look()
    assert len(caplog.messages) == 2
    assert "not seen" in caplog.messages[0]
    assert caplog.messages[0].endswith("(Input/output error)"), "what the place said is the operator's to know"
    assert "answers again" in caplog.messages[1]


def test_a_change_is_seen_within_two_seconds_by_the_delay_alone() -> None:
    delays = [Following(draw=lambda drawn=drawn: drawn).follower.delay_s() for drawn in (0.0, 0.5, 0.999)]
    assert delays == sorted(set(delays)), "servers do not ask together"
    assert min(delays) > 0
    assert max(delays) <= 1.25, "and the rest of the two seconds is for the store's answers"


def test_who_is_poked_looks_at_once(following: Following) -> None:
    seen = threading.Event()
    follower = StoreFollower(
        following.own.catalog,
        following.engine,  # type: ignore[arg-type]
        poll_s=3600.0,
        draw=lambda: 0.5,
    )
    looked = threading.Semaphore(0)

    def before(act: str, key: str) -> None:
        if (act, key) == ("tags", "marks/"):
            looked.release()
        if (act, key) == ("get", "names/a.json"):
            seen.set()

    following.own.memory.before = before
    follower.start()
    follower.start()  # is one start
    assert looked.acquire(timeout=10)
    following.other.catalog.changes.publish("a", ONE)
    follower.poke()
    assert looked.acquire(timeout=10)
    follower.stop(timeout_s=10)
    assert following.own.catalog.resolve("a").id == ONE.digest()
    assert seen.is_set()


def test_which_store_is_opened(tmp_path: Path) -> None:
    alone = Settings(store=tmp_path / "alone")
    shared = Settings(store=str(tmp_path / "shared"), store_shared=True)
    with_lock = open_store(alone, local_folder(alone, "demo"))
    assert isinstance(with_lock, AdapterStore)
    root = local_folder(shared, "demo")
    one, two = open_store(shared, root), open_store(shared, root)
    assert isinstance(one, SharedStore)
    catalogs = [catalog_over(store, FakeGate()) for store in (one, two)]
    catalogs[0].changes.publish("a", ONE)
    engine = Memory()
    follower = make_follower(shared, catalogs[1], engine)  # type: ignore[arg-type]
    assert follower is not None
    follower.look()
    assert catalogs[1].resolve("a").id == ONE.digest()
    catalog_over(with_lock, FakeGate()).changes.publish("a", ONE)
    assert make_follower(alone, catalog_over(with_lock, FakeGate()), engine) is None  # type: ignore[arg-type]
    with_lock.close()


def test_a_store_of_one_is_not_taken_for_a_shared_one(tmp_path: Path) -> None:
    alone, shared = Settings(store=tmp_path), Settings(store=tmp_path, store_shared=True)
    store = open_store(alone, tmp_path)
    catalog_over(store, FakeGate()).changes.publish("a", ONE)
    store.close()
    with pytest.raises(ValueError, match="is the store of one server"):
        open_store(shared, tmp_path)
    other = tmp_path / "other"
    open_store(Settings(store=other, store_shared=True), other).close()
    with pytest.raises(ValueError, match="--store-shared, too"):
        open_store(Settings(store=other), other)


def test_an_object_store_that_does_not_answer_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("AWS_ENDPOINT", "http://127.0.0.1:9"),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ):
        monkeypatch.setenv(name, value)
    settings = Settings(store="s3://bucket/prefix")
    root = local_folder(settings, "org/base")
    assert root == default_store("org/base"), "what is compiled is kept on this machine"
    with pytest.raises(Unavailable, match=r"--store s3://bucket/prefix: .*AWS_") as refused:
        open_store(settings, root)
    assert "127.0.0.1" not in refused.value.message
    with pytest.raises(ValueError, match="s3://bucket/prefix"):
        open_store(Settings(store="s3://"), root)
