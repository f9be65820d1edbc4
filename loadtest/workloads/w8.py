"""W8: what does it bring that different methods share a batch?

One backlog of requests over many tasks, each task an adapter of one method (two kinds of LoRA, IA3, soft prompt,
prefix) or the base, served three ways with 8, 16 and 32 requests at hand:

- *mixed*: whatever comes next runs;
- *one task at a time*: of the requests at hand, those of one task run together, then those of the next, as a server
  must that holds one adapter in its batch. Then the next requests are taken up;
- *LoRA only*: mixed, but the same requests go to as many tasks that are all LoRA.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadtest.adapters import adapter_name
from loadtest.measure import mean, ratio
from loadtest.outcome import Outcome
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.server import RunningServer
from loadtest.stage import Stage, palindrome
from loadtest.trace import BASE, Trace, TraceRequest

WAYS = ("mixed", "one task at a time", "LoRA only")
KINDS = 5  # of the mixture MIX; the first two are LoRA


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One backlog served one way."""

    tokens_per_s: float
    num_failed: int


def run(stage: Stage) -> Report:
    """Play W8; ``--adapters`` is rounded to a multiple of 15, so that there are as many LoRA tasks as mixed ones."""
    if stage.options.mixture != "MIX":
        raise ValueError(f"w8 is about methods in one batch: leave --mixture {stage.options.mixture} out")
    quick = stage.options.quick
    groups = max(1, stage.options.pick_adapters(whole=30, quick=15) // 15)
    tasks = {"mixed": mixed_tasks(groups), "LoRA only": lora_tasks(groups)}
    sizes = (8,) if quick else (8, 16, 32)
    found: dict[tuple[int, str], list[Pass]] = defaultdict(list)
    with stage.server(num_adapters=15 * groups) as server:
        stage.warm(server, tuple(sorted({*tasks["mixed"], *tasks["LoRA only"]} - {BASE})))
        for size in sizes:
            for way in palindrome(list(WAYS)):
                names = tasks["LoRA only" if way == "LoRA only" else "mixed"]
                trace = stage.trace(adapters=names, num_requests=size * (2 if quick else 8))
                found[size, way].append(play(stage, server, trace, way, size))
    return report(dict(found), len(tasks["mixed"]))


def mixed_tasks(groups: int) -> tuple[str, ...]:
    """So many times: an adapter of each kind, and the base."""
    rounds = [tuple(map(adapter_name, range(KINDS * at, KINDS * (at + 1)))) for at in range(groups)]
    return tuple(name for names in rounds for name in (*names, BASE))


def lora_tasks(groups: int) -> tuple[str, ...]:
    """As many tasks, all LoRA, of the two kinds in turn."""
    return tuple(adapter_name(number) for number in range(15 * groups) if number % KINDS < 2)


def play(stage: Stage, server: RunningServer, trace: Trace, way: str, size: int) -> Pass:
    """Serve a backlog with `size` requests at hand."""
    label = f"{size} at hand, {way}"
    if way != "one task at a time":
        outcomes = stage.closed_loop(server, trace, label, concurrency=size)
        return figures(outcomes, max(outcome.end_s for outcome in outcomes))
    groups = by_task(trace.requests, size)
    played = stage.one_after_another(server, groups, label)
    ends = {outcome.index: outcome.end_s for outcome in played}
    return figures(played, sum(max(ends[request.index] for request in group.requests) for group in groups))


def by_task(requests: Sequence[TraceRequest], size: int) -> list[Trace]:
    """Of every `size` requests in a row, the ones of each task together."""
    groups: list[Trace] = []
    for start in range(0, len(requests), size):
        tasks: dict[str, list[TraceRequest]] = defaultdict(list)
        for request in requests[start : start + size]:
            tasks[request.adapter].append(replace(request, arrival_s=0.0))
        groups += [Trace(requests=tuple(group)) for group in tasks.values()]
    return groups


def figures(outcomes: Sequence[Outcome], seconds: float) -> Pass:
    """Tokens of whole answers over the time until the last one was there."""
    tokens = sum(len(outcome.token_times_s) for outcome in outcomes if outcome.ok)
    return Pass(tokens_per_s=ratio(tokens, seconds), num_failed=sum(not outcome.ok for outcome in outcomes))


def report(found: dict[tuple[int, str], list[Pass]], num_tasks: int) -> Report:
    """Tokens a second of each way at each size, and mixed over it."""
    speed = {key: mean(one.tokens_per_s for one in passes) for key, passes in found.items()}
    sizes = tuple(dict.fromkeys(size for size, _ in found))
    rows: list[tuple[Cell, ...]] = [
        (
            *(size, way, speed[size, way], ratio(speed[size, "mixed"], speed[size, way])),
            sum(one.num_failed for one in found[size, way]),
        )
        for size in sizes
        for way in WAYS
    ]
    return Report(
        name="w8",
        title=f"W8: {num_tasks} tasks of five methods and the base",
        columns=("requests at hand", "way", "tokens/s", "mixed over it", "failed"),
        rows=tuple(rows),
        plot=Plot(
            title="A backlog over many tasks, three ways",
            x_label="requests at hand",
            y_label="tokens/s",
            series={way: tuple((float(at), speed[size, way]) for at, size in enumerate(sizes)) for way in WAYS},
            ticks=tuple(map(str, sizes)),
        ),
    )
