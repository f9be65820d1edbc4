"""What a simulated run comes to: where adapters were found, times to the first token, goodput, and how even it was."""

from dataclasses import dataclass

import numpy as np

from loadtest.measure import ratio
from loadtest.simulation.cluster import REFUSED, Played
from loadtest.simulation.replica import FOUND_IN
from loadtest.simulation.traffic import BASE_NUMBER, Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Requests that come from `start_s` on count, and their first token is in time within `within_s`."""

    start_s: float
    end_s: float
    within_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of the requests in the window."""

    found: tuple[float, ...]  # shares by tier, in the order of `FOUND_IN`, of the served requests for adapters
    ttft_p50_s: float
    ttft_p99_s: float
    in_time: float  # share of all requests; those that were refused are not
    goodput: float  # answer tokens a second and replica, of the requests in time
    most_over_mean: float  # requests of the replica that got the most, over the mean
    num_hot: int  # replicas that served the adapter asked for most
    refused: float  # share of all requests


def figures(traffic: Traffic, played: Played, window: Window) -> Figures:
    """The figures of a run."""
    counts = (traffic.times_s >= window.start_s) & (traffic.times_s < window.end_s)
    if not counts.any():
        raise ValueError("no request comes in the measured time: take a longer --duration or a higher --rho")
    served = counts & (played.replicas != REFUSED)
    ttft_s = played.first_s - traffic.times_s
    in_time = served & (np.nan_to_num(ttft_s, nan=np.inf) <= window.within_s)
    with_adapter = served & (traffic.adapters != BASE_NUMBER)
    by_tier = np.bincount(played.found_in[with_adapter], minlength=len(FOUND_IN))
    by_replica = np.bincount(played.replicas[served], minlength=len(played.busy_s))
    seconds = window.end_s - window.start_s
    p50, p99 = np.percentile(ttft_s[served], [50, 99]) if served.any() else (np.nan, np.nan)
    return Figures(
        found=tuple(ratio(float(count), float(by_tier.sum())) for count in by_tier),
        ttft_p50_s=float(p50),
        ttft_p99_s=float(p99),
        in_time=ratio(float(in_time.sum()), float(counts.sum())),
        goodput=float(traffic.answers[in_time].sum()) / seconds / len(played.busy_s),
        most_over_mean=ratio(float(by_replica.max()), float(by_replica.mean())),
        num_hot=_num_hot(traffic, played, with_adapter),
        refused=1 - ratio(float(served.sum()), float(counts.sum())),
    )


def _num_hot(traffic: Traffic, played: Played, counted: np.ndarray) -> int:
    """Replicas that served the adapter asked for most."""
    if not counted.any():
        return 0
    hottest = np.bincount(traffic.adapters[counted]).argmax()
    return len(np.unique(played.replicas[counted & (traffic.adapters == hottest)]))
