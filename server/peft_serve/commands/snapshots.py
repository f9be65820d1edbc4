"""What a server does now, twice a second: from its event stream, or put together from two readings of `/metrics`.

Both give the shape of `/v1/events`; what a metrics page cannot tell (the rows, which slot holds whom) is empty there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.link import ServerLink, reaching, refuse

EVERY_S: Final = 0.5
_Samples = Mapping[str, list[tuple[Mapping[str, str], float]]]


def snapshots(
    link: ServerLink, *, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
) -> Generator[dict[str, Any], None, None]:
    """One snapshot after another, without end; raises CommandFailed when the server goes away."""
    with reaching(link.url), link.client.stream("GET", "/v1/events") as answer:
        if answer.status_code < 400:
            yield from _streamed(answer)
            raise CommandFailed(Exit.UNREACHABLE, f"the server at {link.url} ended its stream; it may be stopping")
        if answer.status_code not in (404, 405):
            refuse(answer, answer.read())
    yield from _from_metrics(link, sleep, clock)


def _streamed(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))


def _from_metrics(
    link: ServerLink, sleep: Callable[[float], None], clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    began = earlier_s = clock()
    earlier = samples(link.ask("GET", "/metrics").text)
    while True:
        sleep(EVERY_S)
        now_s, page = clock(), samples(link.ask("GET", "/metrics").text)
        yield between(earlier, page, max(1e-9, now_s - earlier_s)) | {"time": now_s - began}
        earlier, earlier_s = page, now_s


def samples(page: str) -> _Samples:
    """A page in Prometheus' text format, by the name of the sample."""
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(page: _Samples, name: str) -> float:
    """The sum over the labels; 0 where there is none."""
    return sum(value for _, value in page.get(name, ()))


def between(earlier: _Samples, later: _Samples, seconds: float) -> dict[str, Any]:
    """A snapshot from two pages that lie so many seconds apart."""

    def rate(name: str) -> float:
        return max(0.0, total(later, name) - total(earlier, name)) / seconds

    steps = total(later, "peft_serve_step_seconds_count") - total(earlier, "peft_serve_step_seconds_count")
    stepped = total(later, "peft_serve_step_seconds_sum") - total(earlier, "peft_serve_step_seconds_sum")
    info = next(iter(later.get("vllm:lora_requests_info", ())), ({}, 0.0))[0]
    queries = total(later, "vllm:prefix_cache_queries_total")
    tiers = {tier: _tier(later, tier) for tier in ("device", "host")}
    return {
        "state": "running",
        "queue": {
            "waiting": int(total(later, "vllm:num_requests_waiting")),
            "loading": 0,
            "adapters": [{"name": name, "waiting": None} for name in _names(info, "waiting_lora_adapters")],
        },
        "num_running": int(total(later, "vllm:num_requests_running")),
        "rows": [],
        "slots": [
            {"slot": i + 1, "adapter": name, "bytes": None, "in_flight": None, "pinned": False}
            for i, name in enumerate(_names(info, "running_lora_adapters"))
        ],
        "num_slots": int(info.get("max_lora") or 0),
        "tiers": tiers,
        "kv_usage": total(later, "vllm:kv_cache_usage_perc"),
        "tokens_per_s": rate("vllm:generation_tokens_total"),
        "prompt_tokens_per_s": rate("vllm:prompt_tokens_total"),
        "requests_per_s": rate("vllm:request_success_total"),
        "step_ms": 1000 * stepped / steps if steps > 0 else None,
        "prefix_cache_hit_share": total(later, "vllm:prefix_cache_hits_total") / queries if queries else None,
    }


def _tier(page: _Samples, tier: str) -> dict[str, float]:
    resident = [value for labels, value in page.get("peft_serve_adapter_resident", ()) if labels.get("tier") == tier]
    in_bytes = [value for labels, value in page.get("peft_serve_adapter_bytes", ()) if labels.get("tier") == tier]
    return {"adapters": int(sum(resident)), "bytes": int(sum(in_bytes))}


def _names(info: Mapping[str, str], label: str) -> list[str]:
    return [name for name in info.get(label, "").split(",") if name]
