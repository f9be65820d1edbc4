"""W6: what does it cost that a request's adapter is nowhere near?

The same open-loop arrivals on one server, with adapters that are resident on the device; with ones that only the host
cache has, each evicted from its slot before it is asked for again; with ones whose memory was given back, so that the
disk has them as they were compiled; and with ones that nobody has asked for before: read, checked, compiled and
installed while their request waits. Phases are played forwards and backwards, the last kind with fresh adapters each
time.
"""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from loadtest.acts import sender, unload
from loadtest.adapters import adapter_name
from loadtest.measure import Summary, mean, ratio, summarise
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.server import RunningServer
from loadtest.stage import Calibration, Stage, palindrome
from loadtest.trace import Trace

KINDS = ("device", "host", "disk", "never seen")
FIELDS = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")
RHO = 0.4


def run(stage: Stage) -> Report:
    """Play W6; ``--adapters`` is how many requests a phase has, each for its own adapter when none was seen before."""
    if stage.options.url is not None:
        raise ValueError("w6 decides the sizes of its server's caches: leave --url out")
    count = stage.options.pick_adapters(whole=32, quick=12)
    known, slots = tuple(map(adapter_name, range(count))), max(2, 3 * count // 4)
    folders = stage.adapter_folders(3 * count)
    host_bytes = 2 * total_bytes(folders) + 2**20
    found: dict[str, list[Summary]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="loadtest-w6-") as shelf:
        fresh = _shelve(folders[count:], Path(shelf))
        sizes = (f"--max-resident-adapters={slots}", f"--host-adapter-bytes={host_bytes}", f"--adapters={shelf}")
        with stage.server(num_adapters=count, extra=sizes) as server:
            stage.warm(server, known)
            calibration = stage.calibrate(server)
            rate = RHO * calibration.capacity_rps
            for kind in palindrome(list(KINDS)):
                asked = _prepare(stage, server, kind, known, slots, fresh)
                outcomes = stage.open_loop(server, first(stage, asked, count, rate), f"from {kind}")
                found[kind].append(summarise(outcomes, unloaded_ttft_s=calibration.ttft_s))
    return report(found, calibration, count)


def _shelve(folders: list[Path], shelf: Path) -> list[tuple[str, ...]]:
    """Put checkpoints where the server finds them at its start and reads nothing; their names in two halves."""
    names = []
    for number, folder in enumerate(folders):
        names.append(f"new{number:05d}")
        shutil.copytree(folder, shelf / names[-1])
    half = len(names) // 2
    return [tuple(names[:half]), tuple(names[half:])]


def _prepare(
    stage: Stage, server: RunningServer, kind: str, known: tuple[str, ...], slots: int, fresh: list[tuple[str, ...]]
) -> tuple[str, ...]:
    """Bring about what `kind` says; answers with the adapters to ask for.

    Every adapter is used once and there are fewer slots than adapters, so those asked for first have lost theirs, and
    the others lose theirs to them."""
    if kind == "never seen":
        return fresh.pop()
    asked = known[: max(1, slots // 2)] if kind == "device" else known
    stage.warm(server, asked)
    if kind == "disk":
        unload(sender(server.url, api_key=stage.options.api_key), asked)
    return asked


def first(stage: Stage, names: tuple[str, ...], count: int, rate_per_s: float) -> Trace:
    """The first `count` requests of a stream at this rate."""
    long_s = 4 * count / rate_per_s + 10
    trace = stage.trace(adapters=names, popularity="distinct", rate_per_s=rate_per_s, duration_s=long_s)
    return replace(trace, requests=trace.requests[:count])


def total_bytes(folders: list[Path]) -> int:
    """What checkpoints take on disk."""
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def report(found: dict[str, list[Summary]], calibration: Calibration, count: int) -> Report:
    """Times by where the adapters come from, over those of resident ones."""

    def over(kind: str, field: str) -> float:
        times = {k: mean(getattr(one, field) for one in found[k]) for k in (kind, "device")}
        return ratio(times[kind], times["device"])

    rows: list[tuple[Cell, ...]] = [
        (
            kind,
            *(1e3 * mean(getattr(one, field) for one in found[kind]) for field in FIELDS),
            *(over(kind, field) for field in ("ttft_p50_s", "tpot_p50_s", "tpot_p99_s")),
            sum(one.num_failed for one in found[kind]),
        )
        for kind in KINDS
    ]
    return Report(
        name="w6",
        title=(
            f"W6: {count} requests a phase at rho {RHO}, by where their adapters come from "
            f"(C = {calibration.capacity_rps:.3g} requests/s, T0 = {1e3 * calibration.ttft_s:.3g} ms)"
        ),
        columns=(
            *("adapters from", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"),
            *("TTFT p50 over device", "TPOT p50 over device", "TPOT p99 over device", "failed"),
        ),
        rows=tuple(rows),
        notes=(
            f"TTFT p50 over device: disk {over('disk', 'ttft_p50_s'):.3f}, never seen "
            f"{over('never seen', 'ttft_p50_s'):.3f}; the operating system had the files in memory",
        ),
        plot=Plot(
            title="Time to first token by where the adapter comes from",
            x_label="tier",
            y_label="TTFT p50, ms",
            series={"TTFT p50": tuple((float(at), float(rows[at][1])) for at in range(len(KINDS)))},
            ticks=KINDS,
        ),
        settings={"capacity_rps": calibration.capacity_rps, "T0_s": calibration.ttft_s, "rho": RHO},
    )
