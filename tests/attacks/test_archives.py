"""Hostile archives: refused in little time and memory, or harmless; none of them writes or opens anything."""

from __future__ import annotations

import codecs
import time
import tracemalloc

import pytest

from peft_serve.adapters.archive import read_upload
from peft_serve.adapters.members import UploadLimits
from peft_serve.errors import MalformedUpload, PayloadTooLarge
from tests.attacks.archives import BOMBS, CONFIG, HARMLESS, REFUSED, WEIGHTS
from tests.attacks.opened import outside, watch

LIMITS = UploadLimits(max_bytes=64 << 20)
codecs.lookup("cp437")  # of old names: Python loads it when it is first asked for


def test_there_are_enough() -> None:
    assert len(REFUSED) + len(BOMBS) + len(HARMLESS) >= 60


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    content = REFUSED[case]()
    started = time.thread_time()
    with watch().watching() as heard, pytest.raises((MalformedUpload, PayloadTooLarge)) as refusal:
        read_upload(content, "application/octet-stream", limits=LIMITS)
    assert time.thread_time() - started < 2
    assert refusal.value.message.isprintable()
    assert len(refusal.value.message) < 600
    assert not outside(heard)


@pytest.mark.parametrize("case", BOMBS)
def test_bomb(case: str) -> None:
    content = BOMBS[case]()
    assert len(content) < 3 << 20
    tracemalloc.start()
    try:
        with pytest.raises((MalformedUpload, PayloadTooLarge)):
            read_upload(content, None, limits=LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless(case: str) -> None:
    with watch().watching() as heard:
        files = read_upload(HARMLESS[case](), None, limits=LIMITS)
    assert (files.config, files.weights, files.profile) == (CONFIG, WEIGHTS, None)
    assert all(name.isascii() and name.isprintable() for name in files.ignored)
    assert not outside(heard)


@pytest.mark.parametrize(
    ("case", "way_out"),
    [
        ("pickle for weights", "safe_serialization=True"),
        ("torch.save for weights", "safe_serialization=True"),
        ("pickle beside the config", "safe_serialization=True"),
        ("zip: two adapters", "one checkpoint"),
        ("tar: symbolic link", "dereference"),
        ("zip: encrypted", "without a password"),
        ("tar: names without an end", "1048576 for all; use plain tar"),
        ("tar: pax records without an end", "1048576 for all; use plain tar"),
    ],
)
def test_the_way_out_is_told(case: str, way_out: str) -> None:
    with pytest.raises(MalformedUpload, match=way_out):
        read_upload(REFUSED[case](), None, limits=LIMITS)


def test_time_grows_with_the_size_alone() -> None:
    """Sixteen megabytes of a name, or of empty streams, take no longer than they take to be copied."""
    for make in (REFUSED["gzip: a name without an end"], REFUSED["gzip: nothing, many times"]):
        content = make()
        content *= 4
        started = time.thread_time()
        with pytest.raises(MalformedUpload):
            read_upload(content, None, limits=LIMITS)
        assert time.thread_time() - started < 1
