"""The access log: one line for each exchange, at its end. Names, sizes and times; no text of prompts or answers.

Lines go to the logger `peft_serve.access`, in the format of all the others. Probes are told at level debug, failures
of the server's at level warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from peft_serve.api.exchanges import Exchange, Work
from peft_serve.metrics import RequestFigures

MAX_NAMES: Final = 8
"""Different adapters that one line names; a call can be for hundreds."""
MAX_PATH_CHARS: Final = 200


class AccessLog:
    """Called with each exchange and the id of its trace. The client's address is told only `with_client`."""

    def __init__(self, *, with_client: bool) -> None:
        self._with_client = with_client
        self._log = logging.getLogger("peft_serve.access")

    def __call__(self, exchange: Exchange, trace_id: str | None) -> None:
        level = _level(exchange)
        if not self._log.isEnabledFor(level):
            return
        known = fields_of(exchange) | {"trace_id": trace_id}
        if self._with_client:
            known["client"] = exchange.client
        fields = {name: value for name, value in known.items() if value is not None}
        self._log.log(level, "request", extra={"fields": fields})


def _level(exchange: Exchange) -> int:
    if exchange.is_probe:
        return logging.DEBUG
    return logging.WARNING if exchange.status is not None and exchange.status >= 500 else logging.INFO


def fields_of(exchange: Exchange) -> dict[str, Any]:
    """What a line tells, by the names that `docs/operations.md` explains; times in milliseconds."""
    return {
        "request_id": exchange.request_id,
        "http_method": exchange.method,
        "path": exchange.path[:MAX_PATH_CHARS],
        "route": exchange.route,
        "status": exchange.status,
        "outcome": None if exchange.is_whole else "broken_off",
        "error": exchange.error,
        "tenant": exchange.tenant,
        **_of_works(exchange.works),
        "total_ms": _ms(exchange.total_s),
    }


def _of_works(works: tuple[Work, ...]) -> dict[str, Any]:
    """Of several requests to the engine the sums of the tokens and the longest times; those that did not go well
    make the outcome."""
    if not works:
        return {}
    figures = [work.figures for work in works]
    failed = [each.outcome for each in figures if each.outcome != "ok"]
    firsts = [each.ttft_s for each in figures if each.ttft_s is not None]
    fields: dict[str, Any] = {
        "adapter": _joined(each.adapter for each in figures),
        "digest": _joined(digest for work in works for digest in work.digests) or None,
        "peft_type": _joined(each.method for each in figures),
        "inputs": len(works) if len(works) > 1 else None,
        "prompt_tokens": sum(each.num_prompt_tokens for each in figures),
        "output_tokens": sum(each.num_output_tokens for each in figures),
        "cached_tokens": sum(each.num_cached_tokens for each in figures),
        "queue_ms": _longest(figures, lambda each: each.queue_s),
        "load_ms": _longest(figures, lambda each: each.load_s),
        "ttft_ms": _ms(max(firsts)) if firsts else None,
    }
    return fields | ({"outcome": _joined(failed)} if failed else {})


def _joined(names: Iterable[str]) -> str:
    different = list(dict.fromkeys(names))
    more = [f"+{len(different) - MAX_NAMES} more"] if len(different) > MAX_NAMES else []
    return ",".join([*different[:MAX_NAMES], *more])


def _longest(figures: Iterable[RequestFigures], seconds_of: Callable[[RequestFigures], float]) -> float:
    return _ms(max(map(seconds_of, figures)))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
