"""How soon an upload to one server is there on another that only looks: in a folder and in an object store, by a clock
that passes with every look and with every act on the store."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_serve.adapters.shared.bucket import Bucket
from peft_serve.adapters.shared.store import RELIST_S
from peft_serve.config import Settings
from peft_serve.engine.following import StoreFollower
from tests.adapters.shared.object_services import object_service
from tests.adapters.shared.shared_fakes import Clock, Names, Replica, folder_bucket, object_bucket
from tests.adapters.store.store_fakes import checkpoint
from tests.engine.test_following import Memory

NUM_UPLOADS = 20
ACT_S = 0.05  # what an act on the store takes; S3 is said to take some 20 to 100 ms
WITHIN_S = 2.0


class TimedBucket:
    """Each act on `bucket` takes its time. `after_listing` is done when marks have been listed, and once."""

    def __init__(self, bucket: Bucket, clock: Clock) -> None:
        self._bucket = bucket
        self._clock = clock
        self.after_listing: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Callable[..., object]:
        act = getattr(self._bucket, name)

        def timed(*args: object, **kwargs: object) -> object:
            self._clock.now_s += ACT_S
            found: object = act(*args, **kwargs)
            if (name, args) == ("tags", ("marks/",)) and self.after_listing is not None:
                upload, self.after_listing = self.after_listing, None
                upload()
            return found

        return timed


@pytest.fixture(params=["folder", "objects"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Clock, Names], Bucket]]:
    if request.param == "folder":
        yield lambda clock, names: folder_bucket(tmp_path, clock, names)
        return
    with object_service() as address:
        yield lambda _clock, _names: object_bucket(address, tmp_path.name)


def test_an_upload_is_seen_on_the_other_server_within_two_seconds_by_looking_alone(
    make: Callable[[Clock, Names], Bucket],
) -> None:
    """Half of them come at any time between two looks, half just after the listing of one, which is the worst."""
    clock, names, rng = Clock(), Names(), random.Random(7)
    one = Replica(make(clock, names), clock, names)
    slow = TimedBucket(make(clock, names), clock)
    two = Replica(slow, clock, names)  # type: ignore[arg-type]
    poll_s = Settings().store_poll_s
    follower = StoreFollower(two.catalog, Memory(), poll_s=poll_s, draw=rng.random)  # type: ignore[arg-type]
    follower.look()
    clock.now_s += RELIST_S / 2  # so that no listing of all names helps
    took_s: list[float] = []
    for number in range(1, NUM_UPLOADS + 1):
        told_s: list[float] = []

        def upload(number: int = number, told_s: list[float] = told_s) -> None:
            published = one.catalog.changes.publish(f"a{number % 3}", checkpoint(number))
            assert published.created
            told_s.append(clock.now_s)

        if number % 2:
            slow.after_listing = upload
            follower.look()
            clock.now_s += follower.delay_s()
        else:
            delay_s = follower.delay_s()
            before_s = delay_s * rng.random()
            clock.now_s += before_s
            upload()
            clock.now_s += delay_s - before_s
        assert follower.look()
        assert two.catalog.resolve(f"a{number % 3}").id == checkpoint(number).digest()
        took_s.append(clock.now_s - told_s[0])
    print(f"{NUM_UPLOADS} uploads, the last seen after {max(took_s):.2f} s")
    assert len(took_s) == NUM_UPLOADS
    assert max(took_s) < WITHIN_S, took_s
    assert max(took_s) > poll_s, "the worst was tried"
