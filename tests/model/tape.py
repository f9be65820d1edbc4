"""A CUDA graph without a GPU: what a pass asks of the device is taped, and played again over the same memory.

Every operation of torch, and every launch of a kernel in Triton's interpreter, is taped with the very tensors it was
given and gave. Played again it reads those and writes those, whatever has become of the Python objects around: numbers
that came from the host are as they were, and only what is in memory can differ. What a capture does not allow, since
the host would have to wait or to send something, is an error here too. Memory that a graph did not allocate is not
its own: what an operation of torch reads has to be kept by somebody else, and playing without it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.kernels.triton import interpreter

_WAITS = frozenset(
    {
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
_SENDS = frozenset({"lift_fresh", "lift_fresh_copy", "lift"})


class HostAskedError(AssertionError):
    """The host reads from the device or sends something to it, within what is captured."""


class GoneError(AssertionError):
    """What a replay reads has been given back."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies that somebody else keeps."""

    storage: StorageWeakRef
    dtype: torch.dtype
    at: tuple[int, torch.Size, tuple[int, ...]]

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise GoneError(f"a tensor {list(self.at[1])} that a replay reads is in memory no longer")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.at)


class Tape(TorchDispatchMode):
    """Tapes what is done inside of it."""

    running: ClassVar[Tape | None] = None

    def __init__(self) -> None:
        super().__init__()
        self._acts: list[Callable[[], object]] = []
        self._own: dict[int, Tensor] = {}  # by memory, what was allocated while it was taped

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
        if "index" in name and any(isinstance(i, Tensor) and i.dtype is torch.bool for i in tree_leaves(args[1])):
            raise HostAskedError("indices by truth values within what is captured")
        if name == "repeat_interleave" and func._overloadname != "self_int" and kwargs.get("output_size") is None:
            raise HostAskedError("repeats that the device counts within what is captured")
        given = func(*args, **kwargs)
        self._tape(name, func, args, kwargs, given)
        return given

    def _tape(self, name: str, func: Any, args: Any, kwargs: Any, given: Any) -> None:
        outs = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        taken = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self._own.update((_memory(out), out) for out in outs if _memory(out) not in taken)
        placed = tree_map(self._placed, (args, kwargs))

        def played() -> Any:
            its_args, its_kwargs = tree_map(_found, placed)
            return func(*its_args, **its_kwargs)

        if func._schema.is_mutable:
            self._acts.append(played)
            return
        is_view = all(_memory(out) in taken for out in outs)
        if is_view or name.startswith(("empty", "new_empty")):
            return  # it is where it was, and nothing is written

        def again() -> None:
            results = [leaf for leaf in tree_leaves(played()) if isinstance(leaf, Tensor)]
            for out, result in zip(outs, results, strict=True):
                out.copy_(result)

        self._acts.append(again)

    def _placed(self, value: Any) -> Any:
        """Where a tensor lies whose memory is not the tape's own."""
        if not isinstance(value, Tensor) or _memory(value) in self._own or value.is_conj() or value.is_neg():
            return value
        at = value.storage_offset(), value.shape, value.stride()
        return _Place(StorageWeakRef(value.untyped_storage()), value.dtype, at)

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


def _found(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Place) else value


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
