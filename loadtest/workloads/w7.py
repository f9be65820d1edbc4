"""W7: how often is an adapter in a host cache that holds a tenth, a quarter or half of them all?

One request at a time over a skewed population of mixed sizes, with a single slot on the device, so that nearly every
change of adapter asks the host cache. Each point is a server of its own, with a budget of bytes and an eviction
policy. Beside them stands what the same accesses give offline, for the same policies and for Belady's, which knows
the future: for adapters of one size no policy hits more often.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path

from loadtest.acts import sender, unload
from loadtest.adapters import adapter_name
from loadtest.cache_replay import POLICIES as SIMULATED
from loadtest.cache_replay import Accesses, Tally, simulate
from loadtest.measure import ratio, summarise
from loadtest.outcome import Outcome
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.server import RunningServer, metrics_delta
from loadtest.stage import Stage
from loadtest.trace import Trace
from peft_serve.core import AdapterId

SHARES = (0.1, 0.25, 0.5)
POLICIES = ("lru", "cost")
POPULARITY = "zipf:1"
LOADS = 'peft_serve_adapter_load_seconds_count{tier="host"}'
LOAD_S = 'peft_serve_adapter_load_seconds_sum{tier="host"}'
LOADED_BYTES = 'peft_serve_adapter_cache_loaded_bytes_total{tier="host"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One cache: what was asked of it, and what it had to load."""

    policy: str
    share: float
    num_requests: int
    asked_bytes: int
    num_loads: float
    loaded_bytes: float
    load_s: float
    ttft_p99_s: float = nan
    num_failed: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of requests whose adapter was in memory."""
        return 1 - ratio(self.num_loads, self.num_requests)

    @property
    def byte_hit_rate(self) -> float:
        """The same by bytes."""
        return 1 - ratio(self.loaded_bytes, self.asked_bytes)


def run(stage: Stage) -> Report:
    """Play W7; ``--adapters`` is the population."""
    if stage.options.url is not None:
        raise ValueError("w7 decides the size and policy of its server's cache: leave --url out")
    quick = stage.options.quick
    count = stage.options.pick_adapters(whole=40, quick=10)
    names = tuple(map(adapter_name, range(count)))
    sizes = {name: size_of(folder) for name, folder in zip(names, stage.adapter_folders(count), strict=True)}
    trace = stage.trace(adapters=names, popularity=POPULARITY, num_requests=30 if quick else 400)
    shares = SHARES[1:2] if quick else SHARES
    points = []
    for share in shares:
        budget = int(share * sum(sizes.values()))
        for policy in POLICIES:
            extra = ("--max-resident-adapters=1", f"--host-adapter-bytes={budget}", f"--eviction-policy={policy}")
            with stage.server(name=f"server-{policy}-{share:g}", num_adapters=count, extra=extra) as server:
                unload(sender(server.url, api_key=stage.options.api_key), names)  # uploads are tried out, and stay
                points.append(play(stage, server, trace, sizes, policy=policy, share=share))
    simulated = {share: offline(trace, sizes, share) for share in shares}
    return report(points, simulated, count)


def play(
    stage: Stage, server: RunningServer, trace: Trace, sizes: Mapping[str, int], *, policy: str, share: float
) -> Point:
    """One request after the other; what the server loaded meanwhile is read from its metrics."""
    before = server.metrics()
    outcomes = stage.closed_loop(server, trace, f"{policy}, {share:.0%} of the bytes", concurrency=1)
    return point(outcomes, metrics_delta(before, server.metrics()), sizes, policy=policy, share=share)


def point(
    outcomes: list[Outcome], moved: Mapping[str, float], sizes: Mapping[str, int], *, policy: str, share: float
) -> Point:
    """What a server's counters say of a run; a server that does not count bytes leaves the byte hit rate open."""
    found = summarise(outcomes)
    return Point(
        policy=policy,
        share=share,
        num_requests=len(outcomes),
        asked_bytes=sum(sizes[outcome.adapter] for outcome in outcomes),
        num_loads=moved.get(LOADS, 0.0),
        loaded_bytes=moved.get(LOADED_BYTES, nan if moved.get(LOADS) else 0.0),
        load_s=moved.get(LOAD_S, 0.0),
        ttft_p99_s=found.ttft_p99_s,
        num_failed=found.num_failed,
    )


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint's tensors: the file without its header, which begins with its own length."""
    path = folder / "adapter_model.safetensors"
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    return path.stat().st_size - 8 - int(header)


def offline(trace: Trace, sizes: Mapping[str, int], share: float) -> dict[str, Tally]:
    """What the trace's accesses give without a server, by policy; loads take as long as they have bytes."""
    sequence = tuple(AdapterId(request.adapter) for request in trace.requests)
    known = {AdapterId(name): size for name, size in sizes.items()}
    accesses = Accesses(sequence=sequence, sizes=known, load_s={name: float(size) for name, size in known.items()})
    budget = int(share * sum(sizes.values()))
    return {name: simulate(accesses, make, budget) for name, make in SIMULATED.items()}


def report(points: list[Point], simulated: Mapping[float, Mapping[str, Tally]], count: int) -> Report:
    """One row for each cache, beside what the accesses give offline, and Belady's row for each size."""
    rows: list[tuple[Cell, ...]] = []
    for one in points:
        tally = simulated[one.share][one.policy]
        rates = (one.hit_rate, one.byte_hit_rate, tally.hit_rate, tally.byte_hit_rate)
        rest = (one.num_loads, one.load_s, 1e3 * one.ttft_p99_s, one.num_failed)
        rows.append((f"{one.share:.0%}", one.policy, *rates, *rest))
    for share, tallies in simulated.items():
        best = tallies["belady"]
        rows.append((f"{share:.0%}", "belady", nan, nan, best.hit_rate, best.byte_hit_rate, nan, nan, nan, 0))
    rates_of = {(one.share, one.policy): one for one in points}
    shares = tuple(simulated)
    return Report(
        name="w7",
        title=f"W7: {points[0].num_requests} requests, one at a time, over {count} adapters ({POPULARITY})",
        columns=(
            *("cache", "policy", "hit rate", "byte hit rate", "offline hit rate", "offline byte hit rate"),
            *("loads", "load s", "TTFT p99 ms", "failed"),
        ),
        rows=tuple(rows),
        notes=tuple(_against_lru(share, rates_of) for share in shares),
        plot=Plot(
            title="Share of requests whose adapter was in the host cache",
            x_label="cache size, share of all adapters' bytes",
            y_label="hit rate",
            series={
                policy: tuple((float(at), rates_of[share, policy].hit_rate) for at, share in enumerate(shares))
                for policy in POLICIES
            },
            bounds={
                "belady, offline": tuple(
                    (float(at), simulated[share]["belady"].hit_rate) for at, share in enumerate(shares)
                )
            },
            ticks=tuple(f"{share:.0%}" for share in shares),
        ),
    )


def _against_lru(share: float, points: Mapping[tuple[float, str], Point]) -> str:
    cost, lru = points[share, "cost"], points[share, "lru"]
    return (
        f"{share:.0%}: cost loads for {ratio(cost.load_s, lru.load_s):.3f} times the seconds of lru, "
        f"hit rate {cost.hit_rate:.3f} against {lru.hit_rate:.3f}"
    )
