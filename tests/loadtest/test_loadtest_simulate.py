"""simulate: queues and caches against what theory says of them, each rule of a replica by hand, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.cli import main
from loadtest.figures import plots_of
from loadtest.lengths import Lengths, parse_lengths
from loadtest.popularity import zipf_weights
from loadtest.report import load_report
from loadtest.simulation.cluster import REFUSED, Cluster, ClusterSpec, Played
from loadtest.simulation.figures import Window, figures
from loadtest.simulation.replica import DEVICE, DISK, HOST, NEVER_SEEN, Shape
from loadtest.simulation.tier import Tier
from loadtest.simulation.times import LOGGED, Times, read_times, scraped
from loadtest.simulation.traffic import BASE_NUMBER, Traffic, TrafficSpec
from peft_serve.adapters.eviction import LeastRecentlyUsed
from peft_serve.core import AdapterId
from peft_serve.placement.choosing import make_placement
from peft_serve.placement.placements import PLACEMENTS, PlacementName
from peft_serve.placement.replicas import ReplicaState
from peft_serve.scheduling.step_time import StepLoad, StepTimeModel

CPU = parse_lengths("cpu")
ONE = Lengths(prompt_min=1, prompt_max=1, answer_min=1, answer_max=1)
PLAIN = Times(step=1.0, token=0, rank=0, position=0, from_host=0.25, from_disk=0.5, never_seen=3.0, slowdown=1.0)


def requests(*those: tuple[float, int, int, int]) -> Traffic:
    """Time, adapter, tokens of the prompt and of the answer of each."""
    times_s, adapters, prompts, answers = zip(*those, strict=True)
    return Traffic(
        times_s=np.array(times_s, dtype=np.float64),
        adapters=np.array(adapters),
        prompts=np.array(prompts),
        answers=np.array(answers),
    )


def cluster(**changes: object) -> ClusterSpec:
    """One replica, adapters of 10 bytes and rank 8, two of them on its device and three in its host's memory."""
    spec = ClusterSpec(
        num_replicas=1, ranks=[8] * 9, sizes=[10] * 9, device_bytes=20, host_bytes=30, report_s=0, times=PLAIN
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def play(spec: ClusterSpec, traffic: Traffic, name: PlacementName = "residency") -> Played:
    return Cluster(spec, make_placement(name, Random(0), most=1), traffic).play(lambda: None)


def waits(played: Played, traffic: Traffic) -> list[float]:
    """From each arrival to the first token."""
    return [float(wait) for wait in played.first_s - traffic.times_s]


# -- against theory


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_one_server_waits_as_queueing_theory_says(rho: float) -> None:
    """M/D/1: the mean wait in the queue is rho D / (2 (1 - rho)) (Pollaczek and Khinchine), here within 8 %."""
    spec = TrafficSpec(rate_per_s=rho, duration_s=20_000, num_adapters=0, popularity="zipf:1", lengths=ONE, seed=1)
    traffic = spec.draw()
    played = play(cluster(shape=Shape(max_rows=1, max_queue=10_000)), traffic)
    mean_wait = float(np.mean(played.first_s - traffic.times_s)) - PLAIN.step
    assert mean_wait == pytest.approx(rho / (2 * (1 - rho)), rel=0.08)


def che(weights: Sequence[float], room: int) -> float:
    """The hit rate of LRU by Che's approximation (IEEE JSAC 20(7), 2002): each of probability p is inside with
    1 - exp(-p t), t such that `room` are inside."""
    shares = np.asarray(weights) / np.sum(weights)
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        is_less = np.sum(-np.expm1(-shares * middle)) < room
        low, high = (middle, high) if is_less else (low, middle)
    return float(np.sum(shares * -np.expm1(-shares * low)))


@pytest.mark.parametrize(("exponent", "room"), [(1.0, 20), (0.7, 60)])
def test_tiers_hit_as_often_as_lru_does(exponent: float, room: int) -> None:
    """On a device of so many places, and on the host of three times as many for those that missed it."""
    count, alone = 400, Shape(max_rows=1, max_queue=10_000)
    traffic = TrafficSpec(
        rate_per_s=1, duration_s=10_000, num_adapters=count, popularity=f"zipf:{exponent}", lengths=ONE, seed=2
    ).draw()
    quick = replace(PLAIN, step=1e-3, from_host=0, from_disk=0)
    spec = cluster(ranks=[8] * count, sizes=[10] * count, device_bytes=10 * room, shape=alone, times=quick)
    played = play(spec, traffic)
    hits = float(np.mean(played.found_in[1_000:] == DEVICE))
    assert hits == pytest.approx(che(zipf_weights(count, exponent).tolist(), room), abs=0.012)


def test_a_step_takes_what_the_servers_own_model_learns_from_it() -> None:
    """Its fit, fed with steps of these times, comes back to the coefficients."""
    fitted, rng = StepTimeModel(), Random(0)
    for _ in range(3000):
        load = StepLoad(num_tokens=rng.randint(1, 64), sum_rank=rng.randint(0, 512), num_positions=rng.randint(0, 9000))
        fitted.observe(load, Times().predict(load.num_tokens, load.sum_rank, load.num_positions))
    for name, value in fitted.coefficients.items():
        assert value == pytest.approx(getattr(Times(), name), rel=1e-3)


# -- the rules, by hand


def test_rows_share_steps_and_each_step_gives_each_a_token() -> None:
    traffic = requests((0, BASE_NUMBER, 5, 3), (0.5, BASE_NUMBER, 5, 1), (2.5, BASE_NUMBER, 5, 2))
    played = play(cluster(), traffic)
    assert played.first_s.tolist() == [1, 2, 4]
    assert played.end_s.tolist() == [3, 2, 5]
    assert played.busy_s.tolist() == [5]


def test_a_step_takes_time_for_tokens_ranks_and_positions() -> None:
    times = replace(PLAIN, token=0.1, rank=0.01, position=0.001, from_disk=0.0)
    traffic = requests((0, 0, 4, 2), (0, 0, 6, 1), (0, 1, 5, 1), (50, BASE_NUMBER, 3, 1))
    played = play(cluster(times=times), traffic)
    # The first step has the first request alone, the second its one token and both other prompts.
    assert played.first_s[0] == pytest.approx(1 + 0.4 + 0.08 + 0.004)
    assert played.end_s[0] - played.first_s[0] == pytest.approx(1 + 1.2 + 0.16 + 0.015)
    assert played.first_s[3] == pytest.approx(50 + 1 + 0.3 + 0.003)


def test_long_prompts_are_read_in_parts() -> None:
    traffic = requests((0, BASE_NUMBER, 25, 1), (0, BASE_NUMBER, 5, 1))
    played = play(cluster(shape=Shape(max_step_tokens=10)), traffic)
    assert played.first_s.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("where", "load_s", "spec"),
    [
        (DISK, 0.5, cluster()),
        (NEVER_SEEN, 3.0, cluster(knows_all=False)),
    ],
)
def test_a_load_is_waited_for_and_shared(where: int, load_s: float, spec: ClusterSpec) -> None:
    traffic = requests((0, 0, 1, 1), (0.2, 0, 1, 1), (20, 0, 1, 1))
    played = play(spec, traffic)
    assert waits(played, traffic) == pytest.approx([load_s + 1, load_s + 0.8, 1])
    assert played.found_in.tolist() == [where, where, DEVICE]


def test_tiers_are_found_in_their_order() -> None:
    """Three adapters through a device of two and a host of three places, the first one again; then two more."""
    names = [0, 1, 2, 0, 3, 4, 1]
    traffic = requests(*((10.0 * place, name, 1, 1) for place, name in enumerate(names)))
    found = play(cluster(knows_all=False), traffic).found_in.tolist()
    assert found == [NEVER_SEEN, NEVER_SEEN, NEVER_SEEN, HOST, NEVER_SEEN, NEVER_SEEN, DISK]


def test_loads_queue_for_a_loader_and_the_base_overtakes_them() -> None:
    traffic = requests((0, 0, 1, 1), (0, 1, 1, 1), (0.1, BASE_NUMBER, 1, 1))
    times = replace(PLAIN, from_disk=0.8)
    one, two = (play(cluster(times=times, shape=Shape(num_loaders=count)), traffic) for count in (1, 2))
    assert one.first_s.tolist() == [2.1, 3.1, 1.1]
    assert two.first_s.tolist() == [2.1, 2.1, 1.1]


def test_a_compile_slows_steps_down() -> None:
    spec = cluster(knows_all=False, times=replace(PLAIN, slowdown=2.0))
    played = play(spec, requests((0, 0, 1, 1), (0, BASE_NUMBER, 1, 3)))
    assert played.end_s.tolist() == [5, 5]


def test_adapters_in_use_stay_on_the_device() -> None:
    """Two places, both held for a while: a third waits for one, and one of an adapter that is there overtakes it."""
    times = replace(PLAIN, from_disk=0)
    traffic = requests((0, 0, 1, 4), (0, 1, 1, 6), (1.5, 2, 1, 1), (1.6, 1, 1, 1))
    played = play(cluster(times=times), traffic)
    assert played.first_s[2:].tolist() == [5, 3]


def test_who_finds_everybody_full_is_refused() -> None:
    traffic = requests(*((0.1 * number, BASE_NUMBER, 1, 1) for number in range(5)))
    played = play(cluster(num_replicas=2, shape=Shape(max_rows=1, max_queue=1)), traffic)
    assert [one == REFUSED for one in played.replicas] == [False] * 4 + [True]
    assert np.isnan(played.first_s).tolist() == [False] * 4 + [True]


class Watched:
    """Asks the first replica, and keeps what it was told of it: requests and adapters on the device."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def order(self, adapter: AdapterId, replicas: Sequence[ReplicaState]) -> tuple[str, ...]:
        self.told.append((replicas[0].num_ongoing, len(replicas[0].resident)))
        return (replicas[0].name,)


@pytest.mark.parametrize(("report_s", "told"), [(0.0, [0, 1, 2, 2]), (5.0, [0, 0, 0, 2])])
def test_the_router_counts_at_once_and_hears_of_residency_later(report_s: float, told: list[int]) -> None:
    traffic, watched = requests((0, 0, 1, 1), (1, 1, 1, 1), (3, 0, 1, 1), (6, 0, 1, 1)), Watched()
    Cluster(cluster(report_s=report_s), watched, traffic).play(lambda: None)
    assert watched.told == [*zip([0, 1, 0, 0], told, strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(PLACEMENTS),
    num_replicas=st.integers(1, 4),
    rate=st.floats(1, 60),
    rows=st.integers(1, 4),
    tokens=st.integers(4, 80),
    told_s=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 5),
)
def test_whoever_is_taken_is_served_in_order_of_time(
    name: PlacementName, num_replicas: int, rate: float, rows: int, tokens: int, told_s: float, seed: int
) -> None:
    """Every request is refused or ends; its first token is a step after it came, its last one that many steps later."""
    traffic = TrafficSpec(
        rate_per_s=rate, duration_s=4, num_adapters=9, popularity="zipf:1", lengths=CPU, seed=seed
    ).draw()
    spec = cluster(
        num_replicas=num_replicas,
        shape=Shape(max_rows=rows, max_queue=5, max_step_tokens=tokens),
        times=Times(),
        knows_all=False,
        report_s=told_s,
    )
    played = play(spec, traffic, name)
    taken = played.replicas != REFUSED
    assert np.array_equal(np.isnan(played.end_s), ~taken)
    assert np.array_equal(np.isnan(played.first_s), ~taken)
    least = Times().step
    assert (played.first_s - traffic.times_s)[taken].min(initial=least) >= least
    lasting = (played.end_s - played.first_s)[taken]
    assert np.all(lasting >= least * (traffic.answers[taken] - 1) - 1e-9)
    again = play(spec, traffic, name)
    assert np.array_equal(again.end_s, played.end_s, equal_nan=True)


# -- its parts


def test_a_tier_refuses_what_does_not_fit_beside_those_in_use() -> None:
    tier = Tier(25, LeastRecentlyUsed(), [10, 10, 20, 30], [AdapterId(name) for name in "abcd"])
    assert [tier.take(0), tier.take(1)] == [True, True]
    tier.hold(0)
    assert not tier.take(2)
    assert tier.names() == {"a", "b"}
    tier.release(0)
    assert tier.take(2)
    assert tier.names() == {"c"}
    assert not tier.take(3)


def test_figures_count_those_in_the_window() -> None:
    traffic = requests((0, 0, 1, 100), (1, 0, 1, 10), (2, 0, 1, 20), (2, 1, 1, 40), (3, BASE_NUMBER, 1, 80))
    played = Played(
        first_s=np.array([0.1, 1.5, 2.1, np.nan, 3.1]),
        end_s=np.array([9, 9, 9, np.nan, 9]),
        found_in=np.array([DISK, DISK, DEVICE, 0, DEVICE]),
        replicas=np.array([0, 0, 1, REFUSED, 1]),
        busy_s=np.zeros(2),
    )
    found = figures(traffic, played, Window(start_s=1, end_s=5, within_s=0.4))
    assert found.found == (0.5, 0, 0.5, 0)
    assert found.in_time == 0.5
    assert found.goodput == pytest.approx(100 / 4 / 2)
    assert (found.most_over_mean, found.num_hot, found.refused) == (pytest.approx(4 / 3), 2, 0.25)
    assert found.ttft_p50_s == pytest.approx(0.1)
    with pytest.raises(ValueError, match="longer --duration"):
        figures(traffic, played, Window(start_s=6, end_s=7, within_s=1))


def test_times_come_from_files_and_servers(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"step": 0.5}))
    found = read_times(path)
    assert found.times == replace(LOGGED.times, step=0.5)
    assert "as logged: token" in found.source
    steps = {
        f'peft_serve_step_time_model_seconds{{per="{name}"}}': value
        for name, value in (("step", 0.25), ("token", 0.5), ("rank", 0.0), ("position", 0.125))
    }
    loads = {
        f'peft_serve_adapter_load_seconds_{part}{{tier="host"}}': value for part, value in (("sum", 3.0), ("count", 4))
    }
    told = scraped({**steps, **loads}, "http://x")
    assert told.times == Times(step=0.25, token=0.5, rank=0, position=0.125, from_disk=0.75)
    with pytest.raises(ValueError, match="has run no step"):
        scraped(loads, "http://x")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nothing", "no JSON"),
        ("[1]", "no object of numbers"),
        ('{"step": true}', "no object of numbers"),
        ('{"stap": 1}', "'stap'; there are step"),
        ('{"step": -1}', "step is -1"),
        ('{"slowdown": 0.5}', "slowdown is 0.5"),
        ('{"step": 0, "token": 0}', "takes some time"),
    ],
)
def test_times_that_cannot_be_are_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_times(path)


# -- the command


def test_the_command_files_what_it_finds(tmp_path: Path) -> None:
    options = (
        "--quick --replicas 2 --adapters 9 --popularity zipf:1 --disks full --placement residency --placement random"
    )
    tables = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert main(["simulate", *options.split(), "--out", str(folder)]) == 0
        (place,) = folder.glob("*-simulate")
        assert (place / "plot.png").stat().st_size > 0
        tables.append(load_report(place))
    assert tables[0].rows == tables[1].rows
    assert [row[:2] for row in tables[0].rows] == [("2, zipf:1, full", "residency"), ("2, zipf:1, full", "random")]
    assert "loadtest/LOG.md" in tables[0].notes[0]
    in_time, latest, hits = plots_of(tables[0])
    by_name = dict(zip(tables[0].columns, tables[0].rows[1], strict=True))
    assert latest.series["random"] == ((0, by_name["TTFT p99 ms"]),)
    assert hits.series["random"] == ((0, by_name["device"]),)
    assert in_time.series["random"][0][1] == pytest.approx(by_name["in time"], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [("--bounds 1", "two numbers"), ("--bounds 1,2", "not above the second"), ("--ranks 8,0", "whole numbers from 1")],
)
def test_options_that_cannot_be_are_refused(options: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", *options.split()])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--model a.json --url http://localhost:1", "leave one of them out"),
        ("--model none.json", "none.json"),
        ("--quick --replicas 1 --rho 0.001 --popularity zipf:1 --disks full --placement random", "no request"),
    ],
)
def test_what_cannot_be_simulated_is_told(
    options: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *options.split(), "--out", str(tmp_path)]) == 1
    assert told in capsys.readouterr().out
