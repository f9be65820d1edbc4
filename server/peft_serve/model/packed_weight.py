"""A weight that lies packed for a kernel, and is a tensor to whoever else reads it.

The packed copy of a matrix has all its bits, so the plain one need not be kept beside it
(docs/decisions/0019-weights-and-adapters-once.md). `PackedWeight` stands in its place in the model: it has the shape
and the type, and whatever is computed with it is computed with the plain matrix, made for that one time. An embedding
that is tied to a packed head looks up the rows that it needs. Nothing that a step does often reads more than that.

Knows no site; how a weight is packed is the kernel's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_PIECE_BYTES: Final = 16 << 20
_LOOK_UP: Final = torch.ops.aten.embedding.default


@runtime_checkable
class Packed(Protocol):
    """A matrix W [O, I] on a CPU, in an order of its own."""

    @property
    def num_out(self) -> int: ...

    @property
    def num_in(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def take(self, numbers_N: Tensor) -> Tensor:
        """Rows of W by number, [N, I], with the bits that were packed."""
        ...


class PackedWeight(Tensor):
    """W, or its transpose as a Conv1D has it, whose values are in `packed`; nobody can change them."""

    _is_param = True  # what tells torch's modules that this is one of their parameters
    packed: Packed
    is_turned: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch says to

    @staticmethod
    def __new__(cls, packed: Packed, *, is_turned: bool = False) -> PackedWeight:
        size = (packed.num_in, packed.num_out) if is_turned else (packed.num_out, packed.num_in)
        made: PackedWeight = Tensor._make_wrapper_subclass(cls, size, dtype=packed.dtype, device=torch.device("cpu"))
        made.packed, made.is_turned = packed, is_turned
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as torch calls it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, PackedWeight):
            if func is _LOOK_UP and not first.is_turned:
                numbers = args[1]
                return first.packed.take(numbers.reshape(-1)).view(*numbers.shape, -1)
            if func._schema.is_mutable:
                raise RuntimeError("a packed weight of the base cannot be changed; the base is read-only")
        args, kwargs = tree_map_only(PackedWeight, PackedWeight.plain, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def plain(self) -> Tensor:
        """The matrix as it was, a new tensor."""
        packed = self.packed
        whole_OI = packed.take(torch.arange(packed.num_out))
        return whole_OI.t() if self.is_turned else whole_OI


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in parts of its first axis, none of them large where it is packed."""
    if not isinstance(tensor, PackedWeight):
        yield tensor
    elif tensor.is_turned:
        yield tensor.plain()
    else:
        packed = tensor.packed
        rows = max(1, _PIECE_BYTES // (packed.num_in * packed.dtype.itemsize))
        for first in range(0, packed.num_out, rows):
            yield packed.take(torch.arange(first, min(first + rows, packed.num_out)))


class WeightPlaces:
    """Where the parameters of a model stand: several modules may have one and the same."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((module, name))

    def replace(self, weight: Tensor, packed: object, *, is_turned: bool) -> None:
        """Put a packed weight wherever the plain one is, whose memory is free once nobody else holds it.

        What does not give its weight back takes nobody's place.
        """
        if not isinstance(packed, Packed):
            return
        instead = PackedWeight(packed, is_turned=is_turned)
        for module, name in self._places.pop(id(weight), ()):
            module._parameters[name] = instead  # type: ignore[assignment]  # a parameter to torch by its mark
