"""Placements: what all of them promise, and what each of them is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from random import Random
from string import ascii_lowercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.core import BASE, AdapterId
from peft_serve.placement.choosing import make_placement
from peft_serve.placement.placements import MOST_ASKED, PLACEMENTS, PlacementName
from peft_serve.placement.rendezvous import Ranks, ranked
from peft_serve.placement.replicas import ReplicaState
from peft_serve.placement.residency import Bounds, ResidencyAware

A = AdapterId("a")
adapters = st.sampled_from([A, AdapterId("b"), BASE])
tiers = st.frozensets(st.sampled_from([A, AdapterId("b")]))


def replica(
    name: str,
    num_ongoing: int = 0,
    *,
    resident: Set[AdapterId] = frozenset(),
    on_host: Set[AdapterId] = frozenset(),
    wait_s: float = 0.0,
) -> ReplicaState:
    """One that runs 20 at once and takes 100."""
    return ReplicaState(
        name=name,
        num_ongoing=num_ongoing,
        max_ongoing=100,
        max_running=20,
        resident=frozenset(resident),
        on_host=frozenset(on_host),
        wait_s=wait_s,
    )


@st.composite
def clusters(draw: st.DrawFn) -> list[ReplicaState]:
    names = draw(st.lists(st.text(ascii_lowercase, min_size=1, max_size=4), unique=True, max_size=12))
    return [
        ReplicaState(
            name=name,
            num_ongoing=draw(st.integers(0, 12)),
            max_ongoing=10,
            resident=draw(tiers),
            on_host=draw(tiers),
            wait_s=draw(st.floats(0, 3)),
            max_running=draw(st.none() | st.integers(1, 10)),
        )
        for name in names
    ]


@pytest.mark.parametrize("name", PLACEMENTS)
@settings(max_examples=60, deadline=None)
@given(adapter=adapters, replicas=clusters(), seed=st.integers(0, 9))
def test_an_order_names_open_replicas_once(
    name: PlacementName, adapter: AdapterId, replicas: Sequence[ReplicaState], seed: int
) -> None:
    """Nobody who is full, nobody twice, as many as there are up to the most; the same again for the same seed."""
    order = make_placement(name, Random(seed)).order(adapter, replicas)
    open_ones = {one.name for one in replicas if one.num_ongoing < one.max_ongoing}
    assert len(set(order)) == len(order) == min(MOST_ASKED, len(open_ones))
    assert open_ones >= set(order)
    assert order == make_placement(name, Random(seed)).order(adapter, replicas)


@pytest.mark.parametrize("name", ["residency", "rendezvous"])
@settings(max_examples=40, deadline=None)
@given(replicas=clusters(), shuffler=st.randoms(use_true_random=False))
def test_routers_that_know_the_same_decide_alike(
    name: PlacementName, replicas: list[ReplicaState], shuffler: Random
) -> None:
    order = make_placement(name, Random(0)).order(A, replicas)
    shuffler.shuffle(replicas)
    assert make_placement(name, Random(1)).order(A, replicas)[:1] == order[:1]


# -- the hash


@settings(max_examples=25, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=6), min_size=1, max_size=12), st.text(max_size=6))
def test_only_the_adapters_of_a_replica_that_goes_move(names: set[str], gone: str) -> None:
    """With it and without it the others stand in the same order, for every adapter."""
    for number in range(20):
        with_it = ranked(f"adapter-{number}", names | {gone})
        assert [name for name in with_it if name != gone] == [*ranked(f"adapter-{number}", names - {gone})]


@pytest.mark.parametrize("num_replicas", [2, 5, 20])
def test_a_replica_that_comes_takes_its_share(num_replicas: int) -> None:
    """1/n of 4000 adapters, within five standard deviations; homes are as even."""
    count, names = 4000, [f"replica-{number}" for number in range(num_replicas)]
    homes = [ranked(f"adapter-{number}", names)[0] for number in range(count)]
    after = [ranked(f"adapter-{number}", [*names, "new"])[0] for number in range(count)]
    moved = [new for old, new in zip(homes, after, strict=True) if old != new]
    assert set(moved) == {"new"}
    for found, share in [
        (len(moved), 1 / (num_replicas + 1)),
        *((n, 1 / num_replicas) for n in Counter(homes).values()),
    ]:
        assert abs(found - count * share) < 5 * (count * share * (1 - share)) ** 0.5


def test_the_hash_is_the_same_everywhere() -> None:
    """These came from another process: a change would send every adapter of a running cluster somewhere else."""
    assert ranked("sha256:aa", ["r1", "r2", "r3", "r4"]) == ("r4", "r2", "r1", "r3")
    assert ranked("a", "pqrs") == ("q", "r", "s", "p")


def test_remembered_orders_are_the_hash_orders() -> None:
    ranks, names = Ranks(max_kept=12), list("pqrs")
    for known in (names, list("prs"), names):
        for adapter in "abcabcdefgahija":
            assert ranks.of(adapter, known) == ranked(adapter, known)


# -- each one's own

NAMES = ("p", "q", "r", "s")
HOME, SECOND, THIRD, LAST = ranked(A, NAMES)
EVERYBODY = ("residency", "rendezvous", "least-loaded")


def first(placement: PlacementName, *known: ReplicaState) -> str:
    """Whom it asks first, the others of `NAMES` having nothing to do and no adapter."""
    told = {one.name: one for one in known}
    return make_placement(placement, Random(0)).order(A, [told.get(name, replica(name)) for name in NAMES])[0]


def test_rendezvous_goes_to_the_next_rank_when_the_first_is_full() -> None:
    assert first("rendezvous", replica(HOME, 99)) == HOME
    assert first("rendezvous", replica(HOME, 100), replica(SECOND, 99)) == SECOND


def test_least_loaded_goes_by_what_a_replica_runs_at_once() -> None:
    small = ReplicaState(name=HOME, num_ongoing=3, max_ongoing=100, max_running=4)
    assert first("least-loaded", small, *(replica(name, 14) for name in (SECOND, THIRD)), replica(LAST, 16)) != HOME
    assert first("least-loaded", small, *(replica(name, 16) for name in (SECOND, THIRD, LAST))) == HOME


@pytest.mark.parametrize("placement", EVERYBODY)
def test_the_base_goes_to_the_least_loaded(placement: PlacementName) -> None:
    replicas = [replica(name, 5 + number) for number, name in enumerate(NAMES)]
    assert make_placement(placement, Random(0)).order(BASE, replicas) == NAMES


@pytest.mark.parametrize("placement", ["random", "least-loaded"])
def test_equals_are_asked_evenly(placement: PlacementName) -> None:
    chooses = make_placement(placement, Random(0))
    counts = Counter(chooses.order(A, [replica(name) for name in NAMES])[0] for _ in range(4000))
    assert all(abs(counts[name] - 1000) < 150 for name in NAMES)


# -- where the adapter is


def test_a_replica_that_has_it_comes_before_its_home() -> None:
    assert first("residency") == HOME
    assert first("residency", replica(LAST, on_host={A})) == LAST
    assert first("residency", replica(LAST, resident={A}), replica(THIRD, on_host={A})) == LAST
    assert first("residency", replica(LAST, resident={A}), replica(SECOND, resident={A})) == SECOND


def test_a_cold_adapter_is_kept_from_replicas_above_the_mean() -> None:
    """40 requests and this one over four: 1.25 times the mean is just below 13."""
    assert first("residency", replica(HOME, 12), replica(SECOND, 28)) == HOME
    assert first("residency", replica(HOME, 13), replica(SECOND, 27)) == THIRD


def test_a_hot_adapter_gets_a_second_replica_and_leaves_it_later() -> None:
    """The whole of a wave: home alone, both, home alone again. Between the bounds nothing changes hands."""

    def asked(home: int, second: int, *, is_there_too: bool) -> str:
        resident = {A} if is_there_too else set()
        return first("residency", replica(HOME, home, resident={A}), replica(SECOND, second, resident=resident))

    assert asked(19, 0, is_there_too=False) == HOME
    assert asked(20, 0, is_there_too=False) == SECOND
    assert asked(19, 12, is_there_too=True) == SECOND
    assert asked(12, 13, is_there_too=True) == HOME
    assert asked(9, 3, is_there_too=True) == HOME


def test_an_adapter_gets_as_many_replicas_as_it_needs() -> None:
    """Everybody who has it is saturated: one more, in the order of the hash."""
    hot = [replica(HOME, 20, resident={A}), replica(SECOND, 23, resident={A})]
    assert first("residency", *hot) == THIRD
    assert first("residency", *hot, replica(THIRD, 15)) == LAST


def test_a_long_wait_saturates_as_many_requests_do() -> None:
    assert first("residency", replica(HOME, 3, resident={A}, wait_s=1.0)) == SECOND
    assert first("residency", replica(HOME, 3, resident={A}, wait_s=0.9)) == HOME


def test_where_nobody_is_at_ease_no_copy_is_made() -> None:
    crowd = [replica(name, 10) for name in NAMES if name != HOME]
    assert first("residency", replica(HOME, 99, resident={A}), *crowd) == HOME
    assert first("residency", replica(HOME, 100, resident={A}), *crowd) == SECOND


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"easy_load": 1.1}, "easy_load"),
        ({"saturated_load": 0.4}, "saturated_load"),
        ({"easy_wait_s": 2.0}, "easy_wait_s"),
        ({"easy_wait_s": 0.0}, "easy_wait_s"),
        ({"spread": 0.9}, "spread"),
    ],
)
def test_bounds_that_cannot_hold_are_refused(wrong: dict[str, float], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Bounds(**wrong)


def test_bounds_are_ones_own() -> None:
    bounds = Bounds(easy_load=0.8, saturated_load=0.9)
    replicas = [replica(HOME, 19, resident={A}), replica(SECOND)]
    assert ResidencyAware(Random(0), bounds=bounds).order(A, replicas)[0] == SECOND
    assert ResidencyAware(Random(0)).order(A, replicas)[0] == HOME
