"""Files of compiled adapters: what is read is bit by bit what was written, or it is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import struct
import types
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_serve.adapters.compiled_files import FORMAT, CompiledFiles, NotReadable, Place
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.layout import ALIGNMENT
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter, Affine, HeadTask, LowRank, Rows, tensors_of
from peft_serve.core import AdapterId
from tests.adapters.checkpoints import make_base, make_checkpoint, methods_for
from tests.adapters.fake_base import FakeBase
from tests.adapters.same_bits import assert_same_bits

ELSEWHERE = {
    "t5": ("lora_shared", "prefix_tuning", "prompt_tuning", "ia3"),
    "gpt2": ("lora_bias_all", "adaption_prompt"),
    "mixtral": ("lora_experts",),
}
EVERYWHERE = [("llama", method) for method in methods_for("llama")] + [
    (kind, method) for kind, methods in ELSEWHERE.items() for method in methods if method in methods_for(kind)
]
LABEL = "for this base sha256:1"


def encode(value: object, *, label: str = LABEL, elsewhere: Mapping[int, Place] = types.MappingProxyType({})) -> bytes:
    return CompiledFiles(Adapter).encode(value, label=label, elsewhere=elsewhere)


def decode(content: Tensor, *, label: str, fetch: Callable[[str], Sequence[Tensor]]) -> object:
    return CompiledFiles(Adapter).decode(content, label=label, fetch=fetch)


def nothing_elsewhere(name: str) -> Sequence[Tensor]:
    raise AssertionError(f"nothing is written apart, and {name} is asked for")


def as_read(content: bytes) -> Tensor:
    """The bytes in memory as they are read: at a multiple of 64."""
    read = torch.empty(len(content), dtype=torch.uint8)
    read.numpy()[:] = bytearray(content)
    return read


def read_back(content: bytes, label: str = LABEL) -> object:
    return decode(as_read(content), label=label, fetch=nothing_elsewhere)


def small_adapter() -> Adapter:
    factor = torch.randn(2, 3)
    edit = Affine(delta=LowRank(factor, torch.randn(4, 2)), shift=torch.randn(4), in_scale=factor)
    rows = Affine(rows=Rows(torch.tensor([3, 1]), torch.randn(2, 3)))
    return Adapter(id=AdapterId("sha256:1"), method="LORA", sites={"a.b": edit, "ä": rows}, start=(4, 5))


# ---- every method


@pytest.fixture(scope="module")
def bases() -> dict[str, FakeBase]:
    return {kind: FakeBase(make_base(kind)) for kind, _ in EVERYWHERE}


@pytest.mark.parametrize(("kind", "method"), EVERYWHERE)
def test_every_method_is_read_as_it_was_compiled(kind: str, method: str, bases: dict[str, FakeBase]) -> None:
    files, _ = make_checkpoint(method, kind)
    inspected = inspect(files, bases[kind], GateLimits())
    compiled = compile_adapter(inspected, bases[kind], GateLimits())
    content = encode(compiled)
    found = read_back(content)
    assert isinstance(found, Adapter)
    assert_same_bits(compiled, found)
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in found.tensors() if tensor.numel())
    held = sum(tensor.nbytes for tensor in compiled.tensors())
    assert held <= len(content) < held + 20_000 + 100 * len(list(compiled.tensors())), "and little is written beside"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora_dora", "vera", "trainable_tokens"])
def test_halves_are_read_as_they_were_compiled(method: str, dtype: torch.dtype) -> None:
    base = FakeBase(make_base("llama"), dtype=dtype)
    compiled = compile_adapter(inspect(make_checkpoint(method, "llama")[0], base, GateLimits()), base, GateLimits())
    assert_same_bits(compiled, read_back(encode(compiled)))


# ---- every primitive, whoever makes it


def _parts(hint: Any) -> Iterator[type]:
    """The dataclasses that a value of this type can consist of."""
    for argument in typing.get_args(hint):
        yield from _parts(argument)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
        for part in typing.get_type_hints(hint).values():
            yield from _parts(part)


def _examples(hint: Any) -> Iterator[Any]:
    """A value of every kind that a field of this type may have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for each in arguments:
            yield from _examples(each)
    elif origin is tuple:
        yield ()
        yield tuple(_examples(arguments[0]))
    elif origin is Mapping:
        yield {f"{number}.ö": value for number, value in enumerate(_examples(arguments[1]))}
    elif origin is frozenset:
        yield frozenset()
        yield frozenset(_examples(arguments[0]))
    elif hint is Tensor:
        yield torch.randn(3, 2)
    elif isinstance(hint, type) and issubclass(hint, Enum):
        yield from hint
    elif dataclasses.is_dataclass(hint):
        yield from _instances(hint)
    else:
        plain = {int: 7, float: 0.1, bool: True, str: "§ \"'", type(None): None, AdapterId: "sha256:2"}
        yield plain[hint]


def _instances(cls: Any) -> Iterator[Any]:
    """Instances in which every field takes each of its kinds at least once."""
    hints = typing.get_type_hints(cls)
    kinds = {part.name: list(_examples(hints[part.name])) for part in dataclasses.fields(cls)}
    most = max((len(values) for values in kinds.values()), default=1)
    for number in range(most):
        yield cls(**{name: values[number % len(values)] for name, values in kinds.items()})


@pytest.mark.parametrize("cls", dict.fromkeys(_parts(Adapter)), ids=lambda cls: cls.__name__)
def test_every_primitive_is_read_as_it_was_written(cls: Any) -> None:
    num_instances = 0
    for value in itertools.islice(_instances(cls), 100):
        num_instances += 1
        assert_same_bits(value, read_back(encode(value)))
    assert num_instances > 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.zeros(3, 0, 2, dtype=torch.bfloat16),
        torch.tensor(1.5),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.arange(12).reshape(3, 4).T,
        torch.tensor([255], dtype=torch.uint8),
        torch.randn(5, 4)[1:, ::2],
    ],
    ids=str,
)
def test_unusual_tensors_are_read_as_they_were(tensor: Tensor) -> None:
    assert_same_bits((tensor,), read_back(encode((tensor,))))


def test_a_matrix_that_lies_turned_is_read_as_it_lay_and_no_byte_is_moved() -> None:
    lying = torch.arange(12.0).reshape(3, 4)
    content = as_read(encode((lying.t(), lying)))
    (turned, plain) = decode(content, label=LABEL, fetch=nothing_elsewhere)  # type: ignore[misc]
    assert torch.equal(turned, lying.t())
    assert turned.t().is_contiguous()
    assert plain.is_contiguous()
    whole = content.untyped_storage().data_ptr()
    assert {t.untyped_storage().data_ptr() for t in (turned, plain)} == {whole}


def test_a_tensor_that_another_file_holds_is_not_written_and_comes_from_there() -> None:
    adapter = small_adapter()
    shared = adapter.sites["a.b"].delta.a_RI  # type: ignore[union-attr]
    content = encode(adapter, label=LABEL, elsewhere={id(shared): ("factors", 1)})
    assert shared.numpy().tobytes() not in content
    asked: list[str] = []

    def fetch(name: str) -> Sequence[Tensor]:
        asked.append(name)
        return torch.zeros(1), shared

    found = decode(as_read(content), label=LABEL, fetch=fetch)
    assert_same_bits(adapter, found)
    assert isinstance(found, Adapter)
    assert found.sites["a.b"].in_scale is shared  # type: ignore[union-attr]
    assert asked == ["factors"]
    with pytest.raises(NotReadable, match="tensor 1 of factors"):
        decode(as_read(content), label=LABEL, fetch=lambda _name: (shared,))


@dataclasses.dataclass(frozen=True)
class Foreign:
    x: int


@pytest.mark.parametrize("value", [Foreign(3), {3: "x"}, [1], b"x", torch.zeros(2, dtype=torch.complex64), 1j])
def test_what_is_no_primitive_is_not_written(value: object) -> None:
    with pytest.raises(TypeError):
        encode((value,))


# ---- damage


def test_a_flip_of_any_bit_is_noticed() -> None:
    content = encode(small_adapter())
    rng = random.Random(1)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        with pytest.raises(NotReadable):
            read_back(bytes(changed))


def test_a_file_of_another_length_is_noticed() -> None:
    content = encode(small_adapter())
    for length in range(len(content)):
        with pytest.raises(NotReadable):
            read_back(content[:length])
    for more in (1, 63, 64, 4096):
        with pytest.raises(NotReadable):
            read_back(content + b"\0" * more)
    assert_same_bits(read_back(content), read_back(content))


@pytest.mark.parametrize("label", ["", LABEL + " ", LABEL.replace("1", "2")])
def test_a_file_that_was_written_for_something_else_is_refused(label: str) -> None:
    content = encode(small_adapter())
    with pytest.raises(NotReadable, match="something else"):
        read_back(content, label=label)


def sealed(skeleton: Any, tensors: bytes = b"", *, version: int = FORMAT, magic: bytes = b"psadapt\n") -> bytes:
    """A file whose checksum is right, whatever it holds."""
    text = skeleton if isinstance(skeleton, bytes) else json.dumps(skeleton).encode()
    rest = text + b"\0" * (-(32 + len(text)) % 64) + tensors
    lengths = struct.pack("=QQ", len(text), len(tensors))
    return struct.pack("=8sII", magic, version, zlib.crc32(lengths + rest)) + lengths + rest


def described(value: Any, *tensors: Any, label: str = LABEL, **more: Any) -> dict[str, Any]:
    return {"label": label, "tensors": list(tensors), "value": value, **more}


F32 = ["float32", [16]]


def test_the_form_written_by_hand_is_the_one_that_is_read() -> None:
    found = read_back(sealed(described(["tuple", [["tensor", 0], 3]], F32), bytes(64)))
    assert_same_bits(found, (torch.zeros(16), 3))


@pytest.mark.parametrize(
    "content",
    [
        sealed(described(3), version=FORMAT - 1),
        sealed(described(3), magic=b"safetens"),
        sealed(b"{"),
        sealed(b"\xff\xfe"),
        sealed(b"[" * 100_000),
        sealed([]),
        sealed(described(3, more=1)),
        sealed({"label": LABEL, "tensors": {}, "value": 3}),
        sealed(described(3), bytes(64)),
        sealed(described(["tensor", 0])),
        sealed(described(["tensor", -1], F32), bytes(64)),
        sealed(described(["tensor", 1], F32), bytes(64)),
        sealed(described(["tensor", 0], ["float32", [17]]), bytes(64)),
        sealed(described(["tensor", 0], ["float32", [-16]]), bytes(64)),
        sealed(described(["tensor", 0], ["float32", [True, 16]]), bytes(64)),
        sealed(described(["tensor", 0], ["float32", [16.0]]), bytes(64)),
        sealed(described(["tensor", 0], ["float32", "16"]), bytes(64)),
        sealed(described(["tensor", 0], ["float32", [1 << 62, 1 << 62]]), bytes(64)),
        sealed(described(["tensor", 0], ["float32", [1 << 47, 1 << 47, 0]])),
        sealed(described(["tensor", 0], ["complex64", [8]]), bytes(64)),
        sealed(described(["tensor", 0], ["float32", [16], "turned"]), bytes(64)),
        sealed(described(["tensor", 0], ["float32", [4, 4], "turned", "turned"]), bytes(64)),
        sealed(described(["tensor", 0], ["float32", [4, 4], "other"]), bytes(64)),
        sealed(described(["tensor", 0], ["float32"]), bytes(64)),
        sealed(described(["tensor", 0], F32, F32), bytes(64)),
        sealed(described(["enum", "HeadTask", "NO"])),
        sealed(described(["enum", "LowRank", "NO"])),
        sealed(described(["enum", "HeadTask", ["SEQ_CLS"]])),
        sealed(described(["is", "HeadTask", {}])),
        sealed(described(["is", "LowRank", {}])),
        sealed(described(["is", "LowRank", {"a_RI": 1}])),
        sealed(described(["is", "LowRank", [["a_RI", 1], ["b_OR", 2]]])),
        sealed(described(["is", "SoftPrompt", {"embeddings_PD": 1, "more": 2}])),
        sealed(described(["is", "SoftPrompt", {"embeddings_PD": ["tensor", 0]}])),
        sealed(described(["is", "Path", {"embeddings_PD": 1}])),
        sealed(described(["is", "Tensor", {}])),
        sealed(described(["map", [["a", 1]]])),
        sealed(described(["set", [["set", []]]])),
        sealed(described(["tuple", 3])),
        sealed(described(["list", []])),
        sealed(described({})),
        sealed(described([])),
    ],
)
def test_a_file_with_a_right_checksum_is_not_believed_either(content: bytes) -> None:
    with pytest.raises(NotReadable):
        read_back(content)


def test_enums_come_back_as_members() -> None:
    found = read_back(encode((HeadTask.SPANS,)))
    assert isinstance(found, tuple)
    assert found[0] is HeadTask.SPANS
    assert list(tensors_of(found)) == []
