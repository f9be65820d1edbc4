"""Beside: this server, peft's loops, llama.cpp's server and any OpenAI-compatible one, side by side in one run.

Each cell of the table is a number of requests that are all there at once: for the base, for one adapter, for adapters
by Zipf's law or each for one of its own; all equally long, so that whoever batches best is done first. Every contestant
has the base and all adapters loaded and warm, lives through the whole run, and plays each cell in turn with the others:
there and back, each time with fresh prompts, so that nobody's cache of prompts helps. A cell ends at a limit of time;
what is not answered then counts with the tokens that came.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, count
from math import nan
from pathlib import Path

from loadtest.adapters import adapter_name
from loadtest.arguments import above_zero, whole_from
from loadtest.compare import read_peer
from loadtest.contestants import (
    Contestant,
    LlamaSetting,
    ServerContestant,
    llama_server,
    our_server,
    peft_loops,
)
from loadtest.lengths import parse_lengths
from loadtest.measure import mean, percentile, ratio
from loadtest.outcome import UNFINISHED, Outcome
from loadtest.peer_servers import OpenAIServer
from loadtest.peft_plan import Mode
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.stage import Stage
from loadtest.trace import Trace

TRAFFIC: Mapping[str, str] = {"base": "", "identical": "identical", "zipf": "zipf:1", "distinct": "distinct"}
"""What requests ask for, and the popularity that says so; none for the base."""
LOOPS: tuple[Mode, ...] = ("single", "mixed")
OURS = "native"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Place:
    """One cell: the adapters' rank, what is asked for, and how many requests at once."""

    rank: int
    traffic: str
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run: `limit_s` ends a cell, and `there_and_back` plays it twice, the second time in reverse order."""

    ranks: tuple[int, ...] = (8, 16)
    traffic: tuple[str, ...] = tuple(TRAFFIC)
    in_flight: tuple[int, ...] = (1, 8, 16, 32)
    loops: tuple[Mode, ...] = LOOPS
    limit_s: float = 20.0
    there_and_back: bool = True
    llama: Path | None = None
    llama_arguments: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def places(self) -> list[Place]:
        """The cells in order; the base's own does not depend on the rank and is played once."""
        return [
            Place(rank=rank, traffic=traffic, in_flight=in_flight)
            for rank in self.ranks
            for traffic in self.traffic
            for in_flight in self.in_flight
            if traffic != "base" or rank == self.ranks[0]
        ]


Found = dict[Place, dict[str, list["Pass"]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one contestant did with one cell once."""

    outcomes: tuple[Outcome, ...]
    tokens_per_s: float
    peak_mib: float


def add_options(parser: ArgumentParser) -> None:
    """The options of ``beside``."""
    parser.set_defaults(lengths=parse_lengths("32-32,32-32"))
    parser.add_argument("--llama-server", type=Path, metavar="PROGRAM", help="llama.cpp's llama-server (default: none)")
    parser.add_argument("--llama-arg", action="append", default=[], help="passed to it (--llama-arg=--flash-attn=on)")
    parser.add_argument("--peer", action="append", default=[], metavar="openai:NAME=URL", help="one that runs already")
    ranks, flights = "LoRA rank (repeatable; default 8, 16)", "requests at once (repeatable; default 1, 8, 16, 32)"
    parser.add_argument("--rank", type=whole_from(1), action="append", help=ranks)
    parser.add_argument("--in-flight", type=whole_from(1), action="append", help=flights)
    parser.add_argument("--traffic", choices=tuple(TRAFFIC), action="append", help="only this (repeatable)")
    loops = "peft's loops to play, none for no loop (repeatable; default single, mixed)"
    parser.add_argument("--loop", choices=(*LOOPS, "none"), action="append", help=loops)
    parser.add_argument("--limit", type=above_zero, help="seconds after which a cell ends (default 20, quick 3)")
    parser.add_argument("--once", action="store_true", help="one pass each in place of there and back")


def run_parsed(stage: Stage, parsed: Namespace) -> Report:
    """Run ``beside`` as its options say."""
    whole = Plan()
    loops = parsed.loop or list(LOOPS)
    plan = Plan(
        ranks=tuple(parsed.rank or whole.ranks),
        traffic=tuple(one for one in TRAFFIC if one in (parsed.traffic or TRAFFIC)),
        in_flight=tuple(parsed.in_flight or ((1, 4) if parsed.quick else whole.in_flight)),
        loops=tuple(mode for mode in LOOPS if mode in loops),
        limit_s=parsed.limit or (3.0 if parsed.quick else whole.limit_s),
        there_and_back=not (parsed.once or parsed.quick),
        llama=parsed.llama_server,
        llama_arguments=tuple(parsed.llama_arg),
        others=tuple(parsed.peer),
    )
    return run(stage, plan)


def run(stage: Stage, plan: Plan) -> Report:
    """Play every cell on every contestant; ValueError for what cannot be compared."""
    if stage.options.url is not None:
        raise ValueError("beside starts this server itself, to know its memory: leave --url out")
    if plan.others and len(plan.ranks) > 1:
        raise ValueError("a server that runs already holds adapters of one rank: say which by --rank")
    if plan.llama is not None and not plan.llama.is_file():
        raise ValueError(f"--llama-server {plan.llama} is no file; name llama.cpp's llama-server, built (README.md)")
    most = max(plan.in_flight)
    names = tuple(map(adapter_name, range(stage.options.pick_adapters(whole=most, quick=most))))
    seeds, found, cold = count(stage.options.seed + 1), Found(), list[str]()
    for rank in plan.ranks:
        among = stage.among(f"lora:{rank}")
        with _contestants(among, names, plan) as contestants:
            cold += [f"r {rank}, an adapter that is not loaded, {one.name}: {one.cold}" for one in contestants]
            for place in (one for one in plan.places() if one.rank == rank):
                found[place] = _play(among, place, contestants, names, plan, seeds)
    return report(found, plan, cold, num_adapters=len(names))


@contextmanager
def _contestants(stage: Stage, names: Sequence[str], plan: Plan) -> Iterator[list[Contestant]]:
    with ExitStack() as running:
        contestants: list[Contestant] = [running.enter_context(our_server(stage, names))]
        if plan.llama is not None:
            drawn = stage.trace(num_requests=64).requests
            context = max(one.prompt_tokens + one.max_new_tokens for one in drawn)
            setting = LlamaSetting(
                program=plan.llama, slots=max(plan.in_flight), context=context, arguments=plan.llama_arguments
            )
            contestants.append(running.enter_context(llama_server(stage, names, setting)))
        contestants += [_other(stage, spec, names) for spec in plan.others]
        if plan.loops:
            contestants += running.enter_context(peft_loops(stage, names, plan.loops))
        yield contestants


def _other(stage: Stage, spec: str, names: Sequence[str]) -> Contestant:
    peer = read_peer(spec, stage, fields={})
    if not isinstance(peer, OpenAIServer):
        raise ValueError(f"--peer {spec}: beside takes openai:NAME=URL, and has the others by itself")
    said = peer.prepare(names)
    return ServerContestant(stage=stage, name=peer.name, client=peer.client(), cold="; ".join(said) or "not measured")


def _play(
    stage: Stage,
    place: Place,
    contestants: Sequence[Contestant],
    names: Sequence[str],
    plan: Plan,
    seeds: Iterator[int],
) -> dict[str, list[Pass]]:
    playing = [one for one in contestants if takes_part(one.name, place.traffic)]
    found: dict[str, list[Pass]] = {one.name: [] for one in playing}
    for order in (playing, playing[::-1])[: 1 + plan.there_and_back]:
        trace = cell_trace(stage, place, names, next(seeds))
        for one in order:
            label = f"{one.name}, r {place.rank}, {place.traffic} x {place.in_flight}"
            outcomes = one.play(trace, label, concurrency=place.in_flight, limit_s=plan.limit_s)
            speed = tokens_per_s(outcomes, plan.limit_s)
            found[one.name].append(Pass(outcomes=tuple(outcomes), tokens_per_s=speed, peak_mib=one.peak_mib()))
    return found


def takes_part(name: str, traffic: str) -> bool:
    """Whether a contestant plays such traffic: where all ask for the same, there is nothing to mix, and peft's mixed
    loop would be its single one with more work."""
    return name != "peft:mixed" or traffic not in ("base", "identical")


def cell_trace(stage: Stage, place: Place, names: Sequence[str], seed: int) -> Trace:
    """The requests of a cell: as many as are in flight, or two where that is one."""
    popularity = TRAFFIC[place.traffic]
    asked = {"adapters": tuple(names), "popularity": popularity} if popularity else {}
    return stage.trace(num_requests=max(2, place.in_flight), seed=seed, **asked)


def tokens_per_s(outcomes: Sequence[Outcome], limit_s: float) -> float:
    """Tokens that came, over the time until the last of them, or until the limit where it cut something off."""
    times_s = [when for one in outcomes for when in one.token_times_s if when <= limit_s]
    is_cut = any(one.error == UNFINISHED for one in outcomes)
    return ratio(len(times_s), limit_s if is_cut else max(times_s, default=nan))


def report(found: Found, plan: Plan, cold: Sequence[str], *, num_adapters: int) -> Report:
    """A row for each cell and contestant, and where this server is not ahead."""
    speed = {
        place: {name: mean(p.tokens_per_s for p in passes[name]) for name in passes} for place, passes in found.items()
    }
    rows = [_row(place, name, found, speed) for place in found for name in found[place]]
    behind = [
        f"{place.traffic} x {place.in_flight} at r {place.rank} behind {name} ({ratio(of[OURS], of[name]):.2f})"
        for place, of in speed.items()
        for name in of
        if of[OURS] < of[name]
    ]
    names = list(dict.fromkeys(chain.from_iterable(speed.values())))
    shown = [place for place in speed if place.rank == plan.ranks[0]]
    return Report(
        name="beside",
        title=f"beside: {num_adapters} LoRA adapters loaded, equal requests at once, {plan.limit_s:g} s at most",
        columns=(
            *("r", "traffic", "at once", "who", "tokens/s", "native over it", "over own base"),
            *("TTFT p50 ms", "TPOT p50 ms", "cut off", "failed", "peak MiB", "equal to native"),
        ),
        rows=tuple(rows),
        notes=(_standing(behind, sum(len(of) - 1 for of in speed.values())), *cold),
        plot=Plot(
            title=f"Side by side, rank {plan.ranks[0]}",
            x_label="what is asked for, and how many requests at once",
            y_label="tokens/s",
            series={
                name: tuple((float(at), speed[place].get(name, nan)) for at, place in enumerate(shown))
                for name in names
            },
            ticks=tuple(f"{place.traffic} x {place.in_flight}" for place in shown),
        ),
        settings={"limit_s": plan.limit_s, "there_and_back": plan.there_and_back},
    )


def _standing(behind: Sequence[str], num_compared: int) -> str:
    if not behind:
        return f"native is ahead in all {num_compared} comparisons"
    return f"native is behind in {len(behind)} of {num_compared} comparisons: {'; '.join(behind)}"


def _row(place: Place, name: str, found: Found, speed: Mapping[Place, Mapping[str, float]]) -> tuple[Cell, ...]:
    passes = found[place][name]
    outcomes = [one for done in passes for one in done.outcomes]
    ttfts = [1e3 * one.ttft_s for one in outcomes if one.ttft_s is not None]
    tpots = [1e3 * one.tpot_s for one in outcomes if one.tpot_s is not None]
    own = speed[place][name]
    base = next((of for at, of in speed.items() if at.traffic == "base" and at.in_flight == place.in_flight), {})
    alone = base.get(name if takes_part(name, "base") else "peft:single", nan)
    return (
        *(place.rank, place.traffic, place.in_flight, name, own),
        *(ratio(speed[place][OURS], own), ratio(own, alone)),
        *(percentile(ttfts, 50), percentile(tpots, 50)),
        sum(one.error == UNFINISHED for one in outcomes),
        sum(not one.ok and one.error != UNFINISHED for one in outcomes),
        max(done.peak_mib for done in passes),
        share_equal(passes, found[place][OURS]),
    )


def share_equal(passes: Sequence[Pass], truth: Sequence[Pass]) -> float:
    """Of the answers that both gave whole, the share that are the same text; NaN where there are none."""
    both = [
        (said.text, true.text)
        for done, right in zip(passes, truth, strict=True)
        for said, true in zip(done.outcomes, right.outcomes, strict=True)
        if said.ok and true.ok
    ]
    return ratio(sum(said == true for said, true in both), len(both))
