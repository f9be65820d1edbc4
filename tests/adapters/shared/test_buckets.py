"""What every bucket keeps to: a folder, an object store behind a real server, and the one in memory that tests use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from obstore.store import S3Store

from peft_serve.adapters.shared.bucket import Bucket, Oversize
from peft_serve.adapters.shared.object_bucket import ObjectBucket, open_objects
from tests.adapters.shared.object_services import object_service
from tests.adapters.shared.shared_fakes import (
    Clock,
    Contents,
    MemoryBucket,
    Names,
    Replica,
    folder_bucket,
    object_bucket,
)
from tests.adapters.store.store_fakes import checkpoint

MANY = 1 << 20


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server that speaks S3, with the bucket `bucket`."""
    with object_service() as address:
        yield address


Make = Callable[[], Bucket]


@pytest.fixture(params=["memory", "folder", "objects"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Gives one more process's bucket over the same place."""
    contents, clock, names = Contents(), Clock(), Names()
    if request.param == "memory":
        return lambda: MemoryBucket(contents)
    if request.param == "folder":
        return lambda: folder_bucket(tmp_path / "place", clock, names)
    address, prefix = request.getfixturevalue("endpoint"), f"{tmp_path.name}/deeper"
    return lambda: object_bucket(address, prefix)


def content_of(bucket: Bucket, key: str) -> bytes | None:
    found = bucket.get(key, max_bytes=MANY)
    return None if found is None else found.content


def test_conditions_hold_between_two_processes(make: Make) -> None:
    one, two = make(), make()
    assert one.get("names/a.json", max_bytes=MANY) is None
    assert one.replace("names/a.json", b"0", "1") is None
    first = one.put_new("names/a.json", b"1")
    assert first is not None
    assert two.put_new("names/a.json", b"2") is None
    assert content_of(two, "names/a.json") == b"1"
    second = two.replace("names/a.json", b"2", first)
    assert second not in (None, first)
    assert one.replace("names/a.json", b"3", first) is None, "another was there first"
    found = one.get("names/a.json", max_bytes=MANY)
    assert found is not None
    assert (found.content, found.tag) == (b"2", second)
    third = one.replace("names/a.json", b"3", found.tag)
    assert content_of(two, "names/a.json") == b"3"
    assert two.tags("names/") == {"names/a.json": third}


def test_listing_removing_and_limits(make: Make) -> None:
    one, two = make(), make()
    for key in ("blobs/sha256/0a/p1/a.json", "blobs/sha256/0a/blob.json", "blobs/sha256/0b/p2/a.json", "pins.json"):
        assert one.put_new(key, b"x" * 10) is not None
    assert set(two.tags("blobs/sha256/")) == {
        "blobs/sha256/0a/p1/a.json",
        "blobs/sha256/0a/blob.json",
        "blobs/sha256/0b/p2/a.json",
    }
    assert two.tags("names/") == {}
    two.remove("blobs/sha256/0a/p1/")
    two.remove("blobs/sha256/0b/p2/a.json")
    two.remove("blobs/sha256/0c/none.json")
    two.remove("blobs/sha256/0c/")
    assert set(one.tags("blobs/sha256/")) == {"blobs/sha256/0a/blob.json"}
    assert content_of(one, "blobs/sha256/0a/p1/a.json") is None
    assert content_of(one, "blobs/sha256/0b/p2/a.json") is None
    with pytest.raises(Oversize):
        one.get("pins.json", max_bytes=9)
    assert one.get("pins.json", max_bytes=10) is not None
    one.tidy()
    one.require_room(1)


def test_its_own_key_is_put_over_and_has_another_tag(make: Make) -> None:
    one, two = make(), make()
    tags = []
    for number in range(4):
        one.put("marks/w.json", b"%d" % number)
        assert content_of(two, "marks/w.json") == b"%d" % number
        tags.append(two.tags("marks/")["marks/w.json"])
    assert len(set(tags)) == 4
    two.remove("marks/w.json")
    one.put("marks/w.json", b"4")
    assert two.tags("marks/")["marks/w.json"] not in tags, "who saw an earlier one sees that it is another"


def test_of_many_who_replace_one_does(make: Make, request: pytest.FixtureRequest) -> None:
    num_threads, num_rounds = 4, 2 if "objects" in request.node.name else 8
    buckets = [make() for _ in range(num_threads)]
    assert buckets[0].put_new("names/n.json", b"0") is not None
    done = [0] * num_threads

    def count(number: int) -> None:
        while done[number] < num_rounds:
            found = buckets[number].get("names/n.json", max_bytes=MANY)
            assert found is not None
            following = b"%d" % (int(found.content) + 1)
            done[number] += buckets[number].replace("names/n.json", following, found.tag) is not None

    threads = [threading.Thread(target=count, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert content_of(buckets[0], "names/n.json") == b"%d" % (num_threads * num_rounds)


def test_of_many_who_put_the_first_one_does(make: Make) -> None:
    buckets = [make() for _ in range(3)]
    tags: list[str | None] = []
    threads = [
        threading.Thread(target=lambda each=bucket: tags.append(each.put_new("names/n.json", b"1")))
        for bucket in buckets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(tag is not None for tag in tags) == 1


def test_two_servers_over_a_real_object_store(endpoint: str) -> None:
    clock, names = Clock(), Names()
    one, two = (Replica(object_bucket(endpoint, "two-servers"), clock, names) for _ in range(2))
    files = checkpoint(1)
    one.catalog.changes.publish("A.b", files)
    two.catalog.follow()
    assert two.catalog.resolve("A.b").number == 1
    assert two.catalog.files(files.digest()) == files
    assert two.catalog.changes.publish("A.b", checkpoint(2)).version.number == 2
    one.catalog.follow()
    assert one.catalog.resolve("A.b").id == checkpoint(2).digest()
    one.catalog.pins.add(files.digest(), "A.b")
    assert two.catalog.follow().pinned == {files.digest(): "A.b"}
    one.catalog.changes.delete("A.b")
    assert two.catalog.follow().gone == {files.digest(), checkpoint(2).digest()}
    assert one.catalog.list() == two.catalog.list() == ()


def test_an_object_store_that_is_not_there_or_says_no(endpoint: str) -> None:
    gone = object_bucket("http://127.0.0.1:9", "x")
    with pytest.raises(OSError, match="nothing listens"):
        gone.get("pins.json", max_bytes=1)
    with pytest.raises(OSError, match="nothing listens"):
        gone.tags("names/")
    nowhere = S3Store(
        "another", endpoint=endpoint, access_key_id="k", secret_access_key="s", client_options={"allow_http": True}
    )
    with pytest.raises(OSError, match="no such bucket"):
        ObjectBucket(nowhere).put("pins.json", b"1")


def test_places_that_are_none() -> None:
    for url in ("s3://", "s3:///x", "s3://bucket/a/../b"):
        with pytest.raises(ValueError, match="s3://bucket/prefix"):
            open_objects(url)
    assert open_objects("s3://bucket/a/b/").prefix == "a/b"
    assert open_objects("s3://bucket").prefix is None
