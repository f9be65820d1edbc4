"""Errands are done in order, on one thread that goes when they are done, whatever one of them raises."""

from __future__ import annotations

import logging
import threading

import pytest

from peft_serve.adapters.errands import Errands


def test_errands_are_done_in_order_and_a_failing_one_alone_fails(caplog: pytest.LogCaptureFixture) -> None:
    done: list[object] = []
    errands = Errands(name="test", on_thread_start=lambda: done.append("start"))

    def fail() -> None:
        raise ValueError("on purpose")

    with caplog.at_level(logging.ERROR):
        gate = threading.Event()
        errands.put(lambda: done.append(gate.wait(10)))
        errands.put(fail)
        errands.put(lambda: done.append(threading.current_thread().name))
        assert not errands.settle(0.01)
        gate.set()
        assert errands.settle(10)
    assert done == ["start", True, "test"]
    assert "on purpose" in caplog.text


def test_there_is_no_thread_when_there_is_nothing_to_do() -> None:
    threads: list[threading.Thread] = []
    errands = Errands(name="test")
    for _ in range(2):
        errands.put(lambda: threads.append(threading.current_thread()))
        assert errands.settle(10)
        threads[-1].join(10)
        assert not threads[-1].is_alive()
    assert threads[0] is not threads[1]
    assert errands.settle(0)
