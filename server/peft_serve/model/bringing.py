"""Numbers on their way from the device to the host: all of a step's in one copy, which is waited for once.

The host has to wait for a GPU to read anything from it, and each wait leaves the GPU idle until the host has asked it
for more. So whoever wants numbers says which, and reads them when everybody's have come. What the host has to do anyway
it does while it waits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Coming:
    """Numbers that are on their way."""

    def __init__(self, given: Tensor) -> None:
        self.given = given
        self._numbers: list[float] | None = None

    def arrive(self, numbers: list[float]) -> None:
        """They are these."""
        self._numbers = numbers

    @property
    def numbers(self) -> list[float]:
        """In the order of the tensor's elements; whole numbers up to 2^53 are exact."""
        assert self._numbers is not None, "read behind `bring`"
        return self._numbers

    def rows(self) -> list[list[float]]:
        """By the first axis of the tensor."""
        num_rows, numbers = len(self.given), self.numbers
        width = len(numbers) // num_rows if num_rows else 0
        return [numbers[row * width : (row + 1) * width] for row in range(num_rows)]


class Bringing:
    """What a step has to bring to the host."""

    def __init__(self) -> None:
        self._each: list[Coming] = []

    def add(self, given: Tensor) -> Coming:
        """Numbers that somebody wants to read."""
        self._each.append(Coming(given))
        return self._each[-1]

    def bring(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for all of them: once, or not at all where nobody wants any. `meanwhile` is called in between, when
        everything has been asked of the device, unless there is nothing to wait for."""
        flat = [each.given.double().flatten() for each in self._each]
        if not flat:
            return
        numbers = _brought(flat[0] if len(flat) == 1 else torch.cat(flat), meanwhile)
        at = 0
        for each in self._each:
            each.arrive(numbers[at : at + each.given.numel()])
            at += each.given.numel()
        self._each.clear()


def _brought(given_N: Tensor, meanwhile: Callable[[], None]) -> list[float]:
    """The numbers, waited for behind `meanwhile`."""
    if given_N.device.type != "cuda":
        meanwhile()
        return given_N.tolist()
    here_N = torch.empty(given_N.shape, dtype=given_N.dtype, pin_memory=True)  # else the copy itself would wait
    here_N.copy_(given_N, non_blocking=True)
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record(torch.cuda.current_stream(given_N.device))
    meanwhile()
    there.synchronize()
    return here_N.tolist()
