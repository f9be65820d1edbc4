"""Weight files that lie about themselves, carry more than they say, or hold what is no number."""

from __future__ import annotations

import json
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from io import BytesIO

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from peft_serve.adapters.limits import GateLimits
from peft_serve.errors import AdapterInvalid, MalformedUpload
from tests.attacks.hostile import PREFIX, Q0, admit, honest, join, split, with_config, with_tensors, with_weights

A = f"{PREFIX}{Q0}.lora_A.weight"
B = f"{PREFIX}{Q0}.lora_B.weight"


def _zip() -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    return out.getvalue()


def _entry(**changes: object) -> Callable[[bytes], bytes]:
    def change(weights: bytes) -> bytes:
        header, body = split(weights)
        header[A] = {**header[A], **changes}
        return join(header, body)

    return change


def _overlap(weights: bytes) -> bytes:
    header, body = split(weights)
    header[B]["data_offsets"] = header[A]["data_offsets"]
    return join(header, body)


def _twice(weights: bytes) -> bytes:
    header, body = split(weights)
    text = json.dumps(header)
    return join(f'{text[:-1]}, "{A}": {json.dumps(header[A])}}}'.encode(), body)


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "eight bytes": lambda w: w[:8],
    "cut in the header": lambda w: w[:100],
    "cut in the values": lambda w: w[:-1],
    "bytes behind the end": lambda w: w + b"\0",
    "header of 2**40 bytes": lambda w: struct.pack("<Q", 1 << 40) + w[8:],
    "header of 2**64-1 bytes": lambda w: b"\xff" * 8 + w[8:],
    "header beyond the limit": lambda _: join(b"{" + b" " * (1 << 20) + b"}", b""),
    "header is a list": lambda _: join(b"[]", b""),
    "header begins with a space": lambda _: join(b' {"a": 1}', b""),
    "pickle": lambda _: pickle.dumps({"a": 1}, protocol=2) * 20,
    "zip": lambda _: _zip(),
    "git-lfs pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "key twice": _twice,
    "overlap": _overlap,
    "extra field": _entry(extra=1),
    "negative offset": _entry(data_offsets=[-1, 511]),
    "offsets reversed": _entry(data_offsets=[512, 0]),
    "three offsets": _entry(data_offsets=[0, 1, 2]),
    "float offsets": _entry(data_offsets=[0.0, 512.0]),
    "boolean shape": _entry(shape=[True, 128]),
    "huge shape": _entry(shape=[1 << 39, 1 << 39]),
    "empty dimension": _entry(shape=[0, 32]),
    "no dimension": _entry(shape=[]),
    "many dimensions": _entry(shape=[1] * 40),
    "shape and bytes disagree": _entry(shape=[4, 31]),
    "metadata of numbers": lambda w: join({**split(w)[0], "__metadata__": {"a": 1}}, split(w)[1]),
    "metadata is a list": lambda w: join({**split(w)[0], "__metadata__": []}, split(w)[1]),
    "name of a megabyte": lambda w: join({"a." * 1000: split(w)[0][A]}, b""),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(MalformedUpload) as refused:
        admit(with_weights(honest(), change(honest().weights)))
    assert "adapter_model.safetensors" in refused.value.message
    assert len(refused.value.message) < 400


@pytest.mark.parametrize("dtype", ["F64", "I8", "BOOL", "F8_E4M3", "C64", "", None, [], "f32"])
def test_dtype_that_is_not_served(dtype: object) -> None:
    with pytest.raises(AdapterInvalid, match="has dtype"):
        admit(with_weights(honest(), _entry(dtype=dtype)(honest().weights)))


def _put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


def _drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _fill(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][-1, -1] = value

    return change


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


INVALID: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "NaN": (_fill(A, float("nan")), "NaN"),
    "infinity": (_fill(B, float("inf")), "NaN"),
    "minus infinity": (_fill(B, float("-inf")), "NaN"),
    "beyond the cap": (_fill(A, 1e6), "beyond 65504"),
    "partner missing": (_drop(B), "is missing"),
    "site of another layer": (_rename(A, A.replace("layers.0", "layers.9")), "names no module"),
    "another prefix": (_rename(A, A.removeprefix(PREFIX)), "not a key of LORA"),
    "base weight smuggled in": (_put(f"{PREFIX}lm_head.weight", torch.zeros(64, 32)), "modules_to_save"),
    "base norm smuggled in": (_put(f"{PREFIX}model.norm.weight", torch.zeros(32)), "modules_to_save"),
    "base bias smuggled in": (_put(f"{PREFIX}{Q0}.bias", torch.zeros(32)), "not a tensor of LORA"),
    "base layer smuggled in": (_put(f"{PREFIX}{Q0}.base_layer.weight", torch.zeros(32, 32)), "differs"),
    "resized vocabulary": (_put(f"{PREFIX}lm_head.weight", torch.zeros(66, 32)), "vocabulary was resized"),
    "unknown suffix": (_put(f"{PREFIX}{Q0}.lora_C.weight", torch.zeros(4, 4)), "not a tensor of LORA"),
    "magnitude without DoRA": (_put(f"{PREFIX}{Q0}.lora_magnitude_vector", torch.ones(32)), "not a tensor of LORA"),
    "task head": (_put(f"{PREFIX}score.weight", torch.zeros(2, 32)), "task head"),
    "head by another name": (_put(f"{PREFIX}classifier.dense.weight", torch.zeros(2, 32)), "task head"),
    "LoRA on a norm": (_put(f"{PREFIX}model.norm.lora_A.weight", torch.zeros(4, 32)), "norm module"),
    "dunder": (_put(f"{PREFIX}__class__.weight", torch.zeros(4, 4)), "names no module"),
    "control characters": (_put(f"{PREFIX}a\n\x1b[31m.weight", torch.zeros(4, 4)), "names no module"),
    "transposed": (_put(A, torch.zeros(32, 4)), "has shape"),
    "32-bit integers": (lambda t: t.update({A: t[A].int()}), "has dtype"),
    "64-bit integers": (lambda t: t.update({A: t[A].long()}), "has dtype"),
    "bytes": (lambda t: t.update({A: torch.ones(4, 32, dtype=torch.uint8)}), "has dtype"),
    "another rank": (lambda t: t.update({A: torch.zeros(8, 32), B: torch.zeros(32, 8)}), "has shape"),
}


@pytest.mark.parametrize(("change", "reason"), INVALID.values(), ids=INVALID.keys())
def test_readable_and_refused(change: Callable[[dict[str, Tensor]], None], reason: str) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_tensors(honest(), change))
    parts = reason.split("|")
    assert any(part in error.reason for error in refused.value.errors for part in parts), refused.value.errors
    assert all(error.path.isprintable() for error in refused.value.errors)


def test_nothing_in_the_file() -> None:
    for files in (honest(), with_config(honest(), target_modules="all-linear")):
        with pytest.raises(AdapterInvalid):
            admit(with_weights(files, save({})))


def test_values_beyond_the_compute_type_after_compilation() -> None:
    """Each value is fine and their product is not: the compiled adapter is checked as well."""
    from peft_serve.adapters.compiler import compile_adapter
    from peft_serve.adapters.gate import inspect
    from tests.adapters.fake_base import FakeBase
    from tests.attacks.hostile import base_of

    files = with_config(with_tensors(honest(), _fill(B, 60000.0)), lora_alpha=8000)
    half = FakeBase(base_of("llama").model, dtype=torch.float16)
    with pytest.raises(AdapterInvalid, match="not finite after compilation"):
        compile_adapter(inspect(files, half, GateLimits()), half, GateLimits())


def test_too_many_tensors() -> None:
    with pytest.raises(AdapterInvalid, match="at most 5"):
        admit(honest(), limits=GateLimits(max_tensors=5))


def test_leftovers_of_training_are_named_and_not_read() -> None:
    from peft_serve.adapters.gate import inspect
    from tests.attacks.hostile import base_of

    base = base_of("llama")
    files = with_tensors(
        honest(),
        lambda t: t.update(
            {
                f"{PREFIX}{Q0}.lora_velora_embed": torch.ones(3),
                f"{PREFIX}model.norm.weight": base.weight("model.norm").clone(),
            }
        ),
    )
    inspected = inspect(files, base, GateLimits())
    assert sum("not read" in warning for warning in inspected.summary.warnings) == 2
    plain, changed = admit(honest()), admit(files)
    assert plain.sites.keys() == changed.sites.keys()


def test_small_upload_is_judged_quickly() -> None:
    admit(honest())
    start = time.perf_counter()
    with pytest.raises(AdapterInvalid):
        admit(with_tensors(honest(), _fill(A, float("nan"))))
    assert time.perf_counter() - start < 1.0  # 100 ms on a quiet machine; tests share theirs


def test_embedding_copy_of_another_base_replaces_the_weight() -> None:
    """LoRA on an embedding saves the table it was trained on; where that differs in values only, it is served."""
    from peft_serve.adapters.primitives import Replace
    from tests.attacks.hostile import base_of

    path = "model.embed_tokens"
    files = honest("lora_embedding")
    table = base_of("llama").model.get_submodule(path).weight.detach() + 1
    changed = with_tensors(files, _put(f"{PREFIX}{path}.base_layer.weight", table))
    edit, plain = admit(changed).sites[path], admit(files).sites[path]
    assert isinstance(edit, Replace)
    delta = plain.delta.b_OR @ plain.delta.a_RI
    assert torch.allclose(edit.state["weight"], table + delta.T, atol=1e-6)


def test_embedding_copy_of_another_base_is_refused_where_the_head_shares_it() -> None:
    files = honest("lora_embedding", "llama_tied")
    changed = with_tensors(files, _put(f"{PREFIX}model.embed_tokens.base_layer.weight", torch.ones(64, 32)))
    with pytest.raises(AdapterInvalid, match="differs from the served base"):
        admit(changed, "llama_tied")
