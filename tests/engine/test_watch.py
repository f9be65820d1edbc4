"""A base that changes is noticed once, and an unchanged one is left alone."""

from __future__ import annotations

import threading

from peft_serve.engine.watch import BaseWatch
from peft_serve.metrics import Metrics


def test_a_changed_base_closes_admission_and_shows_in_the_metrics() -> None:
    answers, metrics, changed = [True, True, False], Metrics(), threading.Event()
    watch = BaseWatch(lambda: answers.pop(0), changed.set, metrics, interval_s=0.001)
    watch.start()
    assert changed.wait(5)
    watch.stop()
    assert answers == []
    assert b"peft_serve_base_fingerprint_ok 0.0" in metrics.render()


def test_an_unchanged_base_goes_on() -> None:
    seen, metrics = threading.Event(), Metrics()
    watch = BaseWatch(lambda: seen.set() or True, lambda: None, metrics, interval_s=0.001)  # type: ignore[func-returns-value]
    watch.start()
    assert seen.wait(5)
    watch.stop()
    assert b"peft_serve_base_fingerprint_ok 1.0" in metrics.render()


def test_a_look_that_fails_says_nothing_and_the_next_one_tells() -> None:
    looks, metrics, changed = iter((MemoryError(), True, False)), Metrics(), threading.Event()

    def check() -> bool:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    watch = BaseWatch(check, changed.set, metrics, interval_s=0.001)
    watch.start()
    assert changed.wait(5)
    watch.stop()
    assert next(looks, None) is None
