"""The cache trace, and who else is told of lookups."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from peft_serve.adapters.load_costs import LoadCosts
from peft_serve.adapters.lookups import Lookup
from peft_serve.core import AdapterId
from peft_serve.engine.cache_figures import CacheFigures
from peft_serve.engine.cache_trace import CacheTrace, appender
from peft_serve.metrics import Metrics

A = AdapterId("sha256:a")
SEATED = Lookup(tier="device", adapter=A, is_hit=False, num_bytes=64)
FOUND = Lookup(tier="device", adapter=A, is_hit=True, num_bytes=64)
READ = Lookup(tier="disk", adapter=A, is_hit=True, num_bytes=64, load_s=0.25)
BROKEN = Lookup(tier="disk", adapter=A, is_hit=False, load_s=0.5)


class Sink:
    """A file that can be stuck, or full."""

    def __init__(self) -> None:
        self.text = ""
        self.error: OSError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, text: str) -> None:
        self.entered.release()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.text += text


def started(sink: Sink, **options: int) -> CacheTrace:
    trace = CacheTrace(sink, now=lambda: 12.3456789, **options)
    trace.start()
    return trace


def test_a_lookup_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = CacheTrace(appender(path), now=lambda: 12.3456789)
    trace.start()
    trace.note(SEATED)
    trace.note(READ)
    trace.stop()
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"time": 12.345679, "tier": "device", "adapter": A, "hit": False, "bytes": 64, "load_s": None}
    assert (second["tier"], second["load_s"]) == ("disk", 0.25)


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--cache-trace .*cannot be written.*name another file"):
        appender(tmp_path / "no" / "folder")


def test_who_asks_never_waits_and_what_does_not_fit_is_counted() -> None:
    sink = Sink()
    sink.gate.clear()
    trace = started(sink, max_waiting=4)
    trace.note(SEATED)
    assert sink.entered.acquire(timeout=10), "the writer is stuck with the first line"
    for _ in range(10):
        trace.note(FOUND)
    assert trace.num_lost == 6
    sink.gate.set()
    trace.stop()
    assert sink.text.count("\n") == 5


def test_a_trace_ends_at_its_number_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    trace = started(sink, max_lines=3)
    for _ in range(8):
        trace.note(FOUND)
    trace.stop()
    assert sink.text.count("\n") == 3
    assert caplog.text.count("the cache trace is full") == 1


def test_a_full_disk_ends_the_trace_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    sink.error = OSError("no space left")
    trace = started(sink)
    trace.note(FOUND)
    assert sink.entered.acquire(timeout=10)
    while "the cache trace ends" not in caplog.text:
        time.sleep(0.001)
    sink.error = None
    trace.note(FOUND)
    trace.stop()
    assert sink.text == ""


def test_lookups_are_counted_measured_and_written_down() -> None:
    metrics, costs, sink = Metrics(), LoadCosts(), Sink()
    trace = started(sink)
    figures = CacheFigures(metrics, costs, trace)
    for lookup in (SEATED, FOUND, FOUND, READ, BROKEN):
        figures.looked_up(lookup)
    figures.evicted_from_host()
    trace.stop()
    page = metrics.render().decode()
    for line in (
        'peft_serve_adapter_cache_hits_total{tier="device"} 2.0',
        'peft_serve_adapter_cache_misses_total{tier="device"} 1.0',
        'peft_serve_adapter_cache_hits_total{tier="disk"} 1.0',
        'peft_serve_adapter_cache_misses_total{tier="disk"} 1.0',
        'peft_serve_adapter_cache_loaded_bytes_total{tier="device"} 64.0',
        'peft_serve_adapter_cache_loaded_bytes_total{tier="host"} 64.0',
        'peft_serve_adapter_evictions_total{tier="host"} 1.0',
        'peft_serve_adapter_load_seconds_sum{tier="host"} 0.75',
    ):
        assert line in page.splitlines()
    assert costs.seconds(A, 64) == 0.25, "a load that failed says nothing about one that does not"
    assert sink.text.count("\n") == 5
