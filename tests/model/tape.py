"""A CUDA graph without a GPU: what a pass asks of the device is taped, and played again over the same memory.

Every operation of torch, and every launch of a kernel in Triton's interpreter, is taped with the very tensors it was
given and gave. Played again it reads those and writes those, whatever has become of the Python objects around: numbers
that came from the host are as they were, and only what is in memory can differ. What a capture does not allow, since
the host would have to wait or to send something, is an error here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.kernels.triton import interpreter

_WAITS = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "unique", "unique_consecutive", "_unique2", "equal"}
)
_SENDS = frozenset({"lift_fresh", "lift_fresh_copy", "lift"})


class HostAskedError(AssertionError):
    """The host reads from the device or sends something to it, within what is captured."""


class Tape(TorchDispatchMode):
    """Tapes what is done inside of it."""

    running: ClassVar[Tape | None] = None

    def __init__(self) -> None:
        super().__init__()
        self._acts: list[Callable[[], object]] = []

    def __enter__(self) -> Tape:
        Tape.running = self
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        Tape.running = None

    def __len__(self) -> int:
        return len(self._acts)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _WAITS or name in _SENDS:
            raise HostAskedError(f"{name} within what is captured")
        if name == "index" and any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1]):
            raise HostAskedError("indices by truth values within what is captured")
        given = func(*args, **kwargs)
        self._tape(name, func, args, kwargs, given)
        return given

    def _tape(self, name: str, func: Any, args: Any, kwargs: Any, given: Any) -> None:
        outs = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        taken = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if func._schema.is_mutable:
            self._acts.append(lambda: func(*args, **kwargs))
            return
        is_view = all(_memory(out) in taken for out in outs)
        if is_view or name.startswith(("empty", "new_empty")):
            return  # it is where it was, and nothing is written

        def again() -> None:
            results = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for out, result in zip(outs, results, strict=True):
                out.copy_(result)

        self._acts.append(again)

    def launch(self, run: Callable[[], object]) -> None:
        """A kernel of our own."""
        with _disable_current_modes():
            run()
        self._acts.append(run)

    def play(self) -> None:
        """All of it again."""
        for act in self._acts:
            act()


def on_device(run: Callable[[], object]) -> None:
    """Run a test's own kernel: as one launch, if there is a tape."""
    run() if Tape.running is None else Tape.running.launch(run)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class TapeReplay:
    """A taped pass."""

    def __init__(self, tape: Tape, num_bytes: int) -> None:
        self.tape = tape
        self.num_bytes = num_bytes
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.tape.play()


class TapeRecorder:
    """Records on tapes."""

    def __init__(self, *, num_bytes: int = 1) -> None:
        self.replays: list[TapeReplay] = []
        self.num_bytes = num_bytes

    def record(self, act: Callable[[], None]) -> TapeReplay:
        act()
        act()
        tape = Tape()
        with interpreter.launches_go_to(tape.launch), tape:
            act()
        self.replays.append(TapeReplay(tape, self.num_bytes))
        return self.replays[-1]
