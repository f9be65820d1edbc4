"""Figures: what the outcomes of a run amount to.

Throughput is counted in a *window* of the run that leaves out its start, where the batch is still filling, and
its end, where it is emptying; a token counts if it came inside the window, whoever it belongs to.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan, nan

import numpy as np

from loadtest.outcome import UNFINISHED, Outcome

SLO_TTFT_FACTOR = 5.0
"""A first token is in time if it comes within this many unloaded TTFTs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run in figures. Times in seconds; NaN where there was nothing to measure."""

    num_requests: int
    num_ok: int
    errors: dict[str, int]
    window_s: float
    requests_per_s: float
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    e2e_p50_s: float
    e2e_p99_s: float
    share_in_time: float
    max_send_lag_s: float

    @property
    def num_failed(self) -> int:
        """Requests that failed; those cut off by the end of the run are not failures."""
        return sum(count for kind, count in self.errors.items() if kind != UNFINISHED)


def percentile(values: Iterable[float], percent: float) -> float:
    """The percentile by linear interpolation between ranks; NaN of nothing."""
    ranked = np.fromiter(values, dtype=np.float64)
    return float(np.percentile(ranked, percent)) if ranked.size else nan


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else nan


def ratio(above: float, below: float) -> float:
    """above / below; NaN where there is nothing to divide by."""
    return above / below if below and not isnan(below) else nan


def steady_window(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """The window of a run: from a fifth of the time to the sending of the last request."""
    end = max((outcome.sent_s for outcome in outcomes), default=0.0)
    return 0.2 * end, end


def tokens_per_s(outcomes: Iterable[Outcome], window: tuple[float, float]) -> float:
    """Answer tokens that came inside the window, a second."""
    begin, end = window
    inside = sum(begin <= when < end for outcome in outcomes for when in outcome.token_times_s)
    return ratio(inside, end - begin)


def summarise(
    outcomes: Sequence[Outcome], *, window: tuple[float, float] | None = None, unloaded_ttft_s: float | None = None
) -> Summary:
    """The figures of a run; `unloaded_ttft_s` (T0) sets what counts as in time. Percentiles are over every
    answered request, the share in time over every request that was sent."""
    begin, end = steady_window(outcomes) if window is None else window
    answered = [outcome for outcome in outcomes if outcome.ok]
    ttfts = [outcome.ttft_s for outcome in answered if outcome.ttft_s is not None]
    tpots = [outcome.tpot_s for outcome in answered if outcome.tpot_s is not None]
    e2es = [outcome.e2e_s for outcome in answered]
    limit = nan if unloaded_ttft_s is None else SLO_TTFT_FACTOR * unloaded_ttft_s
    finished = sum(begin <= outcome.end_s < end for outcome in answered)
    return Summary(
        num_requests=len(outcomes),
        num_ok=len(answered),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        window_s=end - begin,
        requests_per_s=ratio(finished, end - begin),
        tokens_per_s=tokens_per_s(outcomes, (begin, end)),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        tpot_p50_s=percentile(tpots, 50),
        tpot_p99_s=percentile(tpots, 99),
        e2e_p50_s=percentile(e2es, 50),
        e2e_p99_s=percentile(e2es, 99),
        share_in_time=nan if isnan(limit) else ratio(sum(ttft <= limit for ttft in ttfts), len(outcomes)),
        max_send_lag_s=max((outcome.sent_s - outcome.due_s for outcome in outcomes), default=nan),
    )
