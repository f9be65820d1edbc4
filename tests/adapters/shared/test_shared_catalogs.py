"""Several servers over one store: what one does, the others see at their next look, and nothing is overwritten."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from peft_serve.adapters.alias_record import Target
from peft_serve.adapters.catalog import Followed
from peft_serve.adapters.changes import etag
from peft_serve.adapters.ownership import Publisher
from peft_serve.adapters.shared.store import SharedStore
from peft_serve.core import AdapterId
from peft_serve.errors import (
    AdapterUnavailable,
    Conflict,
    Forbidden,
    PreconditionFailed,
    ServeError,
    Unavailable,
    UnknownAdapter,
)
from tests.adapters.shared.shared_fakes import (
    GRACE_S,
    Clock,
    Names,
    Replica,
    Replicas,
    away,
    catalog_over,
    folder_bucket,
)
from tests.adapters.store.store_fakes import FakeGate, checkpoint, write_folder

ONE, TWO, THREE = checkpoint(1), checkpoint(2), checkpoint(3)


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


def test_an_upload_is_seen_at_the_next_look_and_at_once_where_it_was_made(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    two.catalog.follow()
    published = one.catalog.changes.publish("A", ONE)
    assert (published.version.number, published.created) == (1, True)
    assert one.catalog.resolve("A").id == ONE.digest()
    with pytest.raises(UnknownAdapter):
        two.catalog.resolve("A")
    assert two.catalog.follow() == Followed()
    assert two.catalog.resolve("A") == one.catalog.resolve("A")
    assert two.gate.calls == 0, "the manifest came along"
    assert two.catalog.files(ONE.digest()) == ONE
    assert two.catalog.list() == one.catalog.list()


def test_two_uploads_of_one_name_are_consecutive_versions(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    one.catalog.changes.publish("a", ONE)
    second = two.catalog.changes.publish("a", TWO)  # it has not looked since
    assert second.version.number == 2
    assert second.previous is not None
    assert second.previous.number == 1
    third = one.catalog.changes.publish("a", THREE)
    assert (third.version.number, third.created) == (3, True)
    assert [version.number for version in one.catalog.versions("a")] == [1, 2, 3]
    again = two.catalog.changes.publish("a", THREE)
    assert (again.version.number, again.created) == (3, False), "these very files are there already"


@pytest.mark.parametrize("act", ["put_blob", "write"])
def test_a_change_in_between_is_decided_on_again(replicas: Replicas, act: str) -> None:
    """The other upload comes after this one's first look, up to its very write."""
    one, two = replicas.make(), replicas.make()
    one.catalog.changes.publish("a", ONE)
    two.catalog.follow()
    done: list[int] = []

    def before(kind: str, key: str) -> None:
        wanted = kind == "replace" and key == "names/a.json" if act == "write" else (kind, key[:6]) == ("put", "blobs/")
        if wanted and not done:
            done.append(one.catalog.changes.publish("a", TWO).version.number)

    two.memory.before = before
    published = two.catalog.changes.publish("a", THREE)
    assert done == [2]
    assert published.version.number == 3
    assert published.previous is not None
    assert published.previous.id == TWO.digest()
    two.memory.before = lambda _act, _key: None
    done.clear()
    two.memory.before = before
    with pytest.raises(PreconditionFailed):  # what If-Match named was true until the other came
        two.catalog.changes.publish("a", checkpoint(4), if_match=etag(THREE.digest()))
    assert done == [4]


def test_conditions_are_those_of_now(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    one.catalog.changes.publish("a", ONE)
    with pytest.raises(PreconditionFailed, match="exists already"):
        two.catalog.changes.publish("a", TWO, create_only=True)
    assert two.catalog.changes.publish("a", TWO, if_match=etag(ONE.digest())).version.number == 2
    with pytest.raises(PreconditionFailed):
        one.catalog.changes.delete("a", if_match=etag(ONE.digest()))
    assert one.catalog.changes.rollback("a", 1).id == ONE.digest()
    assert two.catalog.changes.delete("a", if_match=etag(ONE.digest())) == 0
    with pytest.raises(UnknownAdapter):
        one.catalog.changes.delete("a")
    assert one.catalog.changes.publish("a", ONE, create_only=True).version.number == 3, "no number is given twice"


def test_a_name_belongs_to_who_was_first(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    her, him = (Publisher(tenant=each, is_operator=False) for each in ("her", "him"))
    one.catalog.changes.publish("a", ONE, publisher=her)
    with pytest.raises(Forbidden):
        two.catalog.changes.publish("a", TWO, publisher=him)
    done: list[object] = []

    def before(kind: str, _key: str) -> None:
        if kind == "put" and not done:
            done.append(None)
            one.catalog.changes.publish("b", ONE, publisher=her)

    two.memory.before = before
    with pytest.raises(Forbidden):  # she came while his files were kept
        two.catalog.changes.publish("b", TWO, publisher=him)
    assert one.catalog.versions("b")[0].id == ONE.digest()


def test_a_delete_elsewhere(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    one.catalog.changes.publish("a", ONE)
    one.catalog.changes.publish("a", TWO)
    one.catalog.changes.publish("b", TWO)
    two.catalog.follow()
    told: list[AdapterId] = []
    two.store.tell_of_detached(told.append)
    held = two.catalog.resolve("a@1", hold=True)
    two.catalog.resolve("b")
    one.catalog.changes.delete("a")
    assert two.catalog.follow() == Followed(gone=frozenset({ONE.digest()})), "b is TWO too"
    with pytest.raises(UnknownAdapter):
        two.catalog.resolve("a")
    assert two.catalog.files(held.id) == ONE, "a request in flight ends on it"
    assert told == []
    two.catalog.release(held.id)
    assert told == [ONE.digest()]
    one.catalog.changes.delete("b")
    assert two.catalog.follow().gone == {TWO.digest()}
    assert told == [ONE.digest(), TWO.digest()]
    two.catalog.check()


def test_a_name_and_an_alias_are_never_both(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    one.catalog.changes.publish("a", ONE)
    alias, is_new = two.catalog.aliases.put("best", [Target(adapter="a")])  # nobody looked since
    assert is_new
    with pytest.raises(Conflict):
        one.catalog.changes.publish("best", TWO)
    with pytest.raises(Conflict):
        two.catalog.aliases.put("a", [Target(adapter="a", version=1)])
    one.catalog.changes.publish("b", TWO)
    moved, is_new = one.catalog.aliases.put("best", [Target(adapter="b")])
    assert not is_new
    assert moved.revisions.current > alias.revisions.current
    assert two.catalog.aliases.rollback("best").now.targets == alias.now.targets
    one.catalog.follow()
    with pytest.raises(Conflict, match="an alias points to it"):
        one.catalog.changes.delete("a")
    two.catalog.aliases.delete("best")
    one.catalog.follow()
    assert one.catalog.aliases.all() == ()
    one.catalog.changes.delete("a")


def test_pins_are_everybodys(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    assert one.catalog.pins.all() == two.catalog.pins.all() == {}
    one.catalog.changes.publish("a", ONE)
    one.catalog.changes.publish("b", TWO)
    one.catalog.pins.add(ONE.digest(), "a")
    two.catalog.pins.add(TWO.digest(), "b")  # does not undo the other
    assert two.catalog.pins.all() == {ONE.digest(): "a", TWO.digest(): "b"}
    assert two.catalog.follow().pinned == {ONE.digest(): "a"}
    one.catalog.follow()
    one.catalog.pins.remove([ONE.digest()])
    two.memory.fault = lambda act, key: away(act, key) if (act, key) == ("get", "pins.json") else None
    assert two.catalog.follow().unpinned == frozenset()
    two.memory.fault = lambda _act, _key: None
    assert two.catalog.follow().unpinned == {ONE.digest()}, "asked for again"
    assert two.catalog.follow() == Followed()


def test_a_pin_that_this_server_had_not_heard_of_is_removed(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    assert two.catalog.pins.all() == {}
    one.catalog.pins.add(ONE.digest(), "a")
    one.catalog.pins.add(TWO.digest(), "b")
    two.catalog.pins.remove([ONE.digest()])
    assert two.catalog.follow().pinned == {TWO.digest(): "b"}, "which it read for that, and did not tell"
    one.catalog.follow()
    assert one.catalog.pins.all() == {TWO.digest(): "b"}


def test_a_pin_in_between_is_kept(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    done: list[None] = []

    def before(act: str, key: str) -> None:
        if (act, key) == ("put_new", "pins.json") and not done:
            done.append(None)
            one.catalog.pins.add(ONE.digest(), "a")

    two.memory.before = before
    two.catalog.pins.add(TWO.digest(), "b")
    assert done
    assert two.catalog.pins.all() == {ONE.digest(): "a", TWO.digest(): "b"}


def test_a_change_that_was_not_told_and_that_a_collection_has_read(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    two.catalog.follow()
    one.memory.fault = lambda act, key: KeyboardInterrupt() if (act, key[:6]) == ("put", "marks/") else None
    with pytest.raises(KeyboardInterrupt):
        one.catalog.changes.publish("a", ONE)
    replicas.clock.now_s += GRACE_S / 2
    two.catalog.tidy()
    two.catalog.follow()
    assert two.catalog.resolve("a").id == ONE.digest()


def test_a_store_out_of_reach_and_back(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    for name, files in (("a", ONE), ("b", TWO)):
        one.catalog.changes.publish(name, files)
    two.catalog.follow()
    two.catalog.resolve("a")
    two.memory.fault = away
    with pytest.raises(Unavailable):
        two.catalog.follow()
    assert two.catalog.resolve("a").id == ONE.digest(), "what it knows goes on"
    two.catalog.retain(ONE.digest())
    two.catalog.release(ONE.digest())
    with pytest.raises(AdapterUnavailable) as cold:
        two.catalog.resolve("b")
    assert cold.value.retry_after_s
    with pytest.raises(UnknownAdapter):
        two.catalog.resolve("never")
    for change in (
        lambda: two.catalog.changes.publish("a", THREE),
        lambda: two.catalog.changes.publish("a", THREE, if_match='"no"'),
        lambda: two.catalog.changes.delete("a"),
        lambda: two.catalog.changes.rollback("a", 1),
        lambda: two.catalog.aliases.put("best", [Target(adapter="a")]),
        lambda: two.catalog.pins.add(ONE.digest(), "a"),
    ):
        with pytest.raises(ServeError) as refused:
            change()
        assert refused.value.status == 503
        assert refused.value.retry_after_s
    assert two.gate.calls == 0, "it is refused before the gate has its work"
    one.catalog.changes.publish("a", THREE)
    two.memory.fault = lambda _act, _key: None
    two.catalog.follow()
    assert two.catalog.resolve("a").id == THREE.digest()
    assert two.catalog.resolve("b").id == TWO.digest()


def test_a_record_that_could_not_be_read_again_is_read_at_the_next_look(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    one.catalog.changes.publish("a", ONE)
    two.catalog.follow()
    two.catalog.resolve("a")
    one.catalog.changes.publish("a", TWO)
    two.memory.fault = lambda act, key: away(act, key) if key == "names/a.json" else None
    two.catalog.follow()
    assert two.catalog.resolve("a").id == ONE.digest(), "until then what was known"
    two.memory.fault = lambda _act, _key: None
    two.catalog.follow()
    assert two.catalog.resolve("a").id == TWO.digest()
    two.memory.acts.clear()
    two.catalog.follow()
    assert two.memory.acts == [("tags", "marks/")], "and then no more"


def test_adapters_of_a_folder_need_no_store(replicas: Replicas, tmp_path: Path) -> None:
    write_folder(tmp_path / "own", ONE)
    one = replicas.make()
    catalog = catalog_over(one.store, FakeGate(), tmp_path)
    assert catalog.resolve("own").id == ONE.digest()
    one.memory.fault = away
    assert catalog.resolve("own").id == ONE.digest()
    catalog.retain(ONE.digest())
    catalog.release(ONE.digest())
    assert catalog.files(ONE.digest()) == ONE


def test_a_write_of_which_nobody_knows_whether_it_took_place(replicas: Replicas) -> None:
    one = replicas.make()
    one.catalog.changes.publish("a", ONE)
    contents = replicas.contents

    def lost(act: str, key: str) -> BaseException | None:
        if (act, key) == ("replace", "names/a.json"):
            found = contents.found[key]
            one.memory.fault = lambda _act, _key: None
            one.memory.replace(key, made.content, found.tag)
            return away(act, key)
        return None

    two = replicas.make()
    two.catalog.changes.publish("a", TWO)
    made = contents.found["names/a.json"]  # as the write would have made it
    one = replicas.make()
    one.catalog.resolve("a")
    one.memory.fault = lost
    with pytest.raises(Unavailable):
        one.catalog.changes.delete("a")
    one.catalog.follow()
    assert one.catalog.resolve("a").id == TWO.digest()
    one.catalog.changes.delete("a")
    with pytest.raises(UnknownAdapter):
        one.catalog.resolve("a")


def test_what_is_deleted_everywhere_is_collected_and_can_come_back(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    one.catalog.changes.publish("a", ONE)
    two.catalog.follow()
    two.catalog.changes.delete("a")
    one.memory.acts.clear()
    assert one.catalog.changes.collect() == 0
    assert one.memory.acts == [], "what another server may need is not even looked at at a start"
    for _ in range(3):
        replicas.clock.now_s += GRACE_S / 2
        two.catalog.tidy()
    assert two.store.blob_ids() == []
    one.catalog.follow()
    assert one.catalog.changes.publish("a", ONE).version.number == 2
    two.catalog.follow()
    assert two.catalog.files(two.catalog.resolve("a").id) == ONE


def test_many_threads_of_many_servers_upload_to_one_name(tmp_path: Path) -> None:
    clock, names = Clock(), Names()
    servers = [Replica(folder_bucket(tmp_path, clock, names), clock, names) for _ in range(3)]
    made: list[int] = []

    def upload(server: Replica, seed: int) -> None:
        publish = server.catalog.changes.publish
        made.extend(publish("a", checkpoint(100 * seed + number)).version.number for number in range(4))

    threads = [
        threading.Thread(target=upload, args=(server, 2 * at + each))
        for at, server in enumerate(servers)
        for each in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(made) == list(range(1, 25)), "each upload is a version, and none was overwritten"
    for server in servers:
        server.catalog.follow()
        assert [version.number for version in server.catalog.versions("a")] == list(range(1, 25))
        server.catalog.check()


def test_a_server_that_starts_sees_what_there_is(tmp_path: Path) -> None:
    clock, names = Clock(), Names()
    store = SharedStore(folder_bucket(tmp_path, clock, names), clock=clock, new_name=names, grace_s=GRACE_S)
    catalog_over(store, FakeGate()).changes.publish("a", ONE)
    store.close()
    again = Replica(folder_bucket(tmp_path, clock, names), clock, names)
    assert again.catalog.resolve("a").id == ONE.digest()
    assert again.catalog.is_shared
