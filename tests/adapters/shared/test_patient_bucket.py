"""A bucket that says nothing: who waits for it, who is told at once, and that it is asked again."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from peft_serve.adapters.shared.bucket import Bucket, Oversize
from peft_serve.adapters.shared.patient_bucket import REST_S, PatientBucket
from tests.adapters.shared.shared_fakes import Clock, Contents, MemoryBucket

KEY = "names/a.json"
WAIT_S = 5.0  # of an act that has no answer

ACTS: list[Callable[[Bucket], object]] = [
    lambda bucket: bucket.get(KEY, max_bytes=9),
    lambda bucket: bucket.put("marks/a.json", b"1"),
    lambda bucket: bucket.put_new(KEY, b"1"),
    lambda bucket: bucket.replace(KEY, b"1", "1"),
    lambda bucket: bucket.tags("names/"),
    lambda bucket: bucket.remove(KEY),
    lambda bucket: bucket.require_room(1),
    lambda bucket: bucket.tidy(),
]


class Silent:
    """A bucket whose acts take time, and then fail, from `is_silent` on."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.memory = MemoryBucket(Contents())
        self.memory.fault = self.fault
        self.bucket = PatientBucket(self.memory, clock=self.clock)
        self.number: int | None = None

    def fault(self, _act: str, _key: str) -> OSError | None:
        if self.number is None:
            return None
        self.clock.now_s += WAIT_S
        return OSError(self.number, os.strerror(self.number))


@pytest.fixture
def silent() -> Silent:
    return Silent()


def test_while_it_says_nothing_one_act_waits_and_the_rest_are_told_at_once(silent: Silent) -> None:
    silent.number = errno.ETIMEDOUT
    for act in ACTS * 5:
        with pytest.raises(OSError, match="timed out") as raised:
            act(silent.bucket)
        assert raised.value.errno == errno.ETIMEDOUT
    assert len(silent.memory.acts) == 1
    assert silent.clock.now_s == 1000.0 + WAIT_S
    silent.clock.now_s += REST_S
    with pytest.raises(OSError, match="timed out"):
        silent.bucket.tags("names/")
    assert len(silent.memory.acts) == 2, "it is asked again"


@pytest.mark.parametrize("act", ACTS)
def test_any_act_that_is_answered_lets_everybody_in_again(silent: Silent, act: Callable[[Bucket], object]) -> None:
    silent.number = errno.EHOSTUNREACH
    with pytest.raises(OSError, match="No route"):
        silent.bucket.tags("names/")
    silent.number = None
    silent.clock.now_s += REST_S
    act(silent.bucket)
    for each in ACTS:
        each(silent.bucket)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_who_answers_no_has_answered(silent: Silent, number: int) -> None:
    silent.number = number
    for act in ACTS:
        with pytest.raises(OSError, match=os.strerror(number)) as raised:
            act(silent.bucket)
        assert raised.value.errno == number
    assert len(silent.memory.acts) == len(ACTS)


def test_what_is_too_large_has_been_answered(silent: Silent) -> None:
    silent.memory.put(KEY, b"larger")
    with pytest.raises(Oversize):
        silent.bucket.get(KEY, max_bytes=1)
    assert silent.bucket.get(KEY, max_bytes=9) is not None


def test_only_one_tries_at_a_time(silent: Silent) -> None:
    silent.number = errno.ETIMEDOUT
    with pytest.raises(OSError, match="timed out"):
        silent.bucket.tidy()
    silent.clock.now_s += REST_S
    waits, may_end = threading.Event(), threading.Event()

    def before(_act: str, _key: str) -> None:
        waits.set()
        assert may_end.wait(20), "the test is over"

    silent.memory.before = before
    silent.number = None
    with ThreadPoolExecutor(1) as pool:
        trying = pool.submit(silent.bucket.tags, "names/")
        assert waits.wait(20)
        for act in ACTS:
            with pytest.raises(OSError, match="timed out"):
                act(silent.bucket)
        may_end.set()
        assert trying.result(20) == {}
    assert silent.bucket.tags("names/") == {}
