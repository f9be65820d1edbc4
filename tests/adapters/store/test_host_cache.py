import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.adapters.eviction import CostAware
from peft_serve.adapters.host_cache import HostCache
from peft_serve.adapters.lookups import Lookup
from peft_serve.adapters.primitives import Adapter, SoftPrompt
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterDamaged, AdapterUnavailable, Unavailable

KIB = 1024


def adapter(name: str, kib: int = 1) -> Adapter:
    return Adapter(id=AdapterId(name), method="T", prompt=SoftPrompt(torch.zeros(kib, KIB // 4)))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Loader:
    """Loads what `sizes` names, when `gate` is open."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.failing: dict[str, Exception] = {}
        self.loads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)

    def __call__(self, adapter_id: AdapterId) -> Adapter:
        self.loads.append(adapter_id)
        self.started.release()
        assert self.gate.wait(10)
        if adapter_id in self.failing:
            raise self.failing[adapter_id]
        return adapter(adapter_id, self.sizes.get(adapter_id, 1))


class Bench:
    """A cache of 4 KiB with its fakes, and requests that can be waited for."""

    def __init__(self, **options: object) -> None:
        self.clock = Clock()
        self.loader = Loader()
        self.lookups: list[Lookup] = []
        self.num_evicted = 0
        self.cache = HostCache(
            self.loader,
            max_bytes=4 * KIB,
            clock=self.clock,
            on_lookup=self.lookups.append,
            on_evict=self._count_eviction,
            **options,
        )

    def _count_eviction(self) -> None:
        self.num_evicted += 1

    def ask(self, name: str) -> Callable[[], Adapter | Exception]:
        done = threading.Event()
        outcomes: list[Adapter | Exception] = []

        def on_done(adapter_id: AdapterId, outcome: Adapter | Exception) -> None:
            assert adapter_id == name
            outcomes.append(outcome)
            done.set()

        self.cache.request(AdapterId(name), on_done)

        def wait() -> Adapter | Exception:
            assert done.wait(10)
            (outcome,) = outcomes
            return outcome

        return wait

    def fetch(self, name: str) -> Adapter | Exception:
        """Ask, wait, and give the lease back."""
        outcome = self.ask(name)()
        if isinstance(outcome, Adapter):
            self.cache.release(AdapterId(name))
        self.cache.check()
        return outcome


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.loader.gate.set()
    bench.cache.close()
    bench.cache.check()


def test_one_load_serves_all_that_wait_and_those_after(bench: Bench) -> None:
    bench.loader.gate.clear()
    waits = [bench.ask("a") for _ in range(5)]
    assert bench.cache.stats().num_loading == 1
    bench.loader.gate.set()
    outcomes = [wait() for wait in waits] + [bench.ask("a")()]
    assert all(outcome is outcomes[0] for outcome in outcomes)
    assert bench.loader.loads == ["a"]
    stats = bench.cache.stats()
    assert (stats.hits, stats.misses, stats.num_bytes, stats.num_adapters) == (1, 5, KIB, 1)
    for _ in range(6):
        bench.cache.release(AdapterId("a"))
    with pytest.raises(AssertionError):
        bench.cache.release(AdapterId("a"))


def test_the_least_recently_used_goes_first(bench: Bench) -> None:
    for name in "abcd":
        bench.fetch(name)
    bench.fetch("a")
    bench.fetch("e")
    assert bench.cache.resident() == ("c", "d", "a", "e")
    assert bench.cache.stats().evictions == 1
    assert bench.num_evicted == 1
    assert bench.cache.get(AdapterId("b")) is None
    assert bench.cache.get(AdapterId("a")) is not None


def test_a_leased_adapter_is_never_evicted(bench: Bench) -> None:
    for name in "abcd":
        bench.ask(name)()
    bench.ask("e")()  # all are leased: over the budget for a while
    assert bench.cache.resident() == tuple("abcde")
    bench.cache.check()
    bench.cache.release(AdapterId("c"))
    assert bench.cache.resident() == tuple("abde")
    bench.cache.release(AdapterId("a"))
    assert bench.cache.resident() == tuple("abde")
    for name in "abde":
        if name != "a":
            bench.cache.release(AdapterId(name))


def test_each_delivery_is_a_lease_of_its_own(bench: Bench) -> None:
    bench.ask("a")()
    bench.ask("a")()
    bench.cache.release(AdapterId("a"))
    for name in "bcde":
        bench.fetch(name)
    assert "a" in bench.cache.resident()
    bench.cache.release(AdapterId("a"))
    bench.fetch("f")
    assert "a" not in bench.cache.resident()


def test_one_larger_than_the_cache_is_delivered_and_not_kept(bench: Bench) -> None:
    bench.fetch("a")
    bench.loader.sizes["big"] = 9
    assert isinstance(bench.ask("big")(), Adapter)
    assert bench.cache.resident() == ("a", "big")
    assert bench.ask("big")() is bench.cache.get(AdapterId("big"))  # shared while it is leased
    bench.cache.release(AdapterId("big"))
    bench.cache.release(AdapterId("big"))
    assert bench.cache.resident() == ("a",)
    assert bench.cache.stats().evictions == 0
    assert bench.num_evicted == 0


def test_a_failure_is_remembered_for_a_while(bench: Bench) -> None:
    bench.loader.failing["a"] = AdapterUnavailable("broken")
    assert bench.fetch("a") is bench.loader.failing["a"]
    del bench.loader.failing["a"]
    bench.clock.now += 9.9
    assert isinstance(bench.fetch("a"), AdapterUnavailable)
    assert bench.loader.loads == ["a"]
    bench.clock.now += 0.2
    assert isinstance(bench.fetch("a"), Adapter)
    assert bench.loader.loads == ["a", "a"]


def test_damage_is_not_remembered_for_an_upload_mends_it(bench: Bench) -> None:
    bench.loader.failing["a"] = AdapterDamaged("damaged; upload it again")
    assert bench.fetch("a") is bench.loader.failing["a"]
    del bench.loader.failing["a"]
    assert isinstance(bench.fetch("a"), Adapter), "at once"


def test_a_failure_fails_its_own_requests_only_and_holds_no_frames(bench: Bench) -> None:
    def failing() -> Exception:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            error = ValueError("broken")
            error.__cause__ = cause
            return error

    bench.loader.failing["a"] = failing()
    bench.loader.gate.clear()
    waits = {name: bench.ask(name) for name in "ab"}
    bench.loader.gate.set()
    failed = waits["a"]()
    assert isinstance(failed, ValueError)
    assert failed.__traceback__ is None
    assert failed.__cause__ is not None
    assert failed.__cause__.__traceback__ is None
    assert isinstance(waits["b"](), Adapter)


def test_drop_forgets_an_adapter_and_a_failure(bench: Bench) -> None:
    bench.fetch("a")
    bench.cache.drop(AdapterId("a"))
    bench.cache.drop(AdapterId("never"))
    assert bench.cache.resident() == ()
    bench.loader.failing["b"] = AdapterUnavailable("broken")
    bench.fetch("b")
    bench.cache.drop(AdapterId("b"))
    del bench.loader.failing["b"]
    assert isinstance(bench.fetch("b"), Adapter)


def test_a_dropped_adapter_goes_with_its_last_lease(bench: Bench) -> None:
    bench.ask("a")()
    bench.ask("a")()
    for _ in range(2):
        bench.cache.drop(AdapterId("a"))
        bench.cache.check()
        assert bench.cache.get(AdapterId("a")) is not None
        bench.cache.release(AdapterId("a"))
    assert bench.cache.resident() == ()


def test_one_dropped_while_it_loads_is_delivered_and_not_kept(bench: Bench) -> None:
    bench.loader.gate.clear()
    wait = bench.ask("a")
    assert bench.loader.started.acquire(timeout=10)
    bench.cache.drop(AdapterId("a"))
    bench.loader.gate.set()
    assert isinstance(wait(), Adapter)
    bench.cache.release(AdapterId("a"))
    assert bench.cache.resident() == ()


def test_a_receiver_that_fails_does_not_silence_the_others(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def broken(adapter_id: AdapterId, outcome: Adapter | Exception) -> None:
        raise RuntimeError("receiver")

    bench.loader.gate.clear()
    bench.cache.request(AdapterId("a"), broken)
    wait = bench.ask("a")
    bench.loader.gate.set()
    assert isinstance(wait(), Adapter)
    assert isinstance(bench.fetch("b"), Adapter)
    assert "the receiver of adapter a failed" in caplog.text


def test_loads_are_observed_with_their_seconds(bench: Bench) -> None:
    bench.loader.gate.clear()
    wait = bench.ask("a")
    assert bench.loader.started.acquire(timeout=10)
    bench.clock.now += 2.5
    bench.loader.gate.set()
    wait()
    a = AdapterId("a")
    assert bench.lookups == [
        Lookup(tier="host", adapter=a, is_hit=False),
        Lookup(tier="disk", adapter=a, is_hit=True, num_bytes=KIB, load_s=2.5),
    ]
    bench.ask("a")()
    assert bench.lookups[2:] == [Lookup(tier="host", adapter=a, is_hit=True, num_bytes=KIB)]


def test_a_load_ahead_that_nobody_waits_for_is_the_disks_alone(bench: Bench) -> None:
    """So the disk may have more hits than the host misses, and each tier's figures are its own lookups."""
    bench.cache.fetch_ahead(AdapterId("a"))
    while bench.cache.stats().num_loading:
        time.sleep(0.001)
    bench.ask("b")()
    by_tier = {tier: [one.is_hit for one in bench.lookups if one.tier == tier] for tier in ("host", "disk")}
    assert by_tier == {"host": [False], "disk": [True, True]}
    bench.cache.release(AdapterId("b"))


def test_a_load_begun_ahead_serves_who_asks_and_is_no_hit_of_theirs(bench: Bench) -> None:
    bench.loader.gate.clear()
    bench.cache.fetch_ahead(AdapterId("a"))
    assert bench.loader.started.acquire(timeout=10)  # before anybody asks
    wait = bench.ask("a")
    bench.loader.gate.set()
    assert isinstance(wait(), Adapter)
    bench.cache.fetch_ahead(AdapterId("b"))
    while bench.cache.stats().num_loading:
        time.sleep(0.001)
    bench.cache.check()
    assert [bench.ask("b")().id, bench.ask("b")().id] == ["b", "b"]
    assert bench.loader.loads == ["a", "b"]
    asked = [(one.adapter, one.is_hit) for one in bench.lookups if one.tier == "host"]
    assert asked == [("a", False), ("b", False), ("b", True)]
    stats = bench.cache.stats()
    assert (stats.hits, stats.misses) == (1, 2)
    for name in "abb":
        bench.cache.release(AdapterId(name))
    bench.cache.check()


def test_nothing_is_begun_ahead_beyond_the_bound_or_twice_or_of_what_fails() -> None:
    bench = Bench(max_ahead=2)
    bench.loader.failing["bad"] = OSError("gone")
    assert isinstance(bench.fetch("bad"), OSError)
    bench.loader.gate.clear()
    for name in ("bad", "a", "a", "b", "c"):
        bench.cache.fetch_ahead(AdapterId(name))
    bench.loader.gate.set()
    assert isinstance(bench.fetch("d"), Adapter)  # there is one thread: the others have been loaded by now
    assert bench.loader.loads == ["bad", "a", "b", "d"]
    bench.cache.close()
    bench.cache.fetch_ahead(AdapterId("e"))
    assert bench.cache.stats().num_loading == 0


def test_one_fetched_ahead_is_kept_only_where_there_is_room(bench: Bench) -> None:
    bench.loader.sizes["huge"] = 5
    bench.loader.gate.clear()
    bench.cache.fetch_ahead(AdapterId("huge"))
    bench.cache.fetch_ahead(AdapterId("dropped"))
    bench.cache.drop(AdapterId("dropped"))
    bench.loader.gate.set()
    assert isinstance(bench.fetch("a"), Adapter)
    assert bench.cache.resident() == ("a",)
    bench.cache.check()


def test_a_load_that_fails_is_a_miss_of_the_disk_and_is_looked_for_once(bench: Bench) -> None:
    bench.loader.failing["a"] = AdapterUnavailable("broken")
    bench.fetch("a")
    bench.fetch("a")
    assert [(one.tier, one.is_hit, one.num_bytes) for one in bench.lookups] == [
        ("host", False, None),
        ("disk", False, None),
        ("host", False, None),
    ]


def test_with_another_policy_those_that_load_fast_go_first() -> None:
    slow = AdapterId("a")
    bench = Bench(policy=CostAware(lambda adapter_id, _bytes: 9.0 if adapter_id == slow else 1.0))
    for name in "abcdefgh":
        bench.fetch(name)
    assert slow in bench.cache.resident()
    assert bench.num_evicted == 4
    bench.cache.drop(slow)
    bench.cache.check()
    bench.cache.close()


def test_close_answers_everyone() -> None:
    bench = Bench()
    bench.loader.gate.clear()
    running, waiting = bench.ask("a"), bench.ask("b")
    assert bench.loader.started.acquire(timeout=10)
    closing = threading.Thread(target=bench.cache.close)
    closing.start()
    refusals: list[Adapter | Exception] = []
    while not refusals:
        bench.cache.request(AdapterId("probe"), lambda _id, outcome: refusals.append(outcome))
        closing.join(0.001)
    bench.loader.gate.set()
    closing.join(10)
    assert isinstance(running(), Adapter)
    assert isinstance(waiting(), Unavailable)
    assert isinstance(bench.ask("c")(), Unavailable)
    bench.cache.check()


@pytest.mark.parametrize("policy", [None, CostAware(lambda adapter_id, _bytes: float(len(adapter_id)))])
def test_many_threads_and_a_small_cache_keep_the_books(policy: CostAware | None) -> None:
    bench = Bench(num_threads=3, policy=policy)
    bench.loader.sizes = {str(i): 1 + i % 3 for i in range(12)}
    bench.loader.failing["7"] = AdapterUnavailable("broken")
    wrong: list[str] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            name = str(rng.randrange(12))
            outcome = bench.ask(name)()
            if isinstance(outcome, Adapter):
                if outcome.id != name or bench.cache.get(AdapterId(name)) is not outcome:
                    wrong.append(name)
                bench.cache.release(AdapterId(name))
            elif name != "7":
                wrong.append(name)
            if rng.random() < 0.05:
                bench.cache.drop(AdapterId(name))
            bench.cache.check()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.cache.close()
    assert wrong == []
    stats = bench.cache.stats()
    assert stats.num_bytes <= 4 * KIB
    assert stats.hits + stats.misses == 300
    asked = [one.is_hit for one in bench.lookups if one.tier == "host"]
    assert (asked.count(True), asked.count(False)) == (stats.hits, stats.misses)
    assert bench.num_evicted == stats.evictions


@pytest.mark.parametrize("by_cost", [False, True])
@settings(max_examples=40, deadline=None)
@given(script=st.lists(st.tuples(st.sampled_from(["lease", "lease", "release", "drop"]), st.integers(0, 5))))
def test_whatever_happens_leased_adapters_stay_and_the_rest_is_within_the_budget(
    script: list[tuple[str, int]], by_cost: bool
) -> None:
    bench = Bench(policy=CostAware(lambda adapter_id, _bytes: 1.0 + int(adapter_id) % 2) if by_cost else None)
    bench.loader.sizes = {str(i): 1 + i % 3 for i in range(6)} | {"5": 9}
    leases: dict[str, list[Adapter]] = {str(i): [] for i in range(6)}
    for act, number in script:
        name = str(number)
        if act == "lease":
            outcome = bench.ask(name)()
            assert isinstance(outcome, Adapter)
            leases[name].append(outcome)
        elif act == "release" and leases[name]:
            leases[name].pop()
            bench.cache.release(AdapterId(name))
        elif act == "drop":
            bench.cache.drop(AdapterId(name))
        bench.cache.check()
        for leased, copies in leases.items():
            assert not copies or bench.cache.get(AdapterId(leased)) is copies[-1]
        if not any(leases.values()):
            assert bench.cache.stats().num_bytes <= 4 * KIB
    bench.cache.close()
