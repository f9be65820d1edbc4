"""One file for one value of primitives: the tensors back to back, aligned, behind a small description of the rest.

    header     magic, format, checksum, and the lengths of what follows
    skeleton   JSON: the label the file was written under, each tensor's type and shape, and the value without them
    tensors    the bytes of each, in the order of the skeleton, each at a multiple of 64

A tensor that is in several places of the value is written once and is one tensor again; one that another file holds is
named by that file and its number there. A matrix that lies turned (see `layout`) is written and read as it lies. The
checksum (CRC-32: it finds damage, and reads 5 MB in a millisecond or two) covers every byte but its own. Reading
believes nothing: a file that is cut short, changed, written under another label, or by another version, is
`NotReadable`. Nothing in it names code: classes are looked up among those that a value of the kind can consist of.
Knows no folder and no adapter id.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final

import torch
from torch import Tensor

from peft_serve.adapters.layout import ALIGNMENT

FORMAT: Final = 2
Place = tuple[str, int]
"""Where a tensor is that another file holds: the file's name, and the tensor's number there."""

_MAGIC: Final = b"psadapt\n"
_HEADER: Final = struct.Struct("=8sIIQQ")  # the byte order is the machine's own: another one's format is not ours
_CHECKED_FROM: Final = 16  # behind magic, format and checksum; the first two are compared
_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
}
_TURNED: Final = "turned"
_PLAIN: Final = (bool, int, float, str, type(None))
_MAX_SIZE: Final = 1 << 48  # no side of a tensor and no product of sides is larger


class NotReadable(ValueError):  # noqa: N818 - it says what the file is
    """The file is not what was written under this label by this version."""


class CompiledFiles:
    """Writes and reads values of one kind, a dataclass; and tuples of tensors, which are what files share."""

    def __init__(self, kind: type) -> None:
        self._forms: dict[str, _Form] = {}
        _collect(kind, self._forms)

    def encode(self, value: object, *, label: str, elsewhere: Mapping[int, Place]) -> bytes:
        """The file of a value. `elsewhere` has the places of tensors that are not to be written, by `id(tensor)`.

        Raises TypeError for what is no such value: it cannot be kept then.
        """
        writer = _Writer(elsewhere, self._forms)
        described = writer.describe(value)
        whole = {"label": label, "tensors": writer.entries, "value": described}
        skeleton = json.dumps(whole, separators=(",", ":"), allow_nan=False).encode()
        parts: list[bytes | memoryview] = [skeleton, _padding(_HEADER.size + len(skeleton))]
        num_bytes = 0
        for tensor in writer.tensors:
            content = _bytes_of(tensor)
            parts += [content, _padding(content.nbytes)]
            num_bytes += _aligned(content.nbytes)
        lengths = _HEADER.pack(_MAGIC, FORMAT, 0, len(skeleton), num_bytes)[_CHECKED_FROM:]
        checksum = zlib.crc32(lengths)
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        return b"".join([_HEADER.pack(_MAGIC, FORMAT, checksum, len(skeleton), num_bytes), *parts])

    def decode(self, content: Tensor, *, label: str, fetch: Callable[[str], Sequence[Tensor]]) -> object:
        """The value in a file's bytes (uint8, starting at a multiple of 64), whose tensors are views of them.

        `fetch` gives the tensors of another file by name. Raises `NotReadable`, and what `fetch` raises.
        """
        view = content.numpy().data
        skeleton_end, tensors_start = _check_frame(view)
        try:
            skeleton = json.loads(bytes(view[_HEADER.size : skeleton_end]))
        except (ValueError, RecursionError) as error:
            raise NotReadable("its skeleton is no JSON") from error
        match skeleton:
            case {"label": str(found), "tensors": list(entries), "value": value} if len(skeleton) == 3:
                if found != label:
                    raise NotReadable("it was written for something else")
            case _:
                raise NotReadable("its skeleton is of another form")
        return _Reader(_tensors(content, tensors_start, entries, fetch), self._forms).make(value)


def _check_frame(view: memoryview) -> tuple[int, int]:
    """Where the skeleton ends and where the tensors begin, once every byte is known to be as written."""
    if len(view) < _HEADER.size:
        raise NotReadable("it is cut short")
    magic, version, checksum, skeleton_bytes, tensor_bytes = _HEADER.unpack_from(view)
    if magic != _MAGIC or version != FORMAT:
        raise NotReadable("it is of another format")
    start = _aligned(_HEADER.size + skeleton_bytes)
    if start + tensor_bytes != len(view):
        raise NotReadable("its length is not the one it names")
    if zlib.crc32(view[_CHECKED_FROM:]) != checksum:
        raise NotReadable("its checksum does not match")
    return _HEADER.size + skeleton_bytes, start


def _tensors(
    content: Tensor, start: int, entries: Sequence[object], fetch: Callable[[str], Sequence[Tensor]]
) -> list[Tensor]:
    tensors: list[Tensor] = []
    for entry in entries:
        match entry:
            case ["elsewhere", str(name), int(number)]:
                others = fetch(name)
                if not 0 <= number < len(others):
                    raise NotReadable(f"it names tensor {number} of {name}, which has {len(others)}")
                tensors.append(others[number])
            case [str(dtype), list(shape), *words] if dtype in _DTYPES and (not words or _is_turned(shape, words)):
                num_bytes = _extent(shape, _DTYPES[dtype])
                if start + num_bytes > content.numel():
                    raise NotReadable("a tensor reaches beyond its end")
                lying = content[start : start + num_bytes].view(_DTYPES[dtype]).view(shape)
                tensors.append(lying.t() if words else lying)
                start += _aligned(num_bytes)
            case _:
                raise NotReadable("a tensor is described in another way")
    if start != content.numel():
        raise NotReadable("its tensors and its length disagree")
    return tensors


def _is_turned(shape: Sequence[object], words: Sequence[object]) -> bool:
    """Whether this shape is that of a matrix as it lies, which is the tensor's turned."""
    return words == [_TURNED] and len(shape) == 2


def _extent(shape: Sequence[object], dtype: torch.dtype) -> int:
    """How many bytes a tensor has."""
    sizes = [size for size in shape if type(size) is int and 0 <= size < _MAX_SIZE]
    count = math.prod(sizes)
    if len(sizes) != len(shape) or math.prod(max(size, 1) for size in sizes) >= _MAX_SIZE:  # not even with a side of 0
        raise NotReadable("a tensor has no shape")
    return count * dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """A dataclass or an enum that values consist of; of a dataclass, the parts that may be None, and the others."""

    cls: type
    blank: Mapping[str, None]
    required: frozenset[str]


class _Writer:
    """Describes a value in JSON: what is no plain value becomes a list that begins with its kind.

    Parts of a dataclass that are None are left out.
    """

    def __init__(self, elsewhere: Mapping[int, Place], forms: Mapping[str, _Form]) -> None:
        self._elsewhere = elsewhere
        self._forms = forms
        self._numbers: dict[int, int] = {}
        self.entries: list[list[object]] = []
        self.tensors: list[Tensor] = []

    def describe(self, value: object) -> object:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Tensor):
            return ["tensor", self._number(value)]
        if isinstance(value, tuple):
            return ["tuple", [self.describe(item) for item in value]]
        if isinstance(value, frozenset):
            return ["set", [self.describe(item) for item in sorted(value)]]
        if isinstance(value, Mapping):
            return ["map", {_name(key): self.describe(item) for key, item in value.items()}]
        name = type(value).__name__
        if name not in self._forms or self._forms[name].cls is not type(value):
            raise TypeError(f"{name} is no part of a compiled adapter, so that it cannot be written")
        if isinstance(value, Enum):
            return ["enum", name, value.value]
        assert dataclasses.is_dataclass(value), "nothing else was collected"
        parts = ((part.name, getattr(value, part.name)) for part in dataclasses.fields(value))
        return ["is", name, {of: self.describe(part) for of, part in parts if part is not None}]

    def _number(self, tensor: Tensor) -> int:
        """The tensor's number in the file; the value keeps every tensor alive, so that an id stands for one of them."""
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._numbers[id(tensor)] = len(self.entries)
            place = self._elsewhere.get(id(tensor))
            if place is None:
                lying = tensor.t() if _lies_turned(tensor) else tensor
                words = [] if lying is tensor else [_TURNED]
                self.entries.append([str(tensor.dtype).removeprefix("torch."), list(lying.shape), *words])
                self.tensors.append(lying)
            else:
                self.entries.append(["elsewhere", *place])
        return number


class _Reader:
    """Makes the value of its description."""

    def __init__(self, tensors: Sequence[Tensor], forms: Mapping[str, _Form]) -> None:
        self._tensors = tensors
        self._forms = forms

    def make(self, node: object) -> object:
        if type(node) in _PLAIN:
            return node
        match node:
            case ["tensor", int(number)] if 0 <= number < len(self._tensors):
                return self._tensors[number]
            case ["is", str(name), dict(parts)]:
                return self._instance(name, {of: self.make(part) for of, part in parts.items()})
            case ["map", dict(items)]:
                return {key: self.make(item) for key, item in items.items()}
            case ["tuple", list(items)]:
                return tuple(self.make(item) for item in items)
            case ["set", list(items)] if all(type(item) in _PLAIN for item in items):
                return frozenset(items)
            case ["enum", str(name), str(value)]:
                return self._enum(name, value)
            case _:
                raise NotReadable("a value is described in another way")

    def _enum(self, name: str, value: str) -> Enum:
        form = self._forms.get(name)
        if form is None or not issubclass(form.cls, Enum):
            raise NotReadable(f"{name} names no kind")
        try:
            return form.cls(value)
        except ValueError as error:
            raise NotReadable(f"{name} has no such member") from error

    def _instance(self, name: str, parts: Mapping[str, Any]) -> object:
        form = self._forms.get(name)
        if form is None or issubclass(form.cls, Enum):
            raise NotReadable(f"{name} is no part of such a value")
        if not form.required <= parts.keys() <= form.required | form.blank.keys():
            raise NotReadable(f"{name} has other parts")
        made: object = form.cls(**{**form.blank, **parts})
        return made


def _collect(hint: Any, forms: dict[str, _Form]) -> None:
    """Add the dataclasses and enums that a value of this type can consist of, by name."""
    for argument in typing.get_args(hint):
        _collect(argument, forms)
    is_class = isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, Enum))
    if not is_class or hint.__name__ in forms:
        assert not is_class or forms[hint.__name__].cls is hint, f"two classes are named {hint.__name__}"
        return
    parts = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    blank = dict.fromkeys(name for name, part in parts.items() if type(None) in typing.get_args(part))
    forms[hint.__name__] = _Form(hint, blank, frozenset(parts.keys() - blank.keys()))
    for part in parts.values():
        _collect(part, forms)


def _name(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{key!r} is no name, so that what it names cannot be written")
    return str(key)


def _lies_turned(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The values as they lie in memory, in rows."""
    if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
        raise TypeError(f"a tensor of {tensor.dtype} cannot be written")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _padding(num_bytes: int) -> bytes:
    return b"\0" * (_aligned(num_bytes) - num_bytes)
