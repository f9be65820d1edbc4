"""On a CPU an adapter is in memory once: its slot reads the copy that the host keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from peft_serve.adapters.compiled_files import CompiledFiles
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter
from peft_serve.config import Settings
from peft_serve.engine.cpu_kernels import speed_up
from peft_serve.kernels.low_rank import LayerFactors
from peft_serve.kernels.native import find_compiler
from peft_serve.model.base import ResidentBase
from peft_serve.model.sites_forward import DenseSite
from tests.adapters.checkpoints import make_base, make_checkpoint

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")


def _compiled(base: ResidentBase) -> Adapter:
    return compile_adapter(inspect(make_checkpoint("lora", "llama")[0], base, GateLimits()), base, GateLimits())


def _read_back(adapter: Adapter) -> Adapter:
    files = CompiledFiles(Adapter)
    written = files.encode(adapter, label="x", elsewhere={})
    content = torch.empty(len(written), dtype=torch.uint8)
    content.numpy()[:] = bytearray(written)
    found = files.decode(content, label="x", fetch=_nothing)
    assert isinstance(found, Adapter)
    return found


def _nothing(name: str) -> Sequence[Tensor]:
    raise AssertionError(f"nothing is written apart, and {name} is asked for")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [lambda adapter: adapter, _read_back], ids=["compiled", "read"])
def test_what_a_slot_reads_is_the_host_copy(kept: Callable[[Adapter], Adapter], dtype: torch.dtype) -> None:
    base = ResidentBase(make_base("llama").to(dtype), name="tiny")
    speed_up(Settings(prepack="on", cpu_kernels="on"), base, os.environ, lambda _: None)
    adapter = kept(_compiled(base))
    (host,) = {t.untyped_storage().data_ptr() for t in adapter.tensors()}
    base.adapted.install(3, adapter)
    factors = [s.dense.delta._direct for s in base.adapted.at.values() if isinstance(s, DenseSite)]
    held = [tensor for f in factors if isinstance(f, LayerFactors) for tensor in f._kept.get(3, ())]
    assert len(held) == 2 * len(adapter.sites) > 0
    assert {tensor.untyped_storage().data_ptr() for tensor in held} == {host}
