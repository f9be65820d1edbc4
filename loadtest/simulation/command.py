"""simulate: which placement serves adapters best on many replicas, by the server's own code over measured times.

The same traffic goes to every placement: an open loop over `--adapters` for each replica, at `--rho` times what the
replicas do when all their rows are taken. The first part of the time warms tiers up and is not measured.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console

from loadtest.arguments import above_zero, in_words, popularity, whole_from
from loadtest.lengths import Lengths, parse_lengths
from loadtest.measure import ratio
from loadtest.plots import Plot
from loadtest.progress import Tick, bar
from loadtest.report import Cell, Report
from loadtest.server import RunningServer, reach
from loadtest.simulation.cluster import Cluster, ClusterSpec, placement_rng
from loadtest.simulation.figures import Figures, Window, figures
from loadtest.simulation.replica import FOUND_IN, Shape
from loadtest.simulation.times import LOGGED, Sourced, read_times, scraped
from loadtest.simulation.traffic import TrafficSpec
from peft_serve.placement.choosing import make_placement
from peft_serve.placement.placements import PLACEMENTS, PlacementName
from peft_serve.placement.rendezvous import Ranks
from peft_serve.placement.residency import Bounds

ABOUT: Final = "placements on 2 to 1,000 simulated replicas: hit rates, times to the first token, goodput"
BYTES_OF_RANK: Final = 625_000  # of the 0.1 B shape, every layer adapted
TICKS: Final = 50
_KEPT: Final = 30_000_000  # names in remembered hash orders
_MIB: Final = 2**20
_LATE: Final = 5.0  # times the unloaded time to the first token

Disks = Literal["full", "empty"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is simulated."""

    sizes: tuple[int, ...]  # replicas
    popularities: tuple[str, ...]
    disks: tuple[Disks, ...]
    placements: tuple[PlacementName, ...]
    sourced: Sourced
    shape: Shape
    num_adapters: int = 100  # for each replica
    ranks: tuple[int, ...] = (8,)  # of the adapters, in turn
    device_mib: float = 160.0
    host_mib: float = 640.0
    lengths: Lengths
    rho: float = 0.7
    cv: float = 1.0
    warm_up_s: float = 60.0
    duration_s: float = 60.0
    report_s: float = 0.5
    bounds: Bounds
    seed: int = 0

    @property
    def unloaded_s(self) -> float:
        """T0: the time to the first token of the mean prompt alone."""
        times, lengths = self.sourced.times, self.lengths
        return times.predict(0, 0, 0) + times.token * (lengths.prompt_min + lengths.prompt_max) / 2

    @property
    def capacity_rps(self) -> float:
        """C: requests a second of a replica whose rows are all taken by adapters that it has."""
        times, lengths = self.sourced.times, self.lengths
        prompt, answer = (lengths.prompt_min + lengths.prompt_max) / 2, lengths.mean_answer
        rank = sum(self.ranks) / len(self.ranks)
        positions = prompt + answer / 2
        step_of_row = times.step / self.shape.max_rows + times.rank * rank + times.position * positions
        return 1 / (answer * step_of_row + (prompt + answer - 1) * times.token)

    @property
    def window(self) -> Window:
        """What is measured."""
        end_s = self.warm_up_s + self.duration_s
        return Window(start_s=self.warm_up_s, end_s=end_s, within_s=_LATE * self.unloaded_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One traffic on one cluster; every placement gets the same."""

    num_replicas: int
    popularity: str
    disks: Disks


Found = dict[tuple[Case, PlacementName], Figures]


def add_options(parser: ArgumentParser) -> None:
    """The options of `simulate`."""
    many: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--replicas", type=whole_from(1), **many, help="replicas (repeatable; default 2, 8 and 64)")
    parser.add_argument("--adapters", type=whole_from(1), default=100, help="adapters for each replica (default 100)")
    parser.add_argument("--popularity", type=popularity, **many, help="repeatable; default zipf:1 and drift")
    parser.add_argument("--placement", choices=PLACEMENTS, **many, help="repeatable; default all")
    compiled = "does every replica's disk have every adapter compiled at the start? (repeatable; default both)"
    parser.add_argument("--disks", choices=("full", "empty"), **many, help=compiled)
    parser.add_argument("--model", type=Path, help="JSON of seconds (loadtest/simulation/times.py); default: as logged")
    parser.add_argument("--url", help="take the times from the /metrics of the server that runs here")
    parser.add_argument("--rho", type=above_zero, default=0.7, help="load over what the replicas can do (default 0.7)")
    parser.add_argument("--cv", type=above_zero, default=1.0, help="of the gaps between requests; 1 is Poisson")
    parser.add_argument(
        "--lengths", type=in_words(parse_lengths), default="cpu", help="cpu, gpu or PMIN-PMAX,AMIN-AMAX"
    )
    parser.add_argument("--ranks", type=in_words(_ranks), default="8", help="of the adapters, in turn (default 8)")
    parser.add_argument("--device-mib", type=above_zero, default=160.0, help="adapters on a device (default 160)")
    parser.add_argument("--host-mib", type=above_zero, default=640.0, help="adapters in host memory (default 640)")
    parser.add_argument("--max-rows", type=whole_from(1), default=16, help="rows of a step (default 16)")
    parser.add_argument("--max-queue", type=whole_from(0), default=64, help="requests that wait (default 64)")
    parser.add_argument(
        "--report", type=above_zero, default=0.5, help="seconds between a replica's reports (default 0.5)"
    )
    least = "requests over rows at which a replica is saturated, and below which it is at ease (default 1,0.5)"
    parser.add_argument("--bounds", type=in_words(_bounds), default="1,0.5", help=f"of residency: {least}")
    parser.add_argument("--warm-up", type=above_zero, help="seconds before the measured ones (default 60, quick 5)")
    parser.add_argument("--duration", type=above_zero, help="seconds that are measured (default 60, quick 5)")
    parser.add_argument("--seed", type=whole_from(0), default=0)
    parser.add_argument("--out", type=Path, default=Path("loadtest/results"), help="where results are filed")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that it runs, proves nothing")


def _ranks(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"ranks {text!r}: write whole numbers from 1 on, for instance 64,32,16,8")
    return tuple(map(int, parts))


def _bounds(text: str) -> Bounds:
    try:
        saturated, easy = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"bounds {text!r}: write two numbers, for instance 1,0.5") from None
    return Bounds(saturated_load=saturated, easy_load=easy)


def run_parsed(parsed: Namespace) -> Report:
    """The command: simulate what its options say, with a bar on the screen."""
    plan = read_plan(parsed)
    with bar(Console(), "simulating", count=TICKS * len([*cases(plan)]) * len(plan.placements)) as tick:
        return report(plan, simulate(plan, tick))


def read_plan(parsed: Namespace) -> Plan:
    """The options as a plan."""
    if parsed.model is not None and parsed.url is not None:
        raise ValueError("--model and --url both say what the times are: leave one of them out")
    haste_s = 5.0 if parsed.quick else 60.0
    return Plan(
        sizes=tuple(parsed.replicas) or ((2, 4) if parsed.quick else (2, 8, 64)),
        popularities=tuple(parsed.popularity) or ("zipf:1", "drift"),
        disks=tuple(parsed.disks) or ("full", "empty"),
        placements=tuple(parsed.placement) or PLACEMENTS,
        sourced=_times(parsed.model, parsed.url),
        shape=Shape(max_rows=parsed.max_rows, max_queue=parsed.max_queue),
        num_adapters=parsed.adapters,
        ranks=parsed.ranks,
        device_mib=parsed.device_mib,
        host_mib=parsed.host_mib,
        lengths=parsed.lengths,
        rho=parsed.rho,
        cv=parsed.cv,
        warm_up_s=parsed.warm_up or haste_s,
        duration_s=parsed.duration or haste_s,
        report_s=parsed.report,
        bounds=parsed.bounds,
        seed=parsed.seed,
    )


def _times(model: Path | None, url: str | None) -> Sourced:
    if model is not None:
        return read_times(model)
    if url is None:
        return LOGGED
    reach(url)
    return scraped(RunningServer(url=url, start_s=0.0, pid=0).metrics(), url)


def cases(plan: Plan) -> Iterator[Case]:
    """Every traffic on every cluster."""
    for disks in plan.disks:
        for name in plan.popularities:
            for size in plan.sizes:
                yield Case(num_replicas=size, popularity=name, disks=disks)


def simulate(plan: Plan, tick: Tick) -> Found:
    """Every case under every placement; `tick` is called `TICKS` times for each."""
    ranks = Ranks(max_kept=_KEPT)
    return {(case, name): _play(plan, case, name, ranks, tick) for case in cases(plan) for name in plan.placements}


def _play(plan: Plan, case: Case, name: PlacementName, ranks: Ranks, tick: Callable[[], None]) -> Figures:
    count = plan.num_adapters * case.num_replicas
    traffic = TrafficSpec(
        rate_per_s=plan.rho * plan.capacity_rps * case.num_replicas,
        duration_s=plan.window.end_s,
        num_adapters=count,
        popularity=case.popularity,
        lengths=plan.lengths,
        cv=plan.cv,
        seed=plan.seed,
    ).draw()
    in_turn = [plan.ranks[number % len(plan.ranks)] for number in range(count)]
    spec = ClusterSpec(
        num_replicas=case.num_replicas,
        ranks=in_turn,
        sizes=[rank * BYTES_OF_RANK for rank in in_turn],
        device_bytes=plan.device_mib * _MIB,
        host_bytes=plan.host_mib * _MIB,
        knows_all=case.disks == "full",
        report_s=plan.report_s,
        shape=plan.shape,
        times=plan.sourced.times,
    )
    placement = make_placement(name, placement_rng(plan.seed), bounds=plan.bounds, most=1, ranks=ranks)
    return figures(traffic, Cluster(spec, placement, traffic).play(tick, ticks=TICKS), plan.window)


COLUMNS: Final = (
    "replicas, popularity, disks",
    "placement",
    *FOUND_IN,
    *("TTFT p50 ms", "TTFT p99 ms", "in time", "goodput", "most over mean", "hottest on", "refused"),
)


def report(plan: Plan, found: Found) -> Report:
    """A row for each case and placement."""
    rows: list[tuple[Cell, ...]] = []
    for (case, name), one in found.items():
        times = (round(1e3 * one.ttft_p50_s, 1), round(1e3 * one.ttft_p99_s, 1))
        shares = tuple(round(share, 3) for share in one.found)
        uneven = (round(one.most_over_mean, 2), one.num_hot, round(one.refused, 3))
        rows.append((_words(case), name, *shares, *times, round(one.in_time, 3), round(one.goodput, 1), *uneven))
    return Report(
        name="simulate",
        title=(
            f"simulate: {plan.num_adapters} adapters a replica at rho {plan.rho:g} "
            f"(C = {plan.capacity_rps:.3g} requests/s, T0 = {1e3 * plan.unloaded_s:.3g} ms)"
        ),
        columns=COLUMNS,
        rows=tuple(rows),
        notes=tuple(_notes(plan, found)),
        plot=_plot(plan, found),
        settings={"times": asdict(plan.sourced.times), "source": plan.sourced.source, "seed": plan.seed},
    )


def _words(case: Case) -> str:
    return f"{case.num_replicas}, {case.popularity}, {case.disks}"


def _notes(plan: Plan, found: Found) -> Iterator[str]:
    times = ", ".join(f"{name} {value:.3g}" for name, value in asdict(plan.sourced.times).items())
    yield f"times in seconds: {times}; from {plan.sourced.source}"
    yield f"in time: a first token within {_LATE:g} T0 = {1e3 * plan.window.within_s:.4g} ms, of all requests"
    yield "goodput: tokens/s of a replica in answers that were in time"
    yield "hottest on: replicas that served the adapter asked for most"
    for case in cases(plan):
        ours, theirs = found.get((case, "residency")), found.get((case, "least-loaded"))
        if ours is not None and theirs is not None:
            gain = f"{ratio(ours.goodput, theirs.goodput):.3g}" if theirs.goodput else "more than any"
            p99 = ratio(ours.ttft_p99_s, theirs.ttft_p99_s)
            yield f"residency over least-loaded ({_words(case)}): goodput {gain} times, TTFT p99 {p99:.3g} times"


def _plot(plan: Plan, found: Found) -> Plot:
    """The share in time of the first popularity on the last kind of disks: the harder one."""
    shown, disks = plan.popularities[0], plan.disks[-1]
    series = {
        str(name): tuple(
            (float(at), found[case, name].in_time) for at, case in enumerate(_only(cases(plan), shown, disks))
        )
        for name in plan.placements
    }
    return Plot(
        title=f"First tokens in time, {shown}, disks {disks}",
        x_label="replicas",
        y_label="share in time",
        series=series,
        ticks=tuple(map(str, plan.sizes)),
    )


def _only(those: Iterator[Case], shown: str, disks: Disks) -> Sequence[Case]:
    return [case for case in those if (case.popularity, case.disks) == (shown, disks)]
