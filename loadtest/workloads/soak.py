"""Soak: does a server that is used in every way for hours hold more at the end than at the beginning?

Twenty adapters pass through four slots while they are uploaded, uploaded over, unloaded and deleted; one request in
twenty is hung up on, one in twenty may not wait, the others are streamed or not and have the answer they had before.
Every second the process is looked at; each look is a line of ``signs.jsonl``, and what is kept in memory are a few
numbers for each, so that eight hours are no other than two minutes. At the end every adapter is deleted: what the
server then still holds, somebody has forgotten to give back.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import isnan
from pathlib import Path

from loadtest.adapters import adapter_name
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.server import RunningServer
from loadtest.signs import Signs, look
from loadtest.slopes import growth, theil_sen, thinned
from loadtest.soaking import Soaking, Tally, session_of, until
from loadtest.stage import Stage
from loadtest.upload import zip_of

WARM_UP = 1 / 3
"""Share of the run that is not judged: pools grow to their size, every kernel and every shape is met."""

MAY_GROW = {
    "rss_mib": (8.0, 0.03),
    "descriptors": (3.0, 0.05),
    "threads": (2.0, 0.05),
    "kv_usage": (0.05, 0.0),
    "running": (4.0, 0.25),
    "waiting": (4.0, 0.25),
    "on_device": (1.0, 0.0),
    "on_host": (2.0, 0.1),
    "store_mib": (2.0, 0.1),
}
"""By how much a figure may grow from the end of the warm-up to the end: so much, or this share of its median."""

EMPTY = ("kv_usage", "running", "waiting", "on_device")
SETTLE_S = 30.0


def run(stage: Stage, *, minutes: float, slots: int = 4, every_s: float = 1.0) -> Report:
    """Soak for so many minutes; ``--adapters`` is the population (20), ``--concurrency`` the askers."""
    count = stage.options.pick_adapters(whole=20, quick=6)
    folders = stage.adapter_folders(count)
    with _server(stage, count, slots) as (server, store):
        soaked = Soaked(stage, server, store, every_s)
        zips = [zip_of(folder) for folder in folders]
        asyncio.run(soaked.go(count, zips, minutes))
    return report(soaked, minutes=minutes, count=count, slots=slots)


@contextmanager
def _server(stage: Stage, count: int, slots: int) -> Iterator[tuple[RunningServer, Path]]:
    if stage.options.url is not None:
        raise ValueError("soak looks into the server's process: leave --url out, and one is started")
    with tempfile.TemporaryDirectory(prefix="loadtest-soak-") as store:
        tight = ("--max-resident-adapters", str(slots), "--max-rows", str(max(2, stage.options.concurrency // 2)))
        with stage.server(num_adapters=count, extra=("--store", store, *tight)) as server:
            yield server, Path(store)


class Soaked:
    """One soak: looks each `every_s` seconds beside the traffic."""

    def __init__(self, stage: Stage, server: RunningServer, store: Path, every_s: float) -> None:
        self.tally = Tally()
        self.signs: list[Signs] = []
        self.last: Signs | None = None  # when everything has been deleted
        self._stage = stage
        self._server = server
        self._store = store
        self._every_s = every_s
        self._began_s = time.monotonic()

    async def go(self, count: int, zips: list[bytes], minutes: float) -> None:
        """The whole soak."""
        options = self._stage.options
        names = [adapter_name(number) for number in range(count)]
        moving = [f"soak-{number}" for number in range(count // 2)]
        async with session_of(self._server) as session:
            soaking = Soaking(session, names[: count - count // 2], moving, zips, options.seed)
            self.tally = soaking.tally
            stopped = asyncio.Event()
            traffic = asyncio.create_task(until(soaking, stopped, concurrency=options.concurrency, move_every_s=0.5))
            with self._stage.counting("soaking", round(60 * minutes), seconds=60 * minutes):
                await self._look_for(60 * minutes, traffic)
            stopped.set()
            await traffic
            await soaking.leave()
            for name in names[count - count // 2 :]:
                async with session.delete(f"/adapters/{name}") as answer:
                    soaking.tally.count("delete", answer.status)
        self.last = await self._settled()

    async def _look_for(self, seconds: float, traffic: "asyncio.Task[None]") -> None:
        with (self._stage.options.folder / "signs.jsonl").open("w") as lines:
            while (at_s := time.monotonic() - self._began_s) < seconds and not traffic.done():
                signs = await asyncio.to_thread(look, self._server, self._store, at_s)
                self.signs.append(signs)
                lines.write(json.dumps(asdict(signs)) + "\n")
                lines.flush()
                await asyncio.sleep(max(0.0, at_s + self._every_s - (time.monotonic() - self._began_s)))

    async def _settled(self) -> Signs:
        deadline = time.monotonic() + SETTLE_S
        while True:
            signs = await asyncio.to_thread(look, self._server, self._store, time.monotonic() - self._began_s)
            if not any(getattr(signs, name) for name in EMPTY) or time.monotonic() > deadline:
                return signs
            await asyncio.sleep(0.2)


def judged(signs: list[Signs], name: str) -> tuple[float, float, float, float, bool]:
    """Median, slope an hour, growth and what it may be, of a figure after the warm-up; and whether it keeps to it."""
    points = [(one.at_s, float(getattr(one, name))) for one in signs[int(len(signs) * WARM_UP) :]]
    points = [point for point in points if not isnan(point[1])]
    if not points:
        return (float("nan"),) * 4 + (False,)  # type: ignore[return-value]
    (_, middle), (least, share) = thinned(points, most=1)[0], MAY_GROW[name]
    most, grown = max(least, share * middle), growth(points)
    return middle, 3600 * theil_sen(points), grown, most, grown <= most


def report(soaked: Soaked, *, minutes: float, count: int, slots: int) -> Report:
    """A row for each figure, and the verdict."""
    rows: list[tuple[Cell, ...]] = []
    is_kept, last = True, soaked.last
    for name in MAY_GROW:
        middle, slope, grown, most, is_flat = judged(soaked.signs, name)
        left = float("nan") if last is None else float(getattr(last, name))
        is_fine = is_flat and (name not in EMPTY or left == 0)
        is_kept = is_kept and is_fine
        rows.append((name, middle, slope, grown, most, left, "kept" if is_fine else "BROKEN"))
    tally = soaked.tally
    is_clean = not (tally.num_errors or tally.num_wrong or tally.num_broken)
    total = sum(tally.statuses.values())
    return Report(
        name="soak",
        title=f"Soak: {minutes:g} minutes, {count} adapters over {slots} slots, {total} requests and acts",
        columns=("figure", "median", "slope an hour", "growth", "may grow by", "left at the end", "verdict"),
        rows=tuple(rows),
        notes=(
            f"{'PASSED' if is_kept and is_clean else 'FAILED'}: {tally.num_errors} answers of 500 and above, "
            f"{tally.num_wrong} wrong answers, {tally.num_broken} broken connections",
            "statuses: " + ", ".join(f"{what}: {number}" for what, number in sorted(tally.statuses.items())),
            *tally.first_troubles,
        ),
        plot=_plot(soaked.signs),
        settings={"minutes": minutes, "adapters": count, "slots": slots, "passed": is_kept and is_clean},
    )


def _plot(signs: list[Signs]) -> Plot:
    """The process's figures over the median of each, so that they share axes."""
    series = {}
    for name in ("rss_mib", "descriptors", "threads", "store_mib"):
        points = [(one.at_s / 60, getattr(one, name)) for one in signs]
        middle = thinned(points, most=1)[0][1] if points else 0.0
        if middle:
            series[name] = tuple((x, y / middle) for x, y in thinned(points, most=60))
    return Plot(title="What the process holds", x_label="minutes", y_label="over its median", series=series)
