"""A safetensors file read by our own parser: every byte accounted for before any tensor is made.

The format is 8 bytes of header length (little endian), a JSON header, then the values back to back. The parser
gives views on the upload's bytes; `StoredTensor.load` copies them once, when an adapter is compiled.
Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import WEIGHTS_FILE
from peft_serve.adapters.strict_json import parse_object, refuse_pointer
from peft_serve.adapters.verdict import Verdict, quoted
from peft_serve.errors import MalformedUpload

MAX_NAME = 512
MAX_DIMS = 5
MAX_SIZE = 1 << 40
CHUNK = 1 << 20  # values checked at a time, so that the check needs little memory
AS_PEFT = "save it again with peft's save_pretrained (safe_serialization=True)"
GATHERED = "a checkpoint saved from a sharded model (ZeRO-3, FSDP) must be gathered before it is saved"


@dataclass(frozen=True, slots=True)
class Format:
    """A stored number format. IEEE magnitudes sort like the integers that hold them."""

    torch_dtype: torch.dtype
    bits: str  # the numpy type that reads it: unsigned and of the same width for a float
    magnitude: int  # mask that clears a float's sign bit

    @property
    def is_integer(self) -> bool:
        return not self.torch_dtype.is_floating_point

    @property
    def num_bytes(self) -> int:
        return self.torch_dtype.itemsize

    def bits_of(self, value: float) -> int:
        """The magnitude bits of `value` rounded to this format; a value beyond its range gives its largest."""
        limit = min(abs(value), torch.finfo(self.torch_dtype).max)
        as_signed = {2: torch.int16, 4: torch.int32}[self.num_bytes]
        return int(torch.tensor([limit], dtype=self.torch_dtype).view(as_signed).item()) & self.magnitude


FLOATS: Final[Mapping[str, Format]] = {
    "F32": Format(torch.float32, "<u4", 0x7FFFFFFF),
    "F16": Format(torch.float16, "<u2", 0x7FFF),
    "BF16": Format(torch.bfloat16, "<u2", 0x7FFF),
}
FORMATS: Final[Mapping[str, Format]] = {
    **FLOATS,
    "U8": Format(torch.uint8, "u1", 0),  # indices, where a method has some
    "I16": Format(torch.int16, "<i2", 0),
    "I32": Format(torch.int32, "<i4", 0),
    "I64": Format(torch.int64, "<i8", 0),
}
NOT_SERVED: Final = f"served are {', '.join(FLOATS)}; convert the tensor"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A named tensor that still lies in the upload, as a read-only view."""

    name: str
    format: Format
    shape: tuple[int, ...]
    content: memoryview

    def load(self) -> Tensor:
        """The values as a tensor of its own memory: float32, as peft widens bf16 and f16 files; int64 for indices."""
        if not self.content:  # a side of 0: there is no buffer to read from
            return torch.zeros(self.shape)
        stored = torch.frombuffer(bytearray(self.content), dtype=self.format.torch_dtype)
        return stored.to(torch.int64 if self.format.is_integer else torch.float32).reshape(self.shape)

    def is_below(self, bound: int) -> bool:
        """Whether every value of an integer tensor is an index into something of `bound` entries."""
        values = np.frombuffer(self.content, dtype=self.format.bits)
        return all(
            int(part.min()) >= 0 and int(part.max()) < bound
            for part in (values[start : start + CHUNK] for start in range(0, values.size, CHUNK))
        )

    def is_within(self, max_abs: float) -> bool:
        """Whether every value is finite and at most `max_abs` in magnitude; NaN and Inf have larger bits."""
        if self.format.is_integer:
            return True  # what indices may be is checked against what they point into
        bits = np.frombuffer(self.content, dtype=self.format.bits)
        limit = self.format.bits_of(max_abs)
        return all(
            int((bits[start : start + CHUNK] & self.format.magnitude).max()) <= limit
            for start in range(0, bits.size, CHUNK)
        )


def parse_tensors(content: bytes, limits: GateLimits, verdict: Verdict) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file in the order of their bytes.

    Raises `MalformedUpload` when the file is not one; refuses in `verdict` what is well formed and not served.
    """
    header, body = _split(content, limits)
    _check_metadata(header.pop("__metadata__", None))
    if len(header) > limits.max_tensors:
        verdict.refuse(WEIGHTS_FILE, f"holds {len(header)} tensors; this server takes at most {limits.max_tensors}")
        return ()
    entries = sorted(((_offsets(name, entry), name, entry) for name, entry in header.items()), key=lambda e: e[0])
    tensors = []
    end = 0
    for (first, last), name, entry in entries:
        if first != end:
            raise MalformedUpload(f"{WEIGHTS_FILE}: {quoted(name)} leaves a gap or overlaps its neighbour; {AS_PEFT}")
        end = last
        tensor = _tensor(name, entry, body[first:last] if last <= len(body) else body[:0], verdict)
        if tensor is not None:
            tensors.append(tensor)
    if end != len(body):
        raise MalformedUpload(
            f"{WEIGHTS_FILE} has {len(body)} bytes of values and its header describes {end}; "
            "the upload is cut short or has bytes behind its end; upload it again"
        )
    return tuple(tensors)


def _split(content: bytes, limits: GateLimits) -> tuple[dict[str, Any], memoryview]:
    length = struct.unpack("<Q", content[:8])[0] if len(content) > 8 else 0
    if not 2 <= length <= len(content) - 8 or content[8:9] != b"{":
        _refuse_other_formats(content)
        raise MalformedUpload(f"{WEIGHTS_FILE} is not a complete safetensors file; {AS_PEFT}")
    name = f"{WEIGHTS_FILE} header"
    header = parse_object(content[8 : 8 + length], name=name, max_bytes=limits.max_header_bytes, max_depth=4)
    return header, memoryview(content)[8 + length :].toreadonly()


def _refuse_other_formats(content: bytes) -> None:
    refuse_pointer(content, WEIGHTS_FILE)
    if content.startswith(b"PK") or content[:1] == b"\x80":
        raise MalformedUpload(
            f"{WEIGHTS_FILE} holds a pickle or zip file; such files can run code and are never read; {AS_PEFT}"
        )


def _check_metadata(metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise MalformedUpload(f"{WEIGHTS_FILE}: __metadata__ must map strings to strings; {AS_PEFT}")


def _offsets(name: str, entry: object) -> tuple[int, int]:
    if len(name) > MAX_NAME:
        raise MalformedUpload(f"{WEIGHTS_FILE}: tensor name {quoted(name)} is longer than {MAX_NAME} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedUpload(f"{WEIGHTS_FILE}: {quoted(name)} needs exactly dtype, shape and data_offsets; {AS_PEFT}")
    offsets = entry["data_offsets"]
    if not _is_sizes(offsets, low=0, max_len=2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedUpload(f"{WEIGHTS_FILE}: {quoted(name)} has data_offsets that are no range; {AS_PEFT}")
    return offsets[0], offsets[1]


def _tensor(name: str, entry: Mapping[str, Any], content: memoryview, verdict: Verdict) -> StoredTensor | None:
    shape = entry["shape"]
    if not _is_sizes(shape, low=0, max_len=MAX_DIMS):
        raise MalformedUpload(f"{WEIGHTS_FILE}: {quoted(name)} has a broken shape; {GATHERED}")
    dtype = entry["dtype"]
    form = FORMATS.get(dtype) if isinstance(dtype, str) else None
    if form is None:
        verdict.refuse(name[:MAX_NAME], f"has dtype {quoted(dtype)}; {NOT_SERVED}")
        return None
    num_bytes = form.num_bytes
    for size in shape:
        num_bytes *= size
    first, last = entry["data_offsets"]
    if num_bytes != last - first or len(content) != num_bytes:
        raise MalformedUpload(f"{WEIGHTS_FILE}: {quoted(name)} has shape and bytes that disagree; {AS_PEFT}")
    return StoredTensor(name, form, tuple(shape), content)


def _is_sizes(value: object, *, low: int, max_len: int) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= max_len
        and all(type(size) is int and low <= size < MAX_SIZE for size in value)
    )
