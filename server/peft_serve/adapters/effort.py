"""What compiling a checkpoint will take, told from shapes before any of it is made.

A small file can stand for full matrices, and a field of a config for the singular value decomposition of each weight
of the base: either is refused here, in milliseconds, and not after minutes or gigabytes. What a layout does not tell
is bounded by the file's own size, and `spending` counts it once more as it is made.
"""

from __future__ import annotations

from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE
from peft_serve.adapters.registry import SiteLayout
from peft_serve.adapters.verdict import Verdict

TERA = 10**12


class Effort:
    """Sums over the sites of one checkpoint. `itemsize`: bytes of a number in the base's type."""

    def __init__(self, itemsize: int, limits: GateLimits) -> None:
        self._itemsize = itemsize
        self._limits = limits
        self._num_values = 0
        self._work = 0

    def add(self, layout: SiteLayout) -> None:
        self._num_values += layout.num_values
        self._work += layout.work

    def check(self, verdict: Verdict) -> None:
        """Refuse what is beyond the server's bounds."""
        num_bytes = self._num_values * self._itemsize
        if num_bytes > self._limits.max_adapter_bytes:
            verdict.refuse(
                WEIGHTS_FILE,
                f"takes {num_bytes} bytes when compiled; this server takes {self._limits.max_adapter_bytes} "
                "(the smaller of --max-adapter-bytes and --device-adapter-bytes)",
            )
        if self._work > self._limits.max_compile_tflop * TERA:
            verdict.refuse(
                f"{CONFIG_FILE}: target_modules",
                f"asks for {-(-self._work // TERA)} million million operations to compile, decompositions of the "
                f"base's weights above all; this server was started with --max-compile-tflop "
                f"{self._limits.max_compile_tflop}; convert the checkpoint to plain LoRA, train fewer modules, "
                "or ask the operator",
            )
