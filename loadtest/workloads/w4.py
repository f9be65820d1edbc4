"""W4: what does it cost that rows of a batch use different adapters? Punica's closed loop.

A fixed number of requests in flight, saturated; the adapters they ask for are all different (distinct), a square
root of them (uniform), skewed, or one and the same (identical); the base alone is the yardstick. Phases are
played forwards and backwards and averaged.
"""

from collections import defaultdict

from loadtest.adapters import adapter_name
from loadtest.measure import Summary, mean, ratio
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.stage import Stage, palindrome

POPULARITIES = ("base", "identical", "skewed", "uniform", "distinct")


def run(stage: Stage) -> Report:
    """Play W4; ``--adapters`` is Punica's N (distinct uses all of them in turn)."""
    count = stage.options.pick_adapters(whole=32, quick=16)
    names = tuple(map(adapter_name, range(count)))
    found: dict[str, list[Summary]] = defaultdict(list)
    with stage.server(num_adapters=count) as server:
        stage.warm(server, names)
        for popularity in palindrome(list(POPULARITIES)):
            trace = stage.endless(()) if popularity == "base" else stage.endless(names, popularity)
            found[popularity].append(stage.saturated(server, trace, popularity))
    return report(dict(found), count, stage.options.concurrency)


def report(found: dict[str, list[Summary]], count: int, concurrency: int) -> Report:
    """Tokens a second by popularity, over Identical and over the base."""
    throughput = {name: mean(one.tokens_per_s for one in passes) for name, passes in found.items()}
    spread = {name: mean(one.tpot_p50_s for one in passes) for name, passes in found.items()}
    rows: list[tuple[Cell, ...]] = [
        (
            *(name, throughput[name]),
            *(ratio(throughput[name], throughput["identical"]), ratio(throughput[name], throughput["base"])),
            *(1e3 * spread[name], sum(one.num_failed for one in found[name])),
        )
        for name in POPULARITIES
    ]
    return Report(
        name="w4",
        title=f"W4: {concurrency} requests in flight over {count} adapters",
        columns=("popularity", "tokens/s", "over identical", "over base", "TPOT p50 ms", "failed"),
        rows=tuple(rows),
        plot=Plot(
            title="Tokens/s over the base alone",
            x_label="which adapters the rows of a batch use",
            y_label="share of the base's tokens/s",
            series={
                "over base": tuple(
                    (float(at), ratio(throughput[name], throughput["base"])) for at, name in enumerate(POPULARITIES)
                )
            },
            ticks=POPULARITIES,
            level=1.0,
        ),
    )
