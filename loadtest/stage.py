"""The stage of a workload: a base, adapters and a server that are ready, and ways to play traces on them."""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from loadtest.client import ClientOptions, LoadClient
from loadtest.measure import Summary, mean, percentile, summarise
from loadtest.options import Options
from loadtest.outcome import Outcome, save_outcomes
from loadtest.server import RunningServer, ServerCommand, metrics_delta, running_server
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

    def adapter_folders(self, count: int) -> list[Path]:
        """`count` adapter folders for the base, made if they are not there."""
        if not count:
            return []
        if count in self._made:
            return self._made[count]
        from loadtest.adapters import ATTENTION, FEED_FORWARD, make_adapters, mixture

        base = self.base()
        targets = ATTENTION if self.options.targets == "attention" else ATTENTION + FEED_FORWARD
        kinds = mixture(self.options.mixture, targets=targets)
        folder = self.options.work / f"{base.name}-{self.options.mixture.replace(':', '')}-{self.options.targets}"
        made: list[Path] = []
        with self._bar(f"making {count} adapters", count) as tick:
            for path in make_adapters(base, folder, kinds, count):
                made.append(path)
                tick()
        self._made[count] = made
        return made

    @contextmanager
    def server(
        self, *, num_adapters: int = 0, name: str = "server", extra: tuple[str, ...] = ()
    ) -> Iterator[RunningServer]:
        """A ready server that holds adapters 0 .. num_adapters - 1. With ``--url`` it is the one that runs there
        (its adapters are uploaded all the same: the same bytes again are no new version)."""
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
            with self._bar(f"uploading {len(folders)} adapters", len(folders)) as tick:
                asyncio.run(upload_adapters(server.url, folders, api_key=self.options.api_key, on_done=tick))

    def trace(self, **fields: Any) -> Trace:
        """A trace with the run's lengths and seed; `fields` as in `TraceSpec`."""
        blank = TraceSpec(adapters=(), lengths=self.options.lengths, seed=self.options.seed)
        return build_trace(replace(blank, **fields))

    def open_loop(self, server: RunningServer, trace: Trace, label: str) -> list[Outcome]:
        """Play a trace at its own pace."""
        drain_s = 10.0 if self.options.quick else 120.0

        def play(client: LoadClient, tick: Callable[[], None]) -> Coroutine[Any, Any, list[Outcome]]:
            return client.open_loop(trace.requests, on_done=tick)

        return self._play(server, trace, label, play, drain_s)

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

        def play(client: LoadClient, tick: Callable[[], None]) -> Coroutine[Any, Any, list[Outcome]]:
            return client.closed_loop(trace.requests, concurrency=in_flight, duration_s=duration_s, on_done=tick)

        return self._play(server, trace, label, play, 60.0)

    def _play(
        self,
        server: RunningServer,
        trace: Trace,
        label: str,
        play: Callable[[LoadClient, Callable[[], None]], Coroutine[Any, Any, list[Outcome]]],
        drain_s: float,
    ) -> list[Outcome]:
        options = ClientOptions(
            url=server.url,
            route="completions" if self.options.route == "completions" else "native",
            api_key=self.options.api_key,
            encode=self._encoder() if self.options.route == "completions" else None,
            drain_s=drain_s,
        )

        async def whole() -> list[Outcome]:
            async with LoadClient(options) as client:
                return await play(client, tick)

        before = server.metrics()
        with self._bar(label, len(trace.requests)) as tick:
            outcomes = asyncio.run(whole())
        self._keep(label, outcomes, metrics_delta(before, server.metrics()))
        return outcomes

    def _keep(self, label: str, outcomes: list[Outcome], moved: dict[str, float]) -> None:
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
    def _bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, refresh_per_second=2) as progress:
            task = progress.add_task(label, total=total)
            yield lambda: progress.advance(task)


def palindrome(phases: list[T]) -> list[T]:
    """The phases forwards, then backwards (A B B A): slow drifts of the machine fall on all alike."""
    return phases + phases[::-1]
