"""overhead: does a server that holds adapters serve base-only traffic as fast as one without?

Two servers stay up; base-only closed loops are played on A (no adapters), B, B, A, ..., and never on both at once:
before each phase both must be quiet. With ``--a-arg`` and ``--b-arg`` the two differ in their options instead,
which makes this the A/B test for any setting.
"""

from loadtest.adapters import adapter_name
from loadtest.measure import Summary, mean, ratio
from loadtest.plots import Plot
from loadtest.report import Report
from loadtest.server import quiet
from loadtest.stage import Stage


def run(
    stage: Stage, *, a_arguments: tuple[str, ...] = (), b_arguments: tuple[str, ...] = (), repeats: int | None = None
) -> Report:
    """Play A B B A `repeats` times; ``--adapters`` is how many B holds (used once each before, then idle)."""
    if stage.options.url is not None:
        raise ValueError("overhead starts its two servers itself: leave --url out")
    count = stage.options.pick_adapters(whole=32, quick=8)
    blocks = repeats or (1 if stage.options.quick else 3)
    names = tuple(map(adapter_name, range(count)))
    found: dict[str, list[Summary]] = {"A": [], "B": []}
    with (
        stage.server(name="server-a", extra=a_arguments) as without,
        stage.server(name="server-b", extra=b_arguments, num_adapters=count) as holding,
    ):
        servers = {"A": without, "B": holding}
        stage.warm(without, ())
        stage.warm(holding, names)
        trace = stage.endless(())
        for block in range(blocks):
            for side in "ABBA":
                quiet([without, holding])
                found[side].append(stage.saturated(servers[side], trace, f"block {block + 1}: {side}"))
    return report(found, count)


def report(found: dict[str, list[Summary]], count: int) -> Report:
    """B over A by block and in all."""
    speeds = {side: [one.tokens_per_s for one in passes] for side, passes in found.items()}
    pairs = range(0, len(speeds["A"]), 2)
    by_block = [ratio(mean(speeds["B"][at : at + 2]), mean(speeds["A"][at : at + 2])) for at in pairs]
    return Report(
        name="overhead",
        title=f"overhead: base-only traffic on a server without adapters (A) and with {count} (B)",
        columns=("block", "B over A", "A tokens/s", "B tokens/s", "A TPOT p50 ms", "B TPOT p50 ms"),
        rows=tuple(
            (
                number + 1,
                by_block[number],
                mean(speeds["A"][at : at + 2]),
                mean(speeds["B"][at : at + 2]),
                1e3 * mean(one.tpot_p50_s for one in found["A"][at : at + 2]),
                1e3 * mean(one.tpot_p50_s for one in found["B"][at : at + 2]),
            )
            for number, at in enumerate(pairs)
        ),
        notes=(
            f"blocks lie between {min(by_block):.3f} and {max(by_block):.3f}; A against itself varies by "
            f"{ratio(max(speeds['A']) - min(speeds['A']), mean(speeds['A'])):.1%}",
            f"failed requests: {sum(one.num_failed for passes in found.values() for one in passes)}",
        ),
        plot=Plot(
            title="Base-only tokens/s, phase by phase",
            x_label="phase",
            y_label="tokens/s",
            series={
                side: tuple((float(at), speed) for at, speed in enumerate(passes)) for side, passes in speeds.items()
            },
        ),
    )
