"""The wire from the host's memory to the device's: copies that nobody waits for, and marks that say how far they are.

Copies go side by side with the kernels of passes, in an order of their own. A mark stands behind the copies asked for
before it; who reads what they bring has the device wait for the mark, and the host goes on. The seam at which tests put
a wire that is slow on purpose.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

_PARTS_OF_RING: Final = 8
_LEAST_RING: Final = 1 << 16  # bytes: one smaller is not worth its copies


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """A point between two copies; `event` is the device's own for it."""

    number: int
    event: torch.cuda.Event | None = None


class Wire(Protocol):
    """One thread at a time."""

    def begin(self) -> None:
        """Copies from now on come behind all that the device was asked for by now: it may still read what they
        overwrite."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Bring a tensor of the host to where it is to lie, in one stretch. The host may do as it likes with the source
        afterwards."""
        ...

    def mark(self) -> Mark:
        """Behind the copies up to now."""
        ...

    def wait(self, mark: Mark) -> None:
        """What the device is asked for from now on comes behind the mark. The host does not wait."""
        ...


class DirectWire:
    """Copies at once, in the order of everything else: on a CPU, and where no memory can be pinned."""

    def __init__(self) -> None:
        self._mark = Mark(0)

    def begin(self) -> None:
        """There is one order."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Mark:
        return self._mark

    def wait(self, mark: Mark) -> None:
        """It is there."""


class Ring:
    """Host memory that the device reads by itself, used round and round: a tensor is put there and copied from there.

    `mark` gives a mark behind the copies asked for up to now, `settle` has the host wait until it is passed: only where
    the ring has come round to what is still being read.
    """

    def __init__(self, memory: Tensor, *, mark: Callable[[], Mark], settle: Callable[[Mark], None]) -> None:
        self.part_bytes = memory.nbytes // _PARTS_OF_RING
        assert self.part_bytes > 0, "a ring has room for something"
        self._parts = deque(torch.split(memory[: _PARTS_OF_RING * self.part_bytes], self.part_bytes))
        self._marks: deque[Mark | None] = deque([None] * _PARTS_OF_RING)
        self._at = 0
        self._mark = mark
        self._settle = settle

    def staged(self, source_N: Tensor) -> Tensor:
        """A copy of a line of numbers, no longer than `part_bytes`, to be copied from before the next is staged."""
        num_bytes = source_N.nbytes
        assert num_bytes <= self.part_bytes, "a line fits a part of the ring"
        if self._at + num_bytes > self.part_bytes:
            self._turn()
        here = self._parts[0][self._at : self._at + num_bytes].view(source_N.dtype)
        self._at += -(-num_bytes // 16) * 16
        return here.copy_(source_N)

    def _turn(self) -> None:
        """On to the part that was used longest ago."""
        self._marks[0] = self._mark()
        self._parts.rotate(-1)
        self._marks.rotate(-1)
        if self._marks[0] is not None:
            self._settle(self._marks[0])
        self._at = 0


class StreamWire:
    """A stream of its own on a CUDA device, and a ring of pinned memory."""

    def __init__(self, device: torch.device, *, pinned_bytes: int) -> None:
        """Raises what torch raises where so much memory cannot be pinned."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._num_marks = self._num_waited = 0
        pinned = torch.empty(pinned_bytes, dtype=torch.uint8, pin_memory=True)
        self._ring = Ring(pinned, mark=self.mark, settle=_settle)

    def begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        line, given = target.view(-1), source.to(target.dtype).reshape(-1)
        size = self._ring.part_bytes // target.element_size()
        for here, from_there in zip(torch.split(line, size), torch.split(given, size), strict=True):
            staged = from_there if from_there.is_pinned() else self._ring.staged(from_there)
            with torch.cuda.stream(self._stream):
                here.copy_(staged, non_blocking=True)

    def mark(self) -> Mark:
        self._num_marks += 1
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return Mark(self._num_marks, event)

    def wait(self, mark: Mark) -> None:
        """On the stream that is the current one whenever this is called: passes have one."""
        if mark.number > self._num_waited and mark.event is not None:
            torch.cuda.current_stream(self._device).wait_event(mark.event)
            self._num_waited = mark.number


def _settle(mark: Mark) -> None:
    assert mark.event is not None, "a stream's marks have events"
    mark.event.synchronize()


def wire_to(device: torch.device, *, pinned_bytes: int, say: Callable[[str], None]) -> Wire:
    """The wire to a device, with so much pinned memory at most; 0: without any, and then the host waits for copies."""
    if device.type != "cuda" or pinned_bytes < _LEAST_RING:
        return DirectWire()
    try:
        return StreamWire(device, pinned_bytes=pinned_bytes)
    except (RuntimeError, MemoryError) as error:
        say(f"{pinned_bytes} bytes cannot be pinned ({type(error).__name__}): adapters are copied while steps wait")
        return DirectWire()
