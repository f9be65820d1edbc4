"""CUDA graphs: a pass that is recorded once, and asked of the device again in one call.

All graphs share one pool of memory: one is replayed at a time, and what a pass computes is read before the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import torch

_WARM_UPS: Final = 2  # kernels are compiled and layers that share inputs are found in the first, all is there by then


@dataclass(frozen=True, slots=True, eq=False)
class CudaReplay:
    """A recorded pass."""

    graph: torch.cuda.CUDAGraph
    num_bytes: int

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Records on a stream of its own. Other threads may use the device meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, act: Callable[[], None]) -> CudaReplay:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            try:
                for _ in range(_WARM_UPS):
                    act()
                self._stream.synchronize()
                free_before, _ = torch.cuda.mem_get_info(self._device)
                graph = self._captured(act)
            finally:
                current.wait_stream(self._stream)
        free, _ = torch.cuda.mem_get_info(self._device)
        return CudaReplay(graph, max(0, free_before - free))

    def _captured(self, act: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What torch's own context does, without emptying its caches before."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            act()
        except BaseException:
            with suppress(RuntimeError):  # the capture is broken, and its first error says why
                graph.capture_end()
            raise
        graph.capture_end()
        return graph
