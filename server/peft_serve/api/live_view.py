"""The moment as `/v1/events` tells it: queue, rows, slots, tiers and rates. Pure functions over the engine's facts.

Counts, sizes and names of adapters only: no token and no text of anybody's request is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from peft_serve.api.rates import Rates
from peft_serve.core import BASE, AdapterId, Row
from peft_serve.engine.snapshot import EngineSnapshot
from peft_serve.engine.tally import is_prefill

MAX_ROWS: Final = 256
BASE_WORD: Final = "base"


def live_view(
    snapshot: EngineSnapshot,
    rows: Sequence[tuple[AdapterId, Row]],
    rates: Rates,
    *,
    time_s: float,
    name_of: Callable[[AdapterId], str],
    method_of: Callable[[AdapterId], str | None],
) -> dict[str, Any]:
    """One event. `rows` are those of a step, with their adapters; the functions name an adapter and its peft type."""
    waiting = zip(snapshot.waiting_adapters, snapshot.num_waiters, strict=True)

    def named(adapter: AdapterId) -> str:
        return BASE_WORD if adapter == BASE else name_of(adapter)

    return {
        "time": round(time_s, 3),
        "state": snapshot.state.value,
        "queue": {
            "waiting": snapshot.num_waiting,
            "loading": snapshot.num_loading,
            "adapters": [{"name": named(adapter), "waiting": count} for adapter, count in waiting],
        },
        "rows": [
            {
                "adapter": named(adapter),
                "method": BASE_WORD if adapter == BASE else method_of(adapter),
                "phase": "prefill" if is_prefill(row) else "decode",
                "tokens": _num_tokens(row),
            }
            for adapter, row in rows[:MAX_ROWS]
        ],
        "slots": [
            {
                "slot": resident.slot,
                "adapter": named(resident.adapter),
                "bytes": resident.num_bytes,
                "in_flight": resident.num_leases,
                "pinned": resident.is_pinned,
            }
            for resident in sorted(snapshot.resident, key=lambda each: each.slot)
        ],
        "num_slots": snapshot.num_slots,
        "tiers": {
            "device": {"adapters": len(snapshot.resident), "bytes": snapshot.device_bytes},
            "host": {"adapters": len(snapshot.host_adapters), "bytes": snapshot.host_bytes},
        },
        "kv_usage": round(snapshot.kv_usage, 4),
        "tokens_per_s": round(rates.tokens_per_s, 1),
        "prompt_tokens_per_s": round(rates.prompt_tokens_per_s, 1),
        "requests_per_s": round(rates.requests_per_s, 2),
        "step_ms": None if rates.step_ms is None else round(rates.step_ms, 2),
        "prefix_cache_hit_share": None if rates.cached_share is None else round(rates.cached_share, 4),
    }


def seen_view(view: dict[str, Any], sees: Callable[[str], bool]) -> dict[str, Any]:
    """An event without the rows, slots and waiting requests of adapters that are not seen; sums are the server's."""

    def kept(name: str) -> bool:
        return name == BASE_WORD or sees(name)

    waiting = [each for each in view["queue"]["adapters"] if kept(each["name"])]
    return view | {
        "queue": view["queue"] | {"adapters": waiting},
        "rows": [row for row in view["rows"] if kept(row["adapter"])],
        "slots": [slot for slot in view["slots"] if kept(slot["adapter"])],
    }


def _num_tokens(row: Row) -> int:
    """Tokens of prompt and answer that are computed with this row; on an encoder those of its text."""
    return max(row.start + len(row.tokens) - row.prompt[0], len(row.source))
