"""Whether a server that runs is well: health, admission, clock, base, adapters that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx

import peft_serve
from peft_serve.commands.checkup.finding import Finding, fine, odd, wrong
from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.link import KEY_VARIABLE, ServerLink
from peft_serve.commands.snapshots import samples, total

_MAX_SKEW_S: Final = 30.0


def look_at_server(link: ServerLink, now: Callable[[], float]) -> Iterator[Finding]:
    """What a server tells about itself; `now` is this machine's unix time."""
    try:
        health = link.ask("GET", "/health")
    except CommandFailed as failure:
        yield _unwell(link, failure)
        return
    yield fine("/health", "ok")
    yield from _clock(health, now())
    yield from _readiness(link)
    try:
        yield from _version(link.json("GET", "/info"))
        yield from _metrics(samples(link.ask("GET", "/metrics").text))
        yield from _adapters(link.json("GET", "/adapters")["adapters"])
    except CommandFailed as failure:
        if failure.status not in (401, 403):
            yield wrong("server", f"{link.url} does not answer as a peft-serve does: {failure}", "check the address")
            return
        yield wrong("key", f"{failure}", f"{KEY_VARIABLE} is to hold a key for admin: a check-up reads the metrics")
    except (ValueError, KeyError, TypeError) as error:
        yield wrong("server", f"{link.url} does not answer as a peft-serve does: {error}", "check the address")


def _unwell(link: ServerLink, failure: CommandFailed) -> Finding:
    if failure.exit_code is Exit.UNREACHABLE:
        fact, _, way_out = failure.message.partition("; ")
        return wrong("server", fact, way_out or "start it, or give its address")
    if failure.status == 404:
        return wrong("/health", f"{link.url} has no such route, so it is no peft-serve", "check the address")
    return wrong("/health", failure.message, "restart the server, and look at the end of its log")


def _clock(answer: httpx.Response, now_s: float) -> Iterator[Finding]:
    try:
        skew = parsedate_to_datetime(answer.headers.get("date", "")).timestamp() - now_s
    except (ValueError, TypeError):
        return
    if abs(skew) > _MAX_SKEW_S:
        way = "set the clocks by NTP: versions carry the server's time, and tokens of users may count as expired"
        yield odd("clock", f"the server's clock is {skew:+.0f} s from this machine's", way)
    else:
        yield fine("clock", "agrees with this machine's")


def _readiness(link: ServerLink) -> Iterator[Finding]:
    try:
        link.ask("GET", "/readyz")
    except CommandFailed as failure:
        yield wrong("/readyz", failure.message, "wait until it has started; when it is stopping, start another")
    else:
        yield fine("/readyz", "requests are admitted")


def _version(info: Any) -> Iterator[Finding]:
    theirs, ours = info["version"], peft_serve.__version__
    if theirs != ours:
        yield odd("version", f"the server is {theirs}, this command {ours}", "install the same release on both sides")
    else:
        yield fine("base", f"{info['model_id']}, {info['model_dtype']} on {info['model_device_type']}")


def _metrics(page: Any) -> Iterator[Finding]:
    if total(page, "peft_serve_base_fingerprint_ok") != 1:
        yield wrong(
            "base", "its weights are no longer those the server was started with; nothing more is admitted",
            "restart the server, and check the machine's memory (ECC)",
        )  # fmt: skip
    waiting, usage = int(total(page, "vllm:num_requests_waiting")), total(page, "vllm:kv_cache_usage_perc")
    if waiting and usage > 0.95:
        yield odd("KV cache", f"is {usage:.0%} full and {waiting} requests wait", "raise --kv-cache-bytes")
    failed = sum(
        value for labels, value in page.get("peft_serve_adapter_requests_total", ()) if labels["outcome"] == "failed"
    )
    if failed:
        yield odd("requests", f"{failed:.0f} failed on the server's side since it started", "look into its log")


def _adapters(adapters: Any) -> Iterator[Finding]:
    bad = [each for each in adapters if each["problem"]]
    for each in bad:
        yield wrong(f"adapter {each['name']}", each["problem"], "upload it again, or mend its folder")
    if not bad:
        yield fine("adapters", f"{len(adapters)}, none of them known to be broken")
