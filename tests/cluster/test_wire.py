"""What crosses processes: errors, clocks, grammars and settings are on the other side what they were."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_serve import errors
from peft_serve.cluster.clocks import FarClock
from peft_serve.cluster.plan import Layout, absolute, engine_settings, front_settings
from peft_serve.cluster.routes import Route, key_of
from peft_serve.cluster.specs import SpecReader, SpecWriter
from peft_serve.cluster.wire import heard, tell
from peft_serve.config import Settings
from peft_serve.core import BASE, AdapterId
from peft_serve.errors import AdapterInvalid, Internal, QuotaExceeded, Refusal, ServeError
from peft_serve.grammars.compiler import GrammarCompiler
from peft_serve.grammars.grammar import of_regex
from peft_serve.grammars.matching import GrammarConstraint
from tests.cluster.cluster_fakes import Clock, carried
from tests.grammars.vocabularies import byte_level, spelled

REFUSALS = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, ServeError)]


def made(cls: type[ServeError]) -> ServeError:
    if issubclass(cls, AdapterInvalid):
        return cls([Refusal("q_proj", "is too wide"), Refusal("v_proj", "is not there")], what="adapter 'a'")
    if issubclass(cls, QuotaExceeded):
        return cls("you had enough", quota="tokens", retry_after_s=3.0)
    return cls("the thing: the rule; the way out", param="thing", retry_after_s=2.0)


@pytest.mark.parametrize("cls", REFUSALS)
def test_every_refusal_is_heard_as_it_was_told(cls: type[ServeError]) -> None:
    error = made(cls)
    again = heard(carried(tell(error)))
    assert type(again) is cls
    assert (vars(again), str(again), again.status, again.code) == (vars(error), str(error), error.status, error.code)


def test_what_is_no_refusal_tells_nothing_of_the_inside() -> None:
    told = heard(tell(OSError("/secret/path")))
    assert type(told) is Internal
    assert "secret" not in told.message


def test_a_refusal_of_a_class_that_is_nobodys_is_heard_as_the_one_above_it() -> None:
    class OwnQueueFull(errors.QueueFull):
        pass

    assert type(heard(tell(OwnQueueFull("too many")))) is errors.QueueFull


@given(
    offset=st.floats(-1e6, 1e6),
    ways=st.lists(st.tuples(st.floats(0, 50), st.floats(0.0001, 5)), min_size=1, max_size=20),
)
def test_a_far_time_is_read_no_earlier_and_later_by_the_shortest_way_at_most(
    offset: float, ways: list[tuple[float, float]]
) -> None:
    clock = Clock(1e5)
    far = FarClock(clock, window_s=1e9)
    for pause, way in ways:
        clock.now += pause
        sent = clock.now + offset
        clock.now += way
        far.note(sent)
        here = far.here(sent)
        late = here - (sent - offset)
        assert -1e-6 <= late <= way + 1e-6
    assert far.here(clock.now + offset) - clock.now == pytest.approx(min(way for _, way in ways), abs=1e-6)


def test_a_clock_that_drifts_is_followed() -> None:
    clock = Clock(0.0)
    far = FarClock(clock, window_s=60)
    for _ in range(300):
        clock.now += 1.0
        far.note(clock.now * 1.001)  # the far one is faster
    assert far.here(clock.now * 1.001) == pytest.approx(clock.now, abs=0.2)


def test_the_shortest_way_is_remembered_for_a_window_more() -> None:
    clock = Clock(100.0)
    far = FarClock(clock, window_s=60)
    far.note(clock.now)
    clock.now += 61
    far.note(clock.now - 5)  # the first of a new window took five seconds
    assert far.here(clock.now) == clock.now
    clock.now += 61
    far.note(clock.now - 5)
    assert far.here(clock.now) == clock.now + 5


async def test_a_grammar_is_compiled_from_its_source_and_allows_the_same() -> None:
    spelling = spelled(byte_level())
    compiled = await GrammarCompiler().compiled("base", lambda: spelling, of_regex("(yes|no)!"))
    constraint = GrammarConstraint(compiled, frozenset({1}))
    puts: list[Any] = []

    class Reference:
        def __init__(self) -> None:
            self.num_read = 0

        def __await__(self) -> Any:
            self.num_read += 1
            return spelling.tokens
            yield

    reference = Reference()
    writer, reader = SpecWriter(lambda tokens: puts.append(tokens) or reference), SpecReader()
    assert writer.spec_of(None) is None
    spec = writer.spec_of(constraint)
    assert writer.spec_of(constraint) == spec
    assert len(puts) == 1, "a vocabulary is put once"
    assert spec is not None
    for _ in range(2):
        mine, its = constraint.start(), (await reader.constraint_of(spec)).start()
        while True:
            mask = mine.mask()
            assert its.mask() == mask
            if mine.is_over:
                break
            drawn = next(id_ for id_ in range(2, len(mask) * 8) if mask[id_ // 8] >> (id_ % 8) & 1)
            mine.accept(drawn)
            its.accept(drawn)
    assert reference.num_read == 1


def test_settings_reach_another_process_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    given = Settings(
        model="base",
        adapters=[Path("mine")],
        store=Path("uploads"),
        api_key="s3cret",
        max_rows=8,
        max_queue=5,
        dtype="float32",
    )
    layout = Layout(replicas=3, max_ongoing=4)
    found = absolute(given)
    os.chdir("/")
    front = Settings(**carried(front_settings(found, layout)))
    engine = Settings(**carried(engine_settings(found, layout)))
    assert front.model == engine.model == str(tmp_path / "base")
    assert front.adapters == engine.adapters == [tmp_path / "mine"]
    assert front.store == engine.store == str(tmp_path / "uploads")
    assert front.api_key is not None
    assert front.api_key.get_secret_value() == "s3cret"
    assert engine.api_key is None, "a replica has no door"
    assert front.max_queue == 3 * 4 + 5
    assert engine.max_queue >= 4, "what is admitted by the front is refused by no replica"
    assert front.dtype == engine.dtype == "float32"


@pytest.mark.parametrize("wrong", [{"min_replicas": 1}, {"min_replicas": 3, "max_replicas": 2}, {"replicas": 0}])
def test_an_impossible_layout_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="replicas"):
        Layout(**wrong)  # type: ignore[arg-type]


@given(st.text(st.characters(exclude_characters="|"), max_size=9), st.text("abc", max_size=3))
def test_a_route_is_read_as_it_was_written(adapter: str, name: str) -> None:
    route = Route(adapter=AdapterId(adapter or BASE), only=name, avoided=name[::-1])
    assert Route.parse(route.text()) == route
    assert Route.parse("").adapter == BASE


def test_adapters_are_routed_by_short_names() -> None:
    many = {key_of(AdapterId(f"sha256:{i:064x}")) for i in range(1000)}
    assert len(many) == 1000
    assert all(len(each) == 16 for each in many)
    assert key_of(BASE) == BASE
