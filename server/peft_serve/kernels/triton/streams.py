"""The order of what a device is asked to do: streams run side by side, and one may be told to wait for others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Streams:
    """The streams of one device. A CPU has none: what it is asked to do is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> torch.cuda.Stream | None:
        """Where the next kernel or copy goes."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def wait_for(self, others: Iterable[torch.cuda.Stream]) -> None:
        """What the current stream is asked from now on comes behind all that the others were asked by now. The host
        does not wait."""
        here = self.current()
        for other in others:
            if here is not None and other != here:
                here.wait_stream(other)

    def outlives(self, memory: Tensor, stream: torch.cuda.Stream) -> None:
        """Torch is to keep freed memory until the stream is done with what it was asked by then."""
        memory.record_stream(stream)
