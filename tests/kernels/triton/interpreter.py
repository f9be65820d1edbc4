"""Triton's interpreter, which runs kernels on a CPU, program after program: import this before Triton.

With TRITON_INTERPRET=0 in the environment the tests run on a GPU.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

os.environ.setdefault("TRITON_INTERPRET", "1")

IS_INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"


def _let_numbers_be_bounds(interpreter: Any) -> None:
    """A loop's bounds are arrays of one number, which numpy from 2.4 on does not take for a number."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _round_to_nearest(interpreter: Any) -> None:
    """float32 becomes bfloat16 as on a GPU, not by cutting digits off."""
    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if not (source.is_fp32() and target.is_bf16()):
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), np.uint16(0x7FC0), nearest.astype(np.uint16))

    interpreter._convert_float = rounded


class _Nothing:
    def restore(self) -> None:
        """Whoever patched restores."""


class _Once:
    """The language is patched once a launch, not once for each function that a program calls."""

    def __init__(self, patch: Callable[[Any], Any], langs: tuple[Any, ...]) -> None:
        self._patch = patch
        self._langs = langs
        self._scopes: list[Any] = []
        self._patched: set[int] = set()
        self._by_function: dict[Any, frozenset[int]] = {}

    def __call__(self, function: Any) -> Any:
        if function not in self._by_function:
            seen = (value for value in function.__globals__.values() if inspect.ismodule(value))
            self._by_function[function] = frozenset(id(value) for value in seen if value in self._langs)
        langs, is_outermost = self._by_function[function], not self._scopes
        if langs <= self._patched:
            return _Nothing()
        self._patched |= langs
        self._scopes.append(self._patch(function))
        return self if is_outermost else _Nothing()

    def restore(self) -> None:
        self._patched.clear()
        while self._scopes:
            self._scopes.pop().restore()


def _prepare() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    _let_numbers_be_bounds(interpreter)
    _round_to_nearest(interpreter)
    interpreter._patch_lang = _Once(interpreter._patch_lang, (tl, tl.core))
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)  # as on a GPU


if IS_INTERPRETED and find_spec("triton") is not None:
    _prepare()


@contextmanager
def launches_go_to(launch: Callable[[Callable[[], object]], object]) -> Iterator[None]:
    """Inside the block kernels that are launched are given to `launch`, which is to run them."""
    from triton.runtime import interpreter

    run = interpreter.InterpretedFunction.run

    def given(self: Any, *args: Any, **kwargs: Any) -> None:
        launch(lambda: run(self, *args, **kwargs))

    interpreter.InterpretedFunction.run = given
    try:
        yield
    finally:
        interpreter.InterpretedFunction.run = run
