"""GGUF files: llama.cpp's format for weights and what belongs to them, version 3, written and not read.

A file is a header, the facts (key, type, value), a line for each tensor (name, shape, type, place) and the tensors,
each on a boundary of 32 bytes. It knows nothing of models. Source: ggml's ``docs/gguf.md``.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ALIGNMENT = 32
VERSION = 3
TENSOR_TYPES: Mapping[str, int] = {"float32": 0, "float16": 1, "bfloat16": 30}
BOOL, STRING, ARRAY = 7, 8, 9

Scalar = str | int | float | bool
Fact = Scalar | Sequence[str] | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor. `shape` is in torch's order, the last dimension being the one that lies together; `dtype` is one
    of `TENSOR_TYPES`; `read` gives its bytes, `num_bytes` of them, when they are written and not before."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    read: Callable[[], bytes]


def write_gguf(path: Path, facts: Mapping[str, Fact], tensors: Sequence[GgufTensor]) -> Path:
    """Write the file, whole or not at all: it takes its name when it is complete. Integers are unsigned 32 bits where
    they stand alone and signed where they stand in lists, as llama.cpp's own converters write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    header = b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(facts))
    header += b"".join(_text(key) + _fact(value) for key, value in facts.items())
    header += b"".join(_places(tensors))
    with unfinished.open("wb") as file:
        file.write(header + bytes(_padding(len(header))))
        for tensor in tensors:
            content = tensor.read()
            assert len(content) == tensor.num_bytes, f"{tensor.name} holds {len(content)} bytes"
            file.write(content)
            file.write(bytes(_padding(len(content))))
    return unfinished.rename(path)


def _places(tensors: Sequence[GgufTensor]) -> Iterator[bytes]:
    place = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]  # ggml counts dimensions from the one that lies together
        yield _text(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        yield struct.pack("<IQ", TENSOR_TYPES[tensor.dtype], place)
        place += tensor.num_bytes + _padding(tensor.num_bytes)


def _padding(length: int) -> int:
    return -length % ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _fact(value: Fact) -> bytes:
    match value:
        case bool():  # before int, which it is too
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", STRING) + _text(value)
    texts = [_text(one) for one in value if isinstance(one, str)]
    if len(texts) == len(value):
        return struct.pack("<IIQ", ARRAY, STRING, len(texts)) + b"".join(texts)
    return struct.pack(f"<IIQ{len(value)}i", ARRAY, 5, len(value), *value)
