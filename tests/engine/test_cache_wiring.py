"""A server's tiers, put together from settings: policy, figures and trace reach them all."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from peft_serve.config import Settings
from peft_serve.core import FinishEvent, FinishReason, Request, RequestId, SamplingParams
from peft_serve.engine.assembly import build
from peft_serve.engine.client import EngineClient


@pytest.mark.parametrize("policy", ["lru", "cost"])
async def test_requests_leave_their_lookups_in_the_trace_and_the_metrics(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "trace.jsonl"
    settings = Settings(
        model="demo-llama",
        device="cpu",
        prepack="off",
        num_threads=1,
        store=tmp_path / "store",
        eviction_policy=policy,
        cache_trace=path,
        max_resident_adapters=1,
    )
    parts, engine = await asyncio.to_thread(build, settings, lambda _line: None)
    names = [entry.name for entry in parts.catalog.list()][:2]
    first, second = (parts.catalog.resolve(name).id for name in names)
    client = EngineClient(engine, asyncio.get_running_loop())
    engine.start()
    for number, adapter in enumerate((first, first, second, first)):
        wanted = Request(
            id=RequestId(f"r{number}"),
            adapter=adapter,
            prompt=(1, 2, 3),
            sampling=SamplingParams(max_new_tokens=1, ignore_eos=True),
            arrival_s=time.monotonic(),
        )
        events = [event async for event in client.submit(wanted)]
        assert isinstance(events[-1], FinishEvent)
        assert events[-1].reason is FinishReason.LENGTH
    await asyncio.to_thread(engine.stop)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lookups = [(line["tier"], line["adapter"] == first, line["hit"]) for line in lines]
    assert [lookup for lookup in lookups if lookup[0] != "disk"] == [
        *[("host", True, False), ("device", True, False)],
        ("device", True, True),
        *[("host", False, False), ("device", False, False)],
        *[("host", True, True), ("device", True, False)],
    ]
    assert [lookup for lookup in lookups if lookup[0] == "disk"] == [("disk", True, True), ("disk", False, True)]
    assert all(line["bytes"] > 0 for line in lines if line["tier"] == "device")
    page = parts.metrics.render().decode().splitlines()
    assert 'peft_serve_adapter_cache_hits_total{tier="device"} 1.0' in page
    assert 'peft_serve_adapter_cache_misses_total{tier="host"} 2.0' in page
    assert 'peft_serve_adapter_load_seconds_count{tier="host"} 2.0' in page


def test_a_trace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    settings = Settings(model="demo-llama", device="cpu", prepack="off", store=tmp_path, cache_trace=tmp_path)
    with pytest.raises(ValueError, match=r"--cache-trace .*cannot be written"):
        build(settings, lambda _line: None)


async def test_what_a_step_may_hold_is_what_the_settings_say(tmp_path: Path) -> None:
    said = {"max_rows": 5, "max_step_tokens": 48, "max_step_s": 0.125, "max_step_adapters": 3, "max_queue": 7}
    store = tmp_path / "store"
    settings = Settings(model="demo-llama", device="cpu", prepack="off", num_threads=1, store=store, **said)
    _, engine = await asyncio.to_thread(build, settings, lambda _line: None)
    limits = engine._scheduler._limits
    assert {name: getattr(limits, name) for name in said} == said
    engine.start()
    await asyncio.to_thread(engine.stop)
