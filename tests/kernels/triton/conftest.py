"""The kernels' tests run in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

from tests.kernels.triton import interpreter

assert interpreter.DEVICE
