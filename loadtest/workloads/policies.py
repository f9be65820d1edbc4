"""policies: what does each scheduling policy do for whom?

The same traces on servers that differ in `--scheduling-policy` alone: a steady stream at capacity over all adapters
(W2's), bursts and a drifting crowd (W3's), a skewed population with a quarter of the slots it needs (W7's), and a few
light tenants beside one that asks for more than the server has. Policies are played forwards and backwards. Rates are
those of the first server's base, so that every policy gets the same requests at the same times.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from loadtest.adapters import adapter_name
from loadtest.measure import Summary, mean, percentile, ratio, summarise
from loadtest.outcome import Outcome
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.server import RunningServer, metrics_delta
from loadtest.stage import Calibration, Stage, palindrome
from loadtest.trace import Trace

POLICIES = ("fcfs", "affinity", "fair")
STEADY, BURSTS, DRIFT, CRAMPED = (
    "W2, rho 1",
    "W3, rho 0.75, cv 4",
    "W3, rho 0.75, drift",
    "W7, zipf, a quarter of slots",
)
ALONE, BESIDE = "light tenants alone", "light tenants beside a heavy one"
WITH_ALL_SLOTS = (STEADY, BURSTS, DRIFT, ALONE, BESIDE)
LIGHT_RHO, HEAVY_RHO, NUM_LIGHT = 0.2, 1.5, 3
HEAVY = adapter_name(0)
ADAPTERS, STEPS = (f"peft_serve_step_distinct_adapters_{part}" for part in ("sum", "count"))
PHASE_S, QUICK_PHASE_S = 8.0, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """One phase under one policy, once. `per_step` is the mean number of distinct adapters in a step, `light_p95_s`
    the time to the first token that 95 of 100 requests of the light tenants stay below."""

    summary: Summary
    per_step: float
    light_p95_s: float


Found = dict[tuple[str, str], list[Played]]
"""What was played, by phase and policy."""


def run(stage: Stage, *, duration_s: float | None) -> Report:
    """Play every policy; ``--adapters`` is the population, and its first one the heavy tenant's."""
    if stage.options.url is not None:
        raise ValueError("policies decides its server's --scheduling-policy: leave --url out")
    quick = stage.options.quick
    phase_s = duration_s or (QUICK_PHASE_S if quick else PHASE_S)
    count = max(NUM_LIGHT + 1, stage.options.pick_adapters(whole=32, quick=8))
    found: Found = {}
    calibration: Calibration | None = None
    for number, policy in enumerate(POLICIES if quick else palindrome(list(POLICIES))):
        name = f"server-{number}-{policy}"
        with _server(stage, policy, name, count) as server:
            calibration = calibration or stage.calibrate(server)
            for phase in WITH_ALL_SLOTS:
                trace = trace_of(stage, phase, calibration.capacity_rps, count, phase_s)
                found.setdefault((phase, policy), []).append(_play(stage, server, trace, f"{policy}, {phase}"))
        slots = f"--max-resident-adapters={max(2, count // 4)}"
        with _server(stage, policy, f"{name}-cramped", count, slots) as server:
            trace = trace_of(stage, CRAMPED, calibration.capacity_rps, count, phase_s)
            found.setdefault((CRAMPED, policy), []).append(_play(stage, server, trace, f"{policy}, {CRAMPED}"))
    assert calibration is not None, "there are policies"
    return report(found, calibration, count)


@contextmanager
def _server(stage: Stage, policy: str, name: str, count: int, *extra: str) -> Iterator[RunningServer]:
    with stage.server(name=name, num_adapters=count, extra=(f"--scheduling-policy={policy}", *extra)) as server:
        stage.warm(server, tuple(map(adapter_name, range(count))))
        yield server


def trace_of(stage: Stage, phase: str, capacity_rps: float, count: int, duration_s: float) -> Trace:
    """The requests of a phase, the same under every policy."""
    names = tuple(map(adapter_name, range(count)))

    def stream(names: tuple[str, ...], rho: float, *, seed: int = 0, **others: object) -> Trace:
        seed += stage.options.seed
        return stage.trace(adapters=names, rate_per_s=rho * capacity_rps, duration_s=duration_s, seed=seed, **others)

    match phase:
        case _ if phase == STEADY:
            return stream(names, 1.0)
        case _ if phase == BURSTS:
            return stream(names, 0.75, cv=4.0)
        case _ if phase == DRIFT:
            return stream(names, 0.75, popularity=f"drift:{duration_s / 5:g}")  # five crowds, one after the other
        case _ if phase == CRAMPED:
            return stream(names, 0.75, popularity="zipf:1")
    light = stream(names[1 : 1 + NUM_LIGHT], LIGHT_RHO, popularity="uniform")
    return light if phase == ALONE else merged(light, stream((HEAVY,), HEAVY_RHO, seed=1))


def merged(*traces: Trace) -> Trace:
    """The requests of all, in order of arrival."""
    every = sorted((one for trace in traces for one in trace.requests), key=lambda one: one.arrival_s)
    return Trace(requests=tuple(replace(one, index=index) for index, one in enumerate(every)))


def _play(stage: Stage, server: RunningServer, trace: Trace, label: str) -> Played:
    before = server.metrics()
    outcomes = stage.open_loop(server, trace, label)
    return played(outcomes, metrics_delta(before, server.metrics()))


def played(outcomes: list[Outcome], moved: Mapping[str, float]) -> Played:
    """What a phase came to; `moved` is what its server counted meanwhile."""
    light = [one.ttft_s for one in outcomes if one.ok and one.adapter != HEAVY and one.ttft_s is not None]
    return Played(
        summary=summarise(outcomes),
        per_step=ratio(moved.get(ADAPTERS, 0.0), moved.get(STEPS, 0.0)),
        light_p95_s=percentile(light, 95),
    )


def report(found: Found, calibration: Calibration, count: int) -> Report:
    """A row for each phase and policy, the policies of a phase one below the other."""
    phases = (STEADY, BURSTS, DRIFT, CRAMPED, ALONE, BESIDE)
    fairness = {policy: _beside_over_alone(found, policy) for policy in POLICIES}
    rows: list[tuple[Cell, ...]] = []
    for phase in phases:
        for policy in POLICIES:
            times = found[phase, policy]

            def over(field: str, times: list[Played] = times) -> float:
                return mean(getattr(one.summary, field) for one in times)

            rows.append(
                (
                    *(f"{phase}: {policy}", 1e3 * over("ttft_p50_s"), 1e3 * over("ttft_p99_s"), over("tokens_per_s")),
                    *(mean(one.per_step for one in times), 1e3 * mean(one.light_p95_s for one in times)),
                    fairness[policy] if phase == BESIDE else "-",
                    sum(one.summary.num_failed for one in times),
                )
            )
    return Report(
        name="policies",
        title=(
            f"Scheduling policies, {count} adapters (C = {calibration.capacity_rps:.3g} requests/s, "
            f"T0 = {1e3 * calibration.ttft_s:.3g} ms)"
        ),
        columns=(
            *("load and policy", "TTFT p50 ms", "TTFT p99 ms", "tokens/s", "adapters a step", "light TTFT p95 ms"),
            *("light p95 over alone", "failed"),
        ),
        rows=tuple(rows),
        notes=tuple(
            f"{policy}: a heavy tenant makes the light ones' TTFT p95 {times:.2f} times what it is without"
            for policy, times in fairness.items()
        ),
        plot=Plot(
            title="What a heavy tenant costs light ones",
            x_label="policy",
            y_label="light tenants' TTFT p95 over alone",
            series={"over alone": tuple((float(at), fairness[policy]) for at, policy in enumerate(POLICIES))},
            ticks=POLICIES,
        ),
        settings={"capacity_rps": calibration.capacity_rps, "light_rho": LIGHT_RHO, "heavy_rho": HEAVY_RHO},
    )


def _beside_over_alone(found: Found, policy: str) -> float:
    beside, alone = (mean(one.light_p95_s for one in found[phase, policy]) for phase in (BESIDE, ALONE))
    return ratio(beside, alone)
