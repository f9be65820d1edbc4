"""W1: does throughput hold as the traffic spreads over more and more adapters?

Open loop, base-model capacity C first, then n adapters at rho = 0.9 (the server keeps up) and 1.2 (it cannot:
what it completes is its capacity). All adapters are registered from the start; only the traffic changes. The
phases are played forwards and backwards and averaged.
"""

from collections import defaultdict

from loadtest.adapters import adapter_name
from loadtest.measure import Summary, mean, ratio, summarise
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.stage import Calibration, Stage, palindrome

RHOS = (0.9, 1.2)
MANY = 2000
"""From so many adapters on, five adapters are measured too, to hold the many against."""


def run(stage: Stage) -> Report:
    """Play W1; ``--adapters`` is the largest n."""
    largest = stage.options.pick_adapters(whole=128, quick=8)
    few = (1, 5, 8) if largest >= MANY else (1, 8)
    counts = [0, *(n for n in (*few, 32, 128, 512) if n < largest), *([largest] if largest else [])]
    names = tuple(map(adapter_name, range(largest)))
    found: dict[tuple[int, float], list[Summary]] = defaultdict(list)
    with stage.server(num_adapters=largest) as server:
        stage.warm(server, names)
        calibration = stage.calibrate(server)
        for n in palindrome(counts):
            for rho in RHOS:
                trace = stage.trace(
                    adapters=names[:n], rate_per_s=rho * calibration.capacity_rps, duration_s=stage.options.duration_s
                )
                outcomes = stage.open_loop(server, trace, f"n={n} rho={rho}")
                found[n, rho].append(summarise(outcomes, unloaded_ttft_s=calibration.ttft_s))
    return report(calibration, counts, dict(found))


def report(calibration: Calibration, counts: list[int], found: dict[tuple[int, float], list[Summary]]) -> Report:
    """The table of (n, rho), thr(n)/thr(0), by rho."""
    throughput = {key: mean(one.tokens_per_s for one in passes) for key, passes in found.items()}
    share = {(n, rho): ratio(throughput[n, rho], throughput[0, rho]) for n, rho in found}
    rows: list[tuple[Cell, ...]] = [
        (
            *(n, rho, throughput[n, rho], share[n, rho]),
            1e3 * mean(one.ttft_p50_s for one in passes),
            1e3 * mean(one.ttft_p99_s for one in passes),
            1e3 * mean(one.tpot_p50_s for one in passes),
            mean(one.share_in_time for one in passes),
            sum(one.num_failed for one in passes),
        )
        for (n, rho), passes in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    return Report(
        name="w1",
        title=(
            f"W1: throughput over n adapters (C = {calibration.capacity_rps:.3g} requests/s, "
            f"T0 = {1e3 * calibration.ttft_s:.3g} ms, t0 = {1e3 * calibration.tpot_s:.3g} ms)"
        ),
        columns=(
            *("adapters", "rho", "tokens/s", "thr(n)/thr(0)", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms"),
            *("TTFT <= 5 T0", "failed"),
        ),
        rows=tuple(rows),
        plot=Plot(
            title="Throughput as traffic spreads over adapters",
            x_label="adapters in the traffic",
            y_label="thr(n) / thr(0)",
            series={f"rho {rho}": tuple((float(n), share[n, rho]) for n in counts) for rho in RHOS},
            level=1.0,
            log_x=True,
        ),
        settings={"capacity_rps": calibration.capacity_rps, "T0_s": calibration.ttft_s, "t0_s": calibration.tpot_s},
    )
