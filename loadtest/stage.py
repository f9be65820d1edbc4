"""The stage of a workload: a base, adapters and a server that are ready, and ways to play traces on them."""

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from tokenizers import Tokenizer

from loadtest.client import ClientOptions, LoadClient
from loadtest.measure import Summary, mean, percentile, summarise
from loadtest.options import Options
from loadtest.outcome import Outcome, save_outcomes
from loadtest.progress import bar
from loadtest.routes import Completions, Native, Route
from loadtest.server import RunningServer, ServerCommand, metrics_delta, reach, running_server
from loadtest.trace import Trace, TraceSpec, build_trace
from loadtest.upload import upload_adapters

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the base alone does on this machine: C (requests a second when saturated), T0 and t0 (unloaded time
    to the first token, and of each later one). Loads are given as rho = R / C, to carry over between machines."""

    capacity_rps: float
    ttft_s: float
    tpot_s: float


class Stage:
    """Prepares bases and adapters, starts servers, plays traces with a progress bar, keeps raw outcomes."""

    def __init__(self, options: Options, console: Console) -> None:
        """Nothing is made until it is asked for."""
        self.options = options
        self._console = console
        self._phase = 0
        self._made: dict[int, list[Path]] = {}

    def base(self) -> Path:
        """The base's folder, made if it is a shape."""
        from loadtest.bases import ensure_base  # torch and transformers: seconds that --url runs do without

        return ensure_base(self.options.base, self.options.work)

    def adapters_folder(self) -> Path:
        """Where the adapters of this run's base, mixture and targets are."""
        options = self.options
        return options.work / f"{self.base().name}-{options.mixture.replace(':', '')}-{options.targets}"

    def adapter_folders(self, count: int) -> list[Path]:
        """`count` adapter folders for the base, made if they are not there."""
        if not count:
            return []
        if count in self._made:
            return self._made[count]
        from loadtest.adapters import ATTENTION, FEED_FORWARD, make_adapters, mixture

        targets = ATTENTION if self.options.targets == "attention" else ATTENTION + FEED_FORWARD
        kinds = mixture(self.options.mixture, targets=targets)
        made: list[Path] = []
        with self.counting(f"making {count} adapters", count) as tick:
            for path in make_adapters(self.base(), self.adapters_folder(), kinds, count):
                made.append(path)
                tick()
        self._made[count] = made
        return made

    def among(self, mixture: str) -> "Stage":
        """The same stage with other adapters. Its phases are numbered anew: label them apart."""
        return Stage(replace(self.options, mixture=mixture), self._console)

    def reach(self) -> None:
        """RuntimeError if ``--url`` is given and nobody answers there: said before anything is made for it."""
        if self.options.url is not None:
            reach(self.options.url)

    @contextmanager
    def server(
        self, *, num_adapters: int = 0, name: str = "server", extra: tuple[str, ...] = ()
    ) -> Iterator[RunningServer]:
        """A ready server that holds adapters 0 .. num_adapters - 1. With ``--url`` it is the one that runs there
        (its adapters are uploaded all the same: the same bytes again are no new version)."""
        self.reach()
        options, folders = self.options, self.adapter_folders(num_adapters)
        if options.url is not None:
            given = RunningServer(url=options.url, start_s=nan, pid=0, api_key=options.api_key)
            self._upload(given, folders)
            yield given
            return
        with tempfile.TemporaryDirectory(prefix="loadtest-store-") as store:
            command = ServerCommand(
                base=self.base(),
                arguments=(
                    *("--store", store, "--device", options.device, "--dtype", options.dtype),
                    *("--num-threads", str(options.num_threads), *options.server_arguments, *extra),
                ),
                environment={"OMP_NUM_THREADS": str(options.num_threads)},
            )
            self._console.print(f"starting {name} ...")
            with running_server(command, options.folder / f"{name}.log") as running:
                self._upload(running, folders)
                yield running

    def _upload(self, server: RunningServer, folders: list[Path]) -> None:
        if folders:
            with self.counting(f"uploading {len(folders)} adapters", len(folders)) as tick:
                asyncio.run(upload_adapters(server.url, folders, api_key=self.options.api_key, on_done=tick))

    def trace(self, **fields: Any) -> Trace:
        """A trace with the run's lengths and seed; `fields` as in `TraceSpec`."""
        blank = TraceSpec(adapters=(), lengths=self.options.lengths, seed=self.options.seed)
        return build_trace(replace(blank, **fields))

    def open_loop(self, server: RunningServer, trace: Trace, label: str) -> list[Outcome]:
        """Play a trace at its own pace."""
        drain_s = 10.0 if self.options.quick else 120.0

        return self.play(self.client(server, drain_s), trace, label, observe=server.metrics)

    def closed_loop(
        self,
        server: RunningServer,
        trace: Trace,
        label: str,
        *,
        concurrency: int | None = None,
        duration_s: float | None = None,
    ) -> list[Outcome]:
        """Play a trace with a fixed number of requests in flight, to its end or for `duration_s`."""
        in_flight = concurrency or self.options.concurrency
        client = self.client(server, 60.0)
        return self.play(client, trace, label, concurrency=in_flight, duration_s=duration_s, observe=server.metrics)

    def one_after_another(self, server: RunningServer, groups: Sequence[Trace], label: str) -> list[Outcome]:
        """Play each group's requests at once, and the next group when the last answer of one is there. Times count
        from the start of their own group."""

        async def whole(tick: Callable[[], None]) -> list[Outcome]:
            played: list[Outcome] = []
            async with LoadClient(self.client(server, 60.0)) as client:
                for group in groups:
                    requests = group.requests
                    played += await client.closed_loop(requests, concurrency=len(requests), on_done=tick)
            return played

        before = server.metrics()
        with self.counting(label, sum(len(group.requests) for group in groups)) as tick:
            outcomes = asyncio.run(whole(tick))
        self.keep(label, outcomes, metrics_delta(before, server.metrics()))
        return outcomes

    def client(self, server: RunningServer, drain_s: float = 60.0) -> ClientOptions:
        """How to ask this server by the run's route."""
        exact = self.options.route == "completions"
        route: Route = Completions(encode=self._encoder()) if exact else Native()
        return ClientOptions(url=server.url, route=route, api_key=self.options.api_key, drain_s=drain_s)

    def play(
        self,
        options: ClientOptions,
        trace: Trace,
        label: str,
        *,
        concurrency: int | None = None,
        duration_s: float | None = None,
        observe: Callable[[], dict[str, float]] = dict,
    ) -> list[Outcome]:
        """Play a trace with a client of one's own: at its own pace, or with `concurrency` requests in flight. The
        outcomes are kept, and what moved in what `observe` sees (a server's metrics)."""

        async def whole(tick: Callable[[], None]) -> list[Outcome]:
            async with LoadClient(options) as client:
                if concurrency is None:
                    return await client.open_loop(trace.requests, on_done=tick)
                return await client.closed_loop(
                    trace.requests, concurrency=concurrency, duration_s=duration_s, on_done=tick
                )

        before = observe()
        with self.counting(label, len(trace.requests), seconds=duration_s) as tick:
            outcomes = asyncio.run(whole(tick))
        self.keep(label, outcomes, metrics_delta(before, observe()))
        return outcomes

    def keep(self, label: str, outcomes: list[Outcome], moved: dict[str, float]) -> None:
        """File a phase's outcomes and what moved in the metrics meanwhile."""
        self._phase += 1
        stem = self.options.folder / f"{self._phase:03d}-{''.join(c if c.isalnum() else '-' for c in label)}"
        save_outcomes(outcomes, stem.with_suffix(".jsonl"))
        stem.with_suffix(".metrics.txt").write_text("".join(f"{series} {by:g}\n" for series, by in moved.items()))

    def _encoder(self) -> Callable[[str], list[int]]:
        tokenizer = Tokenizer.from_file(str(self.base() / "tokenizer.json"))
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)

    def warm(self, server: RunningServer, names: tuple[str, ...]) -> None:
        """One short request to the base and to each adapter, so that loads are not part of what is measured."""
        spec = {"adapters": names, "popularity": "distinct", "num_requests": max(4, len(names))}
        trace = self.trace(**spec)
        short = tuple(replace(request, max_new_tokens=2) for request in trace.requests)
        outcomes = self.closed_loop(server, Trace(requests=short), f"warming {len(names)} adapters", concurrency=4)
        failed = [outcome for outcome in outcomes if not outcome.ok]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(outcomes)} warm-up requests failed, one with {failed[0].error}")

    def calibrate(self, server: RunningServer) -> Calibration:
        """Measure C, T0 and t0 on the base alone."""
        quick = self.options.quick
        alone = self.trace(num_requests=4 if quick else 20)
        single = self.closed_loop(server, alone, "unloaded base", concurrency=1)
        ttfts = [outcome.ttft_s for outcome in single if outcome.ok and outcome.ttft_s is not None]
        tpots = [outcome.tpot_s for outcome in single if outcome.ok and outcome.tpot_s is not None]
        busy = self.saturated(server, self.endless(()), "saturated base")
        wanted = mean(float(request.max_new_tokens) for request in self.endless(()).requests)
        return Calibration(
            capacity_rps=busy.tokens_per_s / wanted, ttft_s=percentile(ttfts, 50), tpot_s=percentile(tpots, 50)
        )

    def endless(self, names: tuple[str, ...], popularity: str = "slora:1") -> Trace:
        """A trace long enough for a closed loop that ends by the clock."""
        return self.trace(adapters=names, popularity=popularity, num_requests=int(200 * self.options.duration_s))

    def saturated(self, server: RunningServer, trace: Trace, label: str) -> Summary:
        """The figures of a closed loop of `duration_s`."""
        return summarise(self.closed_loop(server, trace, label, duration_s=self.options.duration_s))

    @contextmanager
    def spinning(self, label: str) -> Iterator[None]:
        """A spinner while something runs that says nothing until it ends."""
        with self._console.status(label):
            yield

    @contextmanager
    def counting(self, label: str, total: int, *, seconds: float | None = None) -> Iterator[Callable[[], None]]:
        """A progress bar over `total` things, or over `seconds` if the clock ends the run; yields its tick."""
        with bar(self._console, label, count=total, seconds=seconds) as tick:
            yield tick


def palindrome(phases: list[T]) -> list[T]:
    """The phases forwards, then backwards (A B B A): slow drifts of the machine fall on all alike."""
    return phases + phases[::-1]
