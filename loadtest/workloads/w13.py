"""W13: are the tokens those of peft?

Mixed traffic over adapters of every kind, on a server whose slots and host cache are far too few for them, while one
name is exchanged and deleted under the requests that use it. Every answer is then made again by peft, one request at a
time with one adapter loaded, and compared token by token.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, nan
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.adapters import adapter_name
from loadtest.client import ClientOptions
from loadtest.measure import ratio
from loadtest.moving import Moved, MovingName, moving, token_ids
from loadtest.outcome import Outcome
from loadtest.plots import Plot
from loadtest.report import Cell, Report, written
from loadtest.routes import Answer, Native
from loadtest.server import RunningServer, metrics_delta
from loadtest.stage import Stage
from loadtest.trace import BASE, Trace, TraceRequest

if TYPE_CHECKING:
    from loadtest.oracle import Truth

COUNTED = ('peft_serve_adapter_evictions_total{tier="device"}', 'peft_serve_adapter_load_seconds_count{tier="host"}')
SPARE = 3  # adapters that take turns under the moving name
MOVING_SHARE = 10  # one request in so many goes to it


class Tokens(Native):
    """The native route, read for its token ids: an answer's text is the ids with spaces between."""

    def read(self, request: TraceRequest, pieces: Sequence[bytes], times_s: Sequence[float]) -> Answer:
        """See `Route`."""
        answer = super().read(request, pieces, times_s)
        ids = token_ids(pieces) if answer.error is None else ()
        return Answer(text=" ".join(map(str, ids)), token_times_s=answer.token_times_s, error=answer.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One answer beside peft's. `margin` is peft's at the first token that differs; NaN if none does."""

    label: str
    num_tokens: int
    num_equal: int  # tokens before the first that differs
    margin: float = nan

    @property
    def is_equal(self) -> bool:
        """Whether the whole answer is peft's."""
        return self.num_equal == self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One answer of the server's: for which request, of which adapter (None: the base), and how it is counted."""

    request: TraceRequest
    adapter: Path | None
    label: str
    tokens: tuple[int, ...]


def run(stage: Stage, *, num_tokens: int | None = None) -> Report:
    """Play W13 over `num_tokens` answer tokens; ``--adapters`` is the population."""
    options = stage.options
    if options.dtype != "float32":
        raise ValueError(
            f"w13 compares in float32, where peft itself does not depend on the batch; got {options.dtype}"
        )
    wanted = num_tokens or (400 if options.quick else 100_000)
    count = stage.options.pick_adapters(whole=20, quick=5)
    folders = stage.adapter_folders(count + SPARE)
    trace = stage.trace(
        adapters=(*map(adapter_name, range(count)), BASE), num_requests=ceil(wanted / options.lengths.mean_answer)
    )
    few = (f"--max-resident-adapters={max(2, count // 3)}", f"--host-adapter-bytes={_size(folders[:count]) // 4}")
    with stage.server(num_adapters=count, extra=few) as server:
        before = server.metrics()
        outcomes, exchanged = play(stage, server, trace, folders[count:])
        moved = metrics_delta(before, server.metrics())
    places = {folder.name: folder for folder in folders}
    served = [*answered(trace.requests, outcomes, places), *map(after_move, exchanged)]
    return report(compare(stage, served), moved, num_failed=sum(not outcome.ok for outcome in outcomes))


def _size(folders: Iterable[Path]) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def play(stage: Stage, server: RunningServer, trace: Trace, spare: list[Path]) -> tuple[list[Outcome], list[Moved]]:
    """The trace with many in flight, and a tenth as many requests to the name that moves."""
    options = stage.options
    client = ClientOptions(url=server.url, route=Tokens(), api_key=options.api_key)
    name = MovingName(server.url, spare, api_key=options.api_key)
    with moving(name, trace.requests[::MOVING_SHARE]) as exchanged:
        label, in_flight = "mixed traffic", options.concurrency
        outcomes = stage.play(client, trace, label, concurrency=in_flight, observe=server.metrics)
    return outcomes, exchanged


def answered(
    requests: Sequence[TraceRequest], outcomes: Sequence[Outcome], folders: Mapping[str, Path]
) -> Iterator[Served]:
    """What the server said to the trace; requests that failed are counted elsewhere."""
    for request, outcome in zip(requests, outcomes, strict=True):
        if outcome.ok:
            tokens = tuple(map(int, outcome.text.split()))
            folder = folders[request.adapter] if request.adapter != BASE else None
            yield Served(request=request, adapter=folder, label=kind_of(folder), tokens=tokens)


def after_move(moved: Moved) -> Served:
    """An answer under the moving name."""
    return Served(request=moved.request, adapter=moved.adapter, label="exchanged while running", tokens=moved.tokens)


def kind_of(folder: Path | None) -> str:
    """The method of a checkpoint, in peft's words."""
    if folder is None:
        return "base"
    return str(json.loads((folder / "adapter_config.json").read_text())["peft_type"])


def compare(stage: Stage, served: Sequence[Served]) -> list[Compared]:
    """Ask peft for every answer again."""
    import torch

    from loadtest.oracle import answers  # with peft and transformers, seconds that the other commands do without

    torch.set_num_threads(stage.options.num_threads)
    by_adapter: dict[Path | None, list[Served]] = defaultdict(list)
    for one in served:
        by_adapter[one.adapter].append(one)
    found = []
    with stage.counting("peft, one by one", len(served)) as tick:
        for adapter, group in by_adapter.items():
            truths = answers(stage.base(), adapter, [one.request for one in group])
            for one, truth in zip(group, truths, strict=True):
                found.append(beside(one, truth))
                tick()
    return found


def beside(one: Served, truth: "Truth") -> Compared:
    """How far an answer is peft's."""
    pairs = zip(one.tokens, truth.tokens, strict=False)
    num_equal = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), len(one.tokens))
    is_whole = num_equal == len(truth.tokens)
    return Compared(
        label=one.label,
        num_tokens=len(truth.tokens),
        num_equal=num_equal,
        margin=nan if is_whole else truth.margins[num_equal],
    )


def report(found: Sequence[Compared], moved: Mapping[str, float], *, num_failed: int) -> Report:
    """Equality by method, and in all."""
    labels = sorted({one.label for one in found})
    groups = {label: [one for one in found if one.label == label] for label in labels}
    rows: list[tuple[Cell, ...]] = [_row(label, group) for label, group in groups.items()]
    evictions, loads = (moved.get(series, nan) for series in COUNTED)
    return Report(
        name="w13",
        title=f"W13: {sum(one.num_tokens for one in found)} tokens of {len(found)} answers beside peft's",
        columns=("method", "answers", "tokens", "equal answers", "tokens before a difference", "largest margin there"),
        rows=(*rows, _row("all", list(found))),
        notes=(
            f"failed requests: {num_failed}",
            f"meanwhile {written(evictions)} evictions from the device and {written(loads)} loads into the host cache",
        ),
        plot=Plot(
            title="Tokens equal to peft's",
            x_label="method",
            y_label="share of tokens",
            series={"equal": tuple((float(at), float(rows[at][4])) for at in range(len(labels)))},
            ticks=tuple(labels),
            level=1.0,
        ),
    )


def _row(label: str, group: list[Compared]) -> tuple[Cell, ...]:
    num_tokens = sum(one.num_tokens for one in group)
    margins = [one.margin for one in group if not one.is_equal]
    return (
        *(label, len(group), num_tokens, ratio(sum(one.is_equal for one in group), len(group))),
        *(ratio(sum(one.num_equal for one in group), num_tokens), max(margins, default=nan)),
    )
