"""cache-replay: the simulation against worked examples and brute force, and the command over a server's trace."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest

from loadtest.cache_replay import POLICIES, Accesses, load_accesses, parse_sizes, run, simulate
from loadtest.cli import main
from peft_serve.adapters.eviction import EvictionPolicy
from peft_serve.adapters.lookups import Lookup, Tier
from peft_serve.core import AdapterId
from peft_serve.engine.cache_trace import CacheTrace, appender


def accesses(text: str, *, sizes: dict[str, int] | None = None, load_s: dict[str, float] | None = None) -> Accesses:
    names = [AdapterId(name) for name in text]
    return Accesses(
        sequence=tuple(names),
        sizes={name: (sizes or {}).get(name, 1) for name in names},
        load_s={name: (load_s or {}).get(name, 1.0) for name in names},
    )


def hits(traffic: Accesses, policy: str, max_bytes: int) -> int:
    return simulate(traffic, POLICIES[policy], max_bytes).num_hits


def test_worked_examples() -> None:
    """The classic loop over one more page than there is room: LRU never hits, Belady nearly always."""
    loop = accesses("abcd" * 5)
    assert hits(loop, "lru", 3) == 0
    assert hits(loop, "belady", 3) == 11
    assert hits(loop, "lru", 4) == 16
    tally = simulate(accesses("abcab"), POLICIES["lru"], 2)
    assert (tally.num_hits, tally.evicted) == (0, list("abc"))


def best(sequence: str, room: int) -> int:
    """The most hits any choice of victims gives, for adapters of one size."""

    @cache
    def from_here(place: int, inside: frozenset[str]) -> int:
        if place == len(sequence):
            return 0
        name = sequence[place]
        if name in inside:
            return 1 + from_here(place + 1, inside)
        if len(inside) < room:
            return from_here(place + 1, inside | {name})
        return max(from_here(place + 1, inside - {victim} | {name}) for victim in inside)

    return from_here(0, frozenset())


@pytest.mark.parametrize("seed", range(20))
def test_belady_is_the_optimum_for_one_size_and_bounds_the_others(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("abcdef", weights=(5, 3, 2, 1, 1, 1), k=16))
    traffic = accesses(text)
    optimum = best(text, 3)
    assert hits(traffic, "belady", 3) == optimum
    assert max(hits(traffic, "lru", 3), hits(traffic, "cost", 3)) <= optimum


class Watched:
    """A policy whose tier is checked for its size at every change."""

    def __init__(self, policy: EvictionPolicy, max_bytes: int) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._inside: dict[AdapterId, int] = {}
        self.use, self.rest, self.victims = policy.use, policy.rest, policy.victims

    def enter(self, adapter: AdapterId, num_bytes: int) -> None:
        self._inside[adapter] = num_bytes
        assert sum(self._inside.values()) <= self._max_bytes
        self._policy.enter(adapter, num_bytes)

    def leave(self, adapter: AdapterId, *, is_evicted: bool) -> None:
        assert is_evicted
        del self._inside[adapter]
        self._policy.leave(adapter, is_evicted=is_evicted)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_lookup_is_counted_once_and_the_size_is_held(policy: str) -> None:
    rng = random.Random(1)
    sizes = {name: rng.randint(1, 6) for name in "abcdefgh"} | {"z": 99}
    traffic = accesses("".join(rng.choices("abcdefghz", k=300)), sizes=sizes, load_s={"a": 7.0})
    tally = simulate(traffic, lambda *given: Watched(POLICIES[policy](*given), 12), 12)
    assert tally.num_hits + tally.num_misses == 300
    assert tally.hit_bytes + tally.missed_bytes == sum(sizes[name] for name in traffic.sequence)
    assert tally.num_misses >= 8 + traffic.sequence.count(AdapterId("z")), "what does not fit is never kept"
    assert "z" not in tally.evicted


def test_cost_saves_reload_time_where_loads_differ() -> None:
    rng = random.Random(3)
    slow = dict.fromkeys("abc", 20.0)
    traffic = accesses("".join(rng.choices("abcdefghijkl", k=600)), load_s=slow)
    by_cost = simulate(traffic, POLICIES["cost"], 6)
    by_use = simulate(traffic, POLICIES["lru"], 6)
    assert by_cost.reload_s < 0.7 * by_use.reload_s


def test_sizes_are_shares_or_bytes() -> None:
    assert parse_sizes("10%, 50%,4096", 2000) == [("10%", 200), ("50%", 1000), ("4096", 4096)]
    with pytest.raises(ValueError, match="no size"):
        parse_sizes("10%,lots", 2000)


def write_trace(path: Path) -> None:
    """What a server would write for four adapters, one of which never loads."""
    trace = CacheTrace(appender(path), now=lambda: 1.0)
    trace.start()

    def note(tier: Tier, name: str, *, hit: bool, num_bytes: int | None, load_s: float | None = None) -> None:
        trace.note(Lookup(tier=tier, adapter=AdapterId(name), is_hit=hit, num_bytes=num_bytes, load_s=load_s))

    for name, num_bytes, load_s in (("a", 100, 1.0), ("b", 300, 3.0)):
        note("host", name, hit=False, num_bytes=None)
        note("disk", name, hit=True, num_bytes=num_bytes, load_s=load_s)
        note("device", name, hit=False, num_bytes=num_bytes)
    note("disk", "a", hit=True, num_bytes=100, load_s=3.0)
    note("device", "c", hit=True, num_bytes=50)
    note("host", "broken", hit=False, num_bytes=None)
    note("disk", "broken", hit=False, num_bytes=None, load_s=9.0)
    for name in "abaabbba":
        note("device", name, hit=True, num_bytes={"a": 100, "b": 300}[name])
    trace.stop()


def test_a_trace_of_the_server_is_read(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.jsonl")
    read = load_accesses(tmp_path / "trace.jsonl", "device")
    assert "".join(read.sequence) == "abcabaabbba"
    assert read.sizes == {"a": 100, "b": 300, "c": 50}
    assert read.load_s == {"a": 2.0, "b": 3.0, "c": pytest.approx(50 * 5.0 / 400)}
    assert read.num_bytes == 450
    host = load_accesses(tmp_path / "trace.jsonl", "host")
    assert ("".join(host.sequence), host.num_left_out) == ("ab", 1)


@pytest.mark.parametrize(
    "text", ["", "{}\n", "no json\n", '{"tier": "host", "adapter": "a", "bytes": null}\n', "[1]\n"]
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.jsonl"):
        load_accesses(path, "device")


def test_the_report_holds_every_policy_at_every_size(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path)
    report = run(path, sizes="50%,100%", tier="device")
    assert [(row[0], row[2]) for row in report.rows] == [
        (size, policy) for size in ("50%", "100%") for policy in ("lru", "cost", "belady")
    ]
    everything = report.rows[-1]
    assert everything[3] == pytest.approx(8 / 11), "with room for all only the first lookups miss"
    assert "neither an optimum nor a bound" in " ".join(report.notes)


def test_the_command_files_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path)
    assert main(["cache-replay", str(path), "--bytes", "50%,100%", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("*-cache-replay")
    assert (folder / "plot.png").stat().st_size > 1000
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert len(rows) == 6
    assert "belady" in capsys.readouterr().out
    assert main(["cache-replay", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
