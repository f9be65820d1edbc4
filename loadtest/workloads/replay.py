"""replay: play one saved trace, for any question the named workloads do not ask."""

from dataclasses import asdict

from loadtest.measure import Summary, summarise
from loadtest.outcome import Outcome
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.stage import Stage
from loadtest.trace import Trace


def run(stage: Stage, trace: Trace, *, closed: bool = False) -> Report:
    """Play `trace` open loop, or with ``--concurrency`` requests in flight if `closed`. Adapters that the trace
    names as `loadtest.adapters` numbers them are made and uploaded; others must be on the server already."""
    if not trace.requests:
        raise ValueError("the trace holds no requests; make one of more seconds or of a higher --rate")
    numbers = [int(name[1:]) for name in trace.adapters if name[0] == "a" and name[1:].isdecimal()]
    with stage.server(num_adapters=max(numbers, default=-1) + 1) as server:
        stage.warm(server, tuple(trace.adapters))
        play = stage.closed_loop if closed else stage.open_loop
        outcomes = play(server, trace, "replay")
    return report(summarise(outcomes), outcomes, closed=closed)


def report(summary: Summary, outcomes: list[Outcome], *, closed: bool) -> Report:
    """The figures of the summary, and the curve of times to the first token. The share in time is left out: it is
    held against the base's unloaded time to the first token, which a replay does not measure."""
    fields = asdict(summary)
    del fields["share_in_time"]
    errors = ", ".join(f"{count} x {kind}" for kind, count in fields.pop("errors").items()) or "none"
    rows: list[tuple[Cell, ...]] = [(name, value) for name, value in fields.items()]
    counted = [outcome.prompt_tokens for outcome in outcomes if outcome.prompt_tokens is not None]
    rows.append(("prompt_tokens by the server", sum(counted)))
    points = tuple((outcome.due_s, 1e3 * outcome.ttft_s) for outcome in outcomes if outcome.ttft_s is not None)
    return Report(
        name="replay",
        title=f"replay: {summary.num_requests} requests, {'closed' if closed else 'open'} loop",
        columns=("figure", "value"),
        rows=tuple(rows),
        notes=(f"errors: {errors}",),
        plot=Plot(
            title="Time to first token over the run",
            x_label="seconds into the run",
            y_label="TTFT, ms",
            series={"requests": points},
        ),
    )
