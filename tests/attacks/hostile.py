"""An honest checkpoint, and the tools to make it hostile."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.records import CheckpointFiles
from tests.adapters.checkpoints import make_base, make_checkpoint
from tests.adapters.fake_base import FakeBase

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


@cache
def base_of(kind: str) -> FakeBase:
    return FakeBase(make_base(kind))


@cache
def honest(method: str = "lora", kind: str = "llama") -> CheckpointFiles:
    return make_checkpoint(method, kind)[0]


def with_config(files: CheckpointFiles, **changes: Any) -> CheckpointFiles:
    """The config with fields set; `...` removes one."""
    config = {**json.loads(files.config), **changes}
    kept = {name: value for name, value in config.items() if value is not ...}
    return CheckpointFiles(config=json.dumps(kept).encode(), weights=files.weights)


def with_tensors(files: CheckpointFiles, change: Callable[[dict[str, Tensor]], None]) -> CheckpointFiles:
    tensors = load(files.weights)
    change(tensors)
    return CheckpointFiles(config=files.config, weights=save(tensors))


def with_weights(files: CheckpointFiles, weights: bytes) -> CheckpointFiles:
    return CheckpointFiles(config=files.config, weights=weights)


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def join(header: Mapping[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def admit(files: CheckpointFiles, kind: str = "llama", limits: GateLimits | None = None) -> Adapter:
    """Through the gate and the compiler; whatever happens, the base stays as it was."""
    base, bounds = base_of(kind), limits or GateLimits()
    before = base.fingerprint()
    try:
        return compile_adapter(inspect(files, base, bounds), base, bounds)
    finally:
        assert base.fingerprint() == before
