"""A shared store: conditions, marks, what happens when it does not answer, damage, and what is collected when."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.sealed import SealError
from peft_serve.adapters.shared.blob_paper import folder_of, paper_of
from peft_serve.adapters.shared.bucket import Found
from peft_serve.adapters.shared.names import key_of
from peft_serve.adapters.shared.store import RELIST_S
from peft_serve.adapters.store_protocol import NO_NEWS, News, PinsMoved, RecordMoved
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterDamaged, AdapterUnavailable, StoreFull, Unavailable
from tests.adapters.shared.shared_fakes import GRACE_S, MemoryBucket, Replica, Replicas, away
from tests.adapters.store.store_fakes import checkpoint, manifest_of

ONE, TWO = checkpoint(1), checkpoint(2)


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


def keep(replica: Replica, files: CheckpointFiles, name: str) -> NameRecord:
    """Upload by the store alone."""
    before = replica.store.read_name(name)
    replica.store.put_blob(files.digest(), files, manifest_of(files))
    record = before.published(files.digest(), "")
    replica.store.write_name(record, replaces=before)
    return record


def forget(replica: Replica, name: str) -> None:
    before = replica.store.read_name(name)
    replica.store.write_name(before.deleted(), replaces=before)


def under(replicas: Replicas, prefix: str) -> set[str]:
    return {key for key in replicas.contents.found if key.startswith(prefix)}


def damage(replicas: Replicas, adapter: AdapterId, *, change: Callable[[bytes], bytes]) -> None:
    key = next(key for key in under(replicas, folder_of(adapter)) if key.endswith("adapter_model.safetensors"))
    found = replicas.contents.found[key]
    replicas.contents.found[key] = Found(content=change(found.content), tag=found.tag)


# conditions


def test_a_record_is_replaced_only_by_who_knows_it(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    first = keep(one, ONE, "a")
    two.store.put_blob(TWO.digest(), TWO, manifest_of(TWO))
    with pytest.raises(RecordMoved):
        two.store.write_name(NameRecord(name="a").published(TWO.digest(), ""), replaces=NameRecord(name="a"))
    second = first.published(TWO.digest(), "")
    two.store.write_name(second, replaces=first)
    with pytest.raises(RecordMoved):
        one.store.write_name(first.deleted(), replaces=first)
    assert one.store.read_name("a") == second


def test_a_change_whose_answer_was_lost_is_found_to_be_made(replicas: Replicas) -> None:
    one = replicas.make()
    record = keep(one, ONE, "a")
    one.memory.lost_answers = 1
    one.store.write_name(record.deleted(), replaces=record)
    assert one.store.read_name("a") == record.deleted()
    one.memory.lost_answers = 1
    one.store.write_pins({ONE.digest(): "a"}, replaces={})
    assert one.store.read_pins() == {ONE.digest(): "a"}


def test_pins_are_replaced_only_by_who_knows_them(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    assert one.store.read_pins() == two.store.read_pins() == {}
    one.store.write_pins({ONE.digest(): "a"}, replaces={})
    with pytest.raises(PinsMoved):
        two.store.write_pins({TWO.digest(): "b"}, replaces={})
    assert two.store.read_pins() == {ONE.digest(): "a"}
    two.store.write_pins({}, replaces={ONE.digest(): "a"})
    key = "pins.json"
    replicas.contents.found[key] = Found(content=b"{", tag="x")
    with pytest.raises(SealError):
        one.store.read_pins()
    one.store.write_pins({TWO.digest(): "b"})
    assert two.store.read_pins() == {TWO.digest(): "b"}


# news


def test_who_asked_for_it_is_told_of_every_change_made_here(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    told = list[frozenset[str]]()
    one.store.tell_of_changes(lambda: told.append(two.store.news().names))  # the others can see it by then
    keep(one, ONE, "a")
    keep(two, TWO, "b")
    forget(one, "a")
    assert told == [frozenset({"a"}), frozenset({"a"})]


def test_while_nothing_changes_a_look_is_one_listing(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    keep(one, ONE, "a")
    assert two.store.news() == News(names=frozenset({"a"}), has_pins=True), "the first look lists everything"
    two.memory.acts.clear()
    for _ in range(3):
        assert two.store.news() == NO_NEWS
    assert two.memory.acts == [("tags", "marks/")] * 3
    keep(one, TWO, "b")
    two.memory.acts.clear()
    assert two.store.news() == News(names=frozenset({"b"}))
    assert [act for act, _ in two.memory.acts] == ["tags", "get"]
    one.store.write_pins({ONE.digest(): "a"})
    assert two.store.news() == News(has_pins=True)
    one.store.news()
    assert one.store.news() == NO_NEWS, "of its own changes it knows"


def test_what_a_dying_process_did_not_tell_is_found_by_listing(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    two.store.news()
    one.memory.fault = lambda act, key: KeyboardInterrupt() if (act, key[:6]) == ("put", "marks/") else None
    with pytest.raises(KeyboardInterrupt):
        keep(one, ONE, "a")
    assert two.store.news() == NO_NEWS
    replicas.clock.now_s += RELIST_S
    assert two.store.news().names == {"a"}
    assert two.store.news() == NO_NEWS


def test_a_mark_that_could_not_be_put_is_put_at_the_next_look(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    one.store.news()
    two.store.news()
    one.memory.fault = lambda act, key: away(act, key) if (act, key[:6]) == ("put", "marks/") else None
    keep(one, ONE, "a")
    assert two.store.news() == NO_NEWS
    one.memory.fault = lambda _act, _key: None
    one.store.news()
    assert two.store.news().names == {"a"}


@pytest.mark.parametrize("fails_at", range(4))
def test_news_that_could_not_be_read_are_told_the_next_time(replicas: Replicas, fails_at: int) -> None:
    one, other, two = replicas.make(), replicas.make(), replicas.make()
    two.store.news()
    keep(one, ONE, "a")
    keep(other, TWO, "b")
    two.memory.acts.clear()
    replicas.clock.now_s += RELIST_S * (fails_at == 3)  # then names are listed behind the marks
    two.memory.fault = lambda act, key: away(act, key) if len(two.memory.acts) == fails_at + 1 else None
    with pytest.raises(Unavailable):
        two.store.news()
    assert two.store.news().names == {"a", "b"}


def test_who_missed_more_than_a_mark_holds_lists_everything(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    two.store.news()
    for number in range(70):
        keep(one, ONE, f"a{number}")
    two.memory.acts.clear()
    assert len(two.store.news().names) == 70
    assert ("tags", "names/") in two.memory.acts
    third = replicas.make()
    assert len(third.catalog.list()) == 70
    assert third.store.news().names == frozenset(), "it has just listed them"
    damaged = next(key for key in under(replicas, "marks/") if b"a69" in replicas.contents.found[key].content)
    replicas.contents.found[damaged] = Found(content=b"?", tag="damaged")
    keep(two, TWO, "b")
    assert "b" in third.store.news().names


# out of reach


def test_a_store_that_does_not_answer(replicas: Replicas) -> None:
    one = replicas.make()
    record = keep(one, ONE, "a")
    one.memory.fault = away
    with pytest.raises(Unavailable) as refusal:
        one.store.put_blob(TWO.digest(), TWO, manifest_of(TWO))
    assert refusal.value.retry_after_s is not None
    with pytest.raises(Unavailable):
        one.store.write_name(record.deleted(), replaces=record)
    with pytest.raises(AdapterUnavailable, match="'b'") as of_name:
        one.store.read_name("b")
    with pytest.raises(AdapterUnavailable) as of_files:
        one.store.read_blob(ONE.digest())
    assert not isinstance(of_files.value, AdapterDamaged)
    assert of_name.value.retry_after_s
    assert of_files.value.retry_after_s
    assert one.store.has_blob(ONE.digest()), "this it knows"
    assert one.store.read_manifest(ONE.digest()) == manifest_of(ONE)
    assert one.store.read_manifest(TWO.digest()) is None
    with pytest.raises(Unavailable):
        Replica(one.memory, replicas.clock, replicas.names)
    one.memory.fault = lambda _act, _key: None
    assert one.store.read_blob(ONE.digest()) == ONE


def test_no_room_and_no_rights_are_told_apart(replicas: Replicas) -> None:
    one = replicas.make()
    one.memory.fault = lambda act, _key: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if act == "put" else None
    with pytest.raises(StoreFull):
        one.store.put_blob(ONE.digest(), ONE, manifest_of(ONE))
    one.memory.fault = lambda act, _key: OSError(errno.EACCES, "no") if act.startswith("put") else None
    with pytest.raises(Unavailable, match="may not be written"):
        one.store.put_blob(ONE.digest(), ONE, manifest_of(ONE))
    again = Replica(one.memory, replicas.clock, replicas.names)  # reads what there is
    assert again.store.names() == []


# damage


@pytest.mark.parametrize(
    "change",
    [lambda content: content[:-1], lambda content: content + b"x", lambda content: b"X" + content[1:]],
    ids=["cut short", "too long", "another byte"],
)
def test_damaged_files_are_refused_and_the_same_upload_mends_them(
    replicas: Replicas, change: Callable[[bytes], bytes]
) -> None:
    one, two = replicas.make(), replicas.make()
    keep(one, ONE, "a")
    assert two.store.read_blob(ONE.digest()) == ONE
    damage(replicas, ONE.digest(), change=change)
    for replica in (one, two):
        with pytest.raises(AdapterDamaged):
            replica.store.read_blob(ONE.digest())
        assert not replica.store.has_blob(ONE.digest())
    one.store.put_blob(ONE.digest(), ONE, manifest_of(ONE))
    assert one.store.has_blob(ONE.digest())
    assert one.store.read_blob(ONE.digest()) == two.store.read_blob(ONE.digest()) == ONE
    assert two.store.has_blob(ONE.digest())


def test_a_paper_or_a_record_that_is_damaged(replicas: Replicas) -> None:
    one = replicas.make()
    keep(one, ONE, "a")
    for key in (paper_of(ONE.digest()), key_of("a")):
        found = replicas.contents.found[key]
        replicas.contents.found[key] = replace(found, content=found.content.replace(b"n", b"m"))
    two = replicas.make()
    with pytest.raises(AdapterDamaged):
        two.store.read_blob(ONE.digest())
    assert two.store.read_manifest(ONE.digest()) is None
    with pytest.raises(AdapterUnavailable, match="record in the adapter store is damaged"):
        two.store.read_name("a")
    two.store.put_blob(ONE.digest(), ONE, manifest_of(ONE))
    assert two.store.read_blob(ONE.digest()) == ONE


def test_files_that_were_never_whole_are_no_blob(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    one.memory.fault = lambda act, key: KeyboardInterrupt() if key.endswith("blob.json") and act == "put_new" else None
    with pytest.raises(KeyboardInterrupt):
        one.store.put_blob(ONE.digest(), ONE, manifest_of(ONE))
    assert under(replicas, folder_of(ONE.digest())), "the files are there"
    assert not two.store.has_blob(ONE.digest())
    assert two.store.blob_ids() == []
    with pytest.raises(AdapterDamaged):
        two.store.read_blob(ONE.digest())


# collecting


def look(replica: Replica, replicas: Replicas, after_s: float) -> int:
    replicas.clock.now_s += after_s
    return replica.store.tidy()


def test_what_no_name_stands_for_goes_when_it_was_so_for_the_time_of_grace(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    keep(one, ONE, "a")
    keep(one, TWO, "b")
    forget(one, "a")
    assert look(two, replicas, GRACE_S / 2) == 0  # the first look
    assert look(two, replicas, GRACE_S / 2) == 0
    assert look(one, replicas, 0) == 0, "it has not looked for long enough"
    assert two.store.read_blob(ONE.digest()) == ONE
    assert look(two, replicas, GRACE_S / 2) == 1
    assert under(replicas, folder_of(ONE.digest())) == {paper_of(ONE.digest())}
    assert two.store.blob_ids() == [TWO.digest()]
    assert two.store.read_blob(TWO.digest()) == TWO
    assert look(one, replicas, GRACE_S) == 0
    keep(one, ONE, "again")
    assert two.store.read_blob(ONE.digest()) == ONE, "an upload brings it back"


def test_an_upload_of_the_same_files_saves_them(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    keep(one, ONE, "a")
    forget(one, "a")
    look(two, replicas, GRACE_S / 2)
    replicas.clock.now_s += GRACE_S - 1
    one.store.put_blob(ONE.digest(), ONE, manifest_of(ONE))  # renews the paper, and names it later
    assert look(two, replicas, 1) == 0
    before = one.store.read_name("b")
    one.store.write_name(before.published(ONE.digest(), ""), replaces=before)
    assert look(two, replicas, GRACE_S) == 0
    assert look(two, replicas, GRACE_S) == 0
    assert two.store.read_blob(ONE.digest()) == ONE


def test_an_upload_while_it_is_being_collected() -> None:
    """At each act of the collector another process uploads the very files and names them: they are there afterwards."""
    number = 0
    while upload_during_collection(Replicas(), number):
        number += 1
    assert number > 5, "the collector acted as often"


def once_at(bucket: MemoryBucket, number: int, act: Callable[[], object]) -> list[object]:
    """Have something done by somebody else before the n-th act of a bucket; what came of it is put into the list."""
    done: list[object] = []
    bucket.acts.clear()

    def before(_act: str, _key: str) -> None:
        if len(bucket.acts) == number + 1 and not done:
            done.append(None)
            done.append(act())

    bucket.before = before
    return done


def upload_during_collection(place: Replicas, number: int) -> bool:
    one, two = place.make(), place.make()
    keep(one, ONE, "a")
    forget(one, "a")
    look(two, place, GRACE_S / 2)
    done = once_at(two.memory, number, lambda: keep(one, ONE, "new"))
    look(two, place, GRACE_S)
    if not done:
        return False
    assert two.store.read_blob(ONE.digest()) == one.store.read_blob(ONE.digest()) == ONE, number
    look(two, place, GRACE_S)
    look(two, place, GRACE_S)
    assert two.store.read_blob(ONE.digest()) == ONE, number
    return True


def test_a_collection_at_each_act_of_an_upload() -> None:
    number = 0
    while collection_during_upload(Replicas(), number):
        number += 1
    assert number > 5, "the upload acted as often"


def collection_during_upload(place: Replicas, number: int) -> bool:
    one, two = place.make(), place.make()
    keep(one, ONE, "a")
    forget(one, "a")
    look(two, place, GRACE_S / 2)
    done = once_at(one.memory, number, lambda: look(two, place, GRACE_S))
    try:
        keep(one, ONE, "new")
    except Unavailable:
        keep(one, ONE, "new")  # it took as long as the time of grace: nothing was acknowledged
    if not done:
        return False
    assert two.store.read_name("new").ids == {ONE.digest()}
    assert two.store.read_blob(ONE.digest()) == ONE, number
    return True


def test_what_broke_off_and_marks_of_processes_that_are_gone_are_collected(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    keep(two, TWO, "b")
    one.memory.fault = lambda act, key: KeyboardInterrupt() if key.endswith("blob.json") and act == "put_new" else None
    with pytest.raises(KeyboardInterrupt):
        one.store.put_blob(ONE.digest(), ONE, manifest_of(ONE))
    damage(replicas, TWO.digest(), change=lambda content: content[1:])
    two.store.put_blob(TWO.digest(), TWO, manifest_of(TWO))
    assert len(under(replicas, folder_of(TWO.digest()))) > 3, "the damaged files and the new ones"
    assert len(under(replicas, "marks/")) == 2
    look(two, replicas, GRACE_S / 2)
    assert under(replicas, folder_of(ONE.digest()))
    look(two, replicas, GRACE_S)
    assert under(replicas, folder_of(ONE.digest())) == set()
    assert len(under(replicas, folder_of(TWO.digest()))) == 3
    assert under(replicas, "marks/") == set(), "nobody changed anything for as long; the next change puts it again"
    assert two.store.read_blob(TWO.digest()) == TWO
    one.memory.fault = lambda _act, _key: None
    keep(one, ONE, "a")
    assert two.store.news().names >= {"a"}


def test_a_record_that_cannot_be_read_keeps_everything(replicas: Replicas) -> None:
    one = replicas.make()
    keep(one, ONE, "a")
    keep(one, TWO, "b")
    forget(one, "a")
    found = replicas.contents.found[key_of("b")]
    replicas.contents.found[key_of("b")] = Found(content=found.content[1:], tag="damaged")
    two = replicas.make()
    for _ in range(3):
        with pytest.raises(AdapterUnavailable):
            look(two, replicas, GRACE_S)
    assert two.store.read_blob(ONE.digest()) == ONE


def test_an_upload_that_takes_too_long_is_refused_before_a_name_stands_for_it(replicas: Replicas) -> None:
    one, two = replicas.make(), replicas.make()
    before = one.store.read_name("a")
    one.store.put_blob(ONE.digest(), ONE, manifest_of(ONE))
    look(two, replicas, GRACE_S / 2)
    look(two, replicas, GRACE_S)  # it is collected while it is tried out
    with pytest.raises(Unavailable, match="took so long"):
        one.store.write_name(before.published(ONE.digest(), ""), replaces=before)
    assert two.store.read_name("a") == before
