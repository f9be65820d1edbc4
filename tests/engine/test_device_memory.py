"""How much memory KV blocks and adapters have, each by itself or both together; a server that runs on one budget."""

from __future__ import annotations

import asyncio
import time
from errno import ENOMEM
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_serve.config import Settings
from peft_serve.core import FinishEvent, FinishReason, Request, RequestId, SamplingParams, TokenEvent
from peft_serve.engine import assembly as assembly_module
from peft_serve.engine import device_memory as device_memory_module
from peft_serve.engine.assembly import build
from peft_serve.engine.client import EngineClient
from peft_serve.engine.device_memory import budget_of, device_memory, workspace_bytes
from peft_serve.model.arena import Arena
from peft_serve.model.base import ResidentBase
from tests.model.tiny_encoders import tiny_encoder
from tests.model.tiny_models import tiny

MIB = 1 << 20


def base(name: str = "llama") -> ResidentBase:
    return ResidentBase(tiny_encoder(name) if name == "bert" else tiny(name), name=name)


def sized(**changes: Any) -> Settings:
    return Settings(device="cpu", max_rows=4, block_size=16, **changes)


def silent(_: str) -> None:
    """Nobody listens."""


class Gpu:
    """A base as `budget_of` sees it, on a GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.shape = base().shape
        self.dtype = torch.float32


def test_without_a_budget_each_side_has_its_own() -> None:
    memory = device_memory(sized(kv_cache_bytes=MIB, device_adapter_bytes=77), base(), 64, silent)
    assert memory.carrier is None
    assert memory.sizes.max_adapter_bytes == 77
    assert (memory.sizes.num_adapter_blocks, memory.sizes.spacing) == (0, 1)
    assert memory.sizes.num_blocks == 1 + 4 * (64 // 16 + 2), "no more than every row at full length"


def test_a_gpu_gives_the_share_that_is_left_of_it() -> None:
    settings = sized(gpu_memory_utilization=0.5, max_step_tokens=16)
    gpu: Any = Gpu()
    room = workspace_bytes(settings, gpu)
    assert room > 0
    assert budget_of(settings, gpu, lambda _: (700 * MIB, 1000 * MIB)) == 200 * MIB - room
    assert budget_of(settings, base(), lambda _: (1, 1)) is None, "a CPU has no share"
    off = settings.model_copy(update={"gpu_memory_utilization": 0.0})
    assert budget_of(off, gpu, lambda _: (1, 1)) is None
    told = settings.model_copy(update={"device_memory_bytes": 5 * MIB})
    assert budget_of(told, gpu, lambda _: (1, 1)) == 5 * MIB
    with pytest.raises(ValueError, match=r"--gpu-memory-utilization 0.5: .* nothing is left"):
        budget_of(settings, gpu, lambda _: (400 * MIB, 1000 * MIB))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_budget_is_kept_and_each_side_has_something_for_certain(name: str) -> None:
    said: list[str] = []
    settings = sized(device_memory_bytes=4 * MIB, kv_cache_bytes=MIB, device_adapter_bytes=MIB)
    memory = device_memory(settings, base(name), 4096, said.append)
    sizes, carrier = memory.sizes, memory.carrier
    assert carrier is not None
    block = carrier.arena.block_bytes
    cross = max(0, sizes.num_cross_blocks - 1)
    assert 4 * MIB - 3 * block <= carrier.arena.memory.nbytes + cross * block <= 4 * MIB
    assert sizes.num_blocks == carrier.arena.num_blocks - 1, "the last one is nobody's"
    assert sizes.num_adapter_blocks == MIB // block
    kept_for_requests = sizes.num_blocks - 1 - sizes.max_adapter_bytes // block
    assert kept_for_requests + cross == MIB // block
    assert sizes.spacing == carrier.arena.num_parts
    assert said == [f"{sizes.num_blocks - 1} blocks of {block} bytes for the KV cache and adapters"]


def test_what_is_wanted_for_certain_shrinks_with_a_small_budget() -> None:
    memory = device_memory(sized(device_memory_bytes=2 * MIB), base(), 4096, silent)
    sizes = memory.sizes
    assert 0.45 < sizes.num_adapter_blocks / sizes.num_blocks < 0.55, "half and half, as the settings have it"


def test_a_budget_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="too few for KV blocks"):
        device_memory(sized(device_memory_bytes=MIB).model_copy(update={"block_size": 1 << 14}), base(), 64, silent)


@pytest.mark.parametrize(("name", "num_cross_blocks"), [("llama", 0), ("t5", 2)])
def test_less_than_a_block_is_one_block(name: str, num_cross_blocks: int) -> None:
    settings = sized(kv_cache_bytes=MIB).model_copy(update={"block_size": 1 << 14})
    sizes = device_memory(settings, base(name), 64, silent).sizes
    assert (sizes.num_blocks, sizes.num_cross_blocks) == (2, num_cross_blocks), "and the one that is nobody's"


def test_an_encoder_gives_it_all_to_adapters() -> None:
    memory = device_memory(sized(device_memory_bytes=3 * MIB), base("bert"), 64, silent)
    assert (memory.carrier, memory.sizes.max_adapter_bytes) == (None, 3 * MIB)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError(), OSError(ENOMEM, "Cannot allocate memory")])
def test_a_device_that_has_less_than_it_says_gives_less(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(*, num_blocks: int, **facts: Any) -> Arena:
        if num_blocks > fits:
            raise error
        return Arena(num_blocks=num_blocks, **facts)

    monkeypatch.setattr(device_memory_module, "Arena", small)
    settings, said = sized(device_memory_bytes=4 * MIB, kv_cache_bytes=MIB, device_adapter_bytes=MIB), list[str]()
    wanted = 4 * MIB // base().runs.cache.bytes_per_block(16, torch.float32)
    fits = int(0.8 * wanted)
    sizes = device_memory(settings, base(), 4096, said.append).sizes
    assert 0.7 * wanted < sizes.num_blocks <= fits
    assert "less memory than it said" in said[0]
    fits = 3
    with pytest.raises(ValueError, match=r"no memory for .* --gpu-memory-utilization"):
        device_memory(settings, base(), 4096, silent)


async def test_a_server_on_one_budget_gives_the_same_answers(tmp_path: Path) -> None:
    """Adapters that do not fit side by side come and go in the blocks of the KV cache."""
    answers = {}
    for budget in (None, 24 * MIB):
        settings = Settings(
            model="demo-llama",
            device="cpu",
            prepack="off",
            num_threads=1,
            store=tmp_path / f"store {budget}",
            max_rows=4,
            device_memory_bytes=budget,
            kv_cache_bytes=4 * MIB,
            device_adapter_bytes=16 * MIB,
        )
        parts, engine = await asyncio.to_thread(build, settings, lambda _line: None)
        client = EngineClient(engine, asyncio.get_running_loop())
        engine.start()
        names = [entry.name for entry in parts.catalog.list()][:4]
        asked = [
            Request(
                id=RequestId(f"r{number}"),
                adapter=parts.catalog.resolve(name).id,
                prompt=tuple(range(5, 40 + number)),
                sampling=SamplingParams(max_new_tokens=6, ignore_eos=True, seed=1),
                arrival_s=time.monotonic(),
            )
            for number, name in enumerate((*names, *names))
        ]

        async def answer(one: Request, client: EngineClient = client) -> list[int]:
            events = [event async for event in client.submit(one)]
            assert isinstance(events[-1], FinishEvent)
            assert events[-1].reason is FinishReason.LENGTH, events[-1].error
            return [event.token for event in events if isinstance(event, TokenEvent)]

        answers[budget] = await asyncio.gather(*map(answer, asked))
        await asyncio.to_thread(engine.stop)
        engine._scheduler.check()
        if budget is not None:
            resident = engine._scheduler.snapshot().resident
            assert resident
            assert any(engine._scheduler._residency._own.pages(one.adapter) for one in resident)
    assert answers[None] == answers[24 * MIB]
    assert len({tuple(answer) for answer in answers[None]}) > 2


def test_a_server_that_does_not_fit_says_what_to_make_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_base(*_: Any, **__: Any) -> ResidentBase:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB")

    monkeypatch.setattr(assembly_module, "load_base", load_base)
    settings = Settings(model="demo-llama", device="cpu", store=tmp_path / "store")
    for _ in range(2):  # the store's lock is given back
        with pytest.raises(ValueError, match=r"14\.00 GiB.*--gpu-memory-utilization"):
            build(settings, silent)
