"""A pass that fails is run again in parts: the fault stays with its rows, and the others lose nothing by it."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peft_serve.adapters.primitives import Adapter, Affine, LowRank
from peft_serve.core import AdapterId, Draw, Install, Reading, RequestId, Row, RowResult, SamplingParams, Step
from peft_serve.errors import Internal, Unavailable
from peft_serve.model import apart as apart_module
from peft_serve.model.apart import Apart
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner
from tests.model.driver import Driver, Job, random_jobs
from tests.model.tiny_models import VOCAB, tiny

SITE = "model.layers.1.mlp.down_proj"
GOOD, BAD, OTHER = (AdapterId(f"sha256:{name}") for name in ("good", "bad", "other"))


def row(name: str, slot: int = 0) -> Row:
    draw = Draw(params=SamplingParams(), seed=0, index=0)
    return Row(request=RequestId(name), slot=slot, tokens=(5,), start=0, blocks=(1,), draw=draw)


class Passes:
    """Answers for rows, unless one of the named is among them; remembers what it was asked."""

    def __init__(self, *bad: str, error: Callable[[], Exception] = lambda: KeyError("x")) -> None:
        self.bad = set(bad)
        self.error = error
        self.asked: list[list[str]] = []

    def __call__(self, rows: Sequence[Row]) -> list[RowResult]:
        is_probe = rows[0].tokens == (0,)
        self.asked.append(["probe"] if is_probe else [str(r.request) for r in rows])
        if not self.bad.isdisjoint(self.asked[-1]):
            raise self.error()
        return [RowResult(request=r.request, token=7) for r in rows]


def failed(results: Sequence[RowResult]) -> list[str]:
    return [str(result.request) for result in results if result.failure is not None]


def test_a_pass_that_goes_well_is_run_once() -> None:
    passes = Passes()
    assert failed(Apart(passes).run([row("a"), row("b", 1)])) == []
    assert passes.asked == [["a", "b"]]


def test_the_rows_of_each_adapter_are_run_again_by_themselves() -> None:
    passes = Passes("c")
    results = Apart(passes).run([row("a"), row("b", 1), row("c", 2), row("d", 3), row("e", 3)])
    assert [result.request for result in results] == ["a", "b", "c", "d", "e"]
    assert failed(results) == ["c"]
    assert [result.token for result in results] == [7, 7, None, 7, 7]
    assert passes.asked == [["a", "b", "c", "d", "e"], ["probe"], ["a"], ["b"], ["c"], ["d", "e"]]
    failure = results[2].failure
    assert isinstance(failure, Internal)
    assert "KeyError" in failure.message


def test_the_rows_of_one_adapter_are_halved() -> None:
    names = [f"r{i}" for i in range(8)]
    results = Apart(Passes("r2", "r7")).run([row(name, 4) for name in names])
    assert failed(results) == ["r2", "r7"]
    assert [str(result.request) for result in results] == names


def test_where_the_base_does_not_run_no_row_is_to_blame() -> None:
    passes = Passes("probe", "a", error=lambda: RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        Apart(passes).run([row("a"), row("b", 1)])
    assert len(passes.asked) == 2, "nobody is asked again and again"


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_pass_that_is_too_large_is_run_in_smaller_parts(error: type[Exception]) -> None:
    freed: list[str] = []

    def run(rows: Sequence[Row]) -> list[RowResult]:
        if len(rows) > 2:
            raise error
        return [RowResult(request=r.request, token=1) for r in rows]

    apart = Apart(run, free=lambda: freed.append("freed"))
    assert failed(apart.run([row(f"r{i}") for i in range(8)])) == []
    assert apart.was_short_of_memory
    assert freed
    assert failed(apart.run([row("a")])) == []
    assert not apart.was_short_of_memory, "of the last pass alone"


def test_a_row_that_is_too_large_by_itself_may_come_again() -> None:
    (result,) = Apart(Passes("a", error=MemoryError)).run([row("a")])
    assert isinstance(result.failure, Unavailable)
    assert result.failure.retry_after_s


def test_what_a_failed_pass_computed_is_let_go_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart_module._log, "disabled", True)  # pytest keeps what is logged, and its frames
    held: list[weakref.ref[Tensor]] = []

    def run(rows: Sequence[Row]) -> list[RowResult]:
        gc.collect()
        assert all(ref() is None for ref in held)
        large = torch.zeros(8)
        held.append(weakref.ref(large))
        if rows[0].tokens != (0,):
            raise MemoryError
        return [RowResult(request=r.request) for r in rows]

    assert len(failed(Apart(run).run([row("a"), row("b", 1)]))) == 2


def lora(adapter: AdapterId, seed: int, value: float = 1.0) -> Adapter:
    made = torch.Generator().manual_seed(seed)
    delta = LowRank(torch.randn(3, 48, generator=made), torch.randn(32, 3, generator=made) * value)
    return Adapter(id=adapter, method="LORA", sites={SITE: Affine(delta=delta)})


def adapters() -> dict[AdapterId, Adapter]:
    return {GOOD: lora(GOOD, 1), BAD: lora(BAD, 2), OTHER: lora(OTHER, 3)}


class Poisoned:
    """Stands before a site's own forward, and does `harm` to the tokens of one slot."""

    def __init__(self, base: ResidentBase, slot: int, harm: Callable[[Tensor], Tensor]) -> None:
        self.module = base.model.get_submodule(SITE)
        self.plain = self.module.forward
        self.lane = base.adapted._sites[SITE].lane
        self.slot, self.harm, self.num_harmed = slot, harm, 0
        self.module.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.plain(x)
        route = self.lane.route
        mine = [] if route is None else [run for run in route.runs if run.slot == self.slot]
        for run in mine:
            self.num_harmed += 1
            y.view(-1, y.shape[-1])[run.first : run.last] = self.harm(y.view(-1, y.shape[-1])[run.first : run.last])
        return y


def boom(y: Tensor) -> Tensor:
    raise ArithmeticError("the adapter's term cannot be computed")


def not_a_number(y: Tensor) -> Tensor:
    return torch.full_like(y, float("nan"))


class Surviving(Driver):
    """Goes on with the jobs that do not fail."""

    def _commit(self, job: Job, row: Row, got: RowResult) -> None:
        if got.failure is not None:
            assert isinstance(got.failure, Internal)
            job.num_new = len(job.output)
            return
        super()._commit(job, row, got)


@pytest.mark.parametrize("harm", [boom, not_a_number])
def test_neighbours_of_a_poisoned_adapter_say_what_they_would_have_said(harm: Callable[[Tensor], Tensor]) -> None:
    def jobs() -> list[Job]:
        whose = lambda i: (GOOD, BAD, OTHER, AdapterId("base"))[i % 4]  # noqa: E731
        return random_jobs(random.Random(5), count=12, vocab=VOCAB, adapter=whose)

    expected = jobs()
    sound = Driver(ResidentBase(tiny("llama"), name="llama"), adapters(), seed=3)
    sound.install(GOOD, BAD, OTHER)
    sound.finish(expected)
    base = ResidentBase(tiny("llama"), name="llama")
    before = base.fingerprint()
    driver = Surviving(base, adapters(), seed=3)
    driver.install(GOOD, BAD, OTHER)
    poison = Poisoned(base, 2, harm)
    given = jobs()
    driver.finish(given)
    assert poison.num_harmed
    for job, want in zip(given, expected, strict=True):
        if job.adapter == BAD:
            assert not job.output
        else:
            assert job.output == want.output
            assert job.logprobs == pytest.approx(want.logprobs, abs=1e-5)
    assert base.fingerprint() == before


def test_values_that_overflow_stay_with_their_own_rows() -> None:
    """Finite weights that come to infinity: the neighbours share the GEMM and none of it."""
    base = ResidentBase(tiny("llama"), name="llama")
    huge = Adapter(
        id=BAD,
        method="LORA",
        sites={SITE: Affine(delta=LowRank(torch.full((3, 48), 3e38), torch.full((32, 3), 3e38)))},
    )
    driver = Surviving(base, {**adapters(), BAD: huge}, seed=3)
    driver.install(GOOD, BAD, OTHER)
    plain = Driver(ResidentBase(tiny("llama"), name="llama"), adapters(), seed=3)
    plain.install(GOOD, BAD, OTHER)

    def jobs() -> list[Job]:
        return [Job(prompt=(5, 6, 7, 8), num_new=4, adapter=a) for a in (GOOD, BAD, OTHER, GOOD, BAD)]

    given, expected = jobs(), jobs()
    driver.finish(given)
    plain.finish(expected)
    assert [job.output for job in given] == [[] if job.adapter == BAD else job.output for job in expected]


def test_stacks_that_could_not_be_written_are_written_anew() -> None:
    """Or the next step would read an adapter's rows where another's, or none, stand."""
    base = ResidentBase(tiny("llama"), name="llama")
    runner = StepRunner(base, num_blocks=40, num_cross_blocks=0, block_size=4, adapters=adapters().__getitem__)
    delta = base.adapted._sites[SITE].dense.delta
    plain, left = delta.write, [1]

    def write(*given: object) -> None:
        if left:
            left.pop()
            raise MemoryError
        plain(*given)

    delta.write = write
    rows = tuple(
        Row(request=RequestId(str(i)), slot=i, tokens=(5, 6, 7), start=0, blocks=(i + 1,), draw=row("x").draw)
        for i in range(4)
    )
    installs = tuple(Install(slot=i + 1, adapter=a) for i, a in enumerate((GOOD, BAD, OTHER)))
    result = runner.run(Step(id=1, rows=rows, installs=installs))
    assert result.was_short_of_memory
    assert failed(result.rows) == []
    sound = StepRunner(
        ResidentBase(tiny("llama"), name="llama"),
        num_blocks=40,
        num_cross_blocks=0,
        block_size=4,
        adapters=adapters().__getitem__,
    )
    assert [r.token for r in result.rows] == [r.token for r in sound.run(Step(id=1, rows=rows, installs=installs)).rows]
    base.adapted.check()


def test_an_install_that_finds_no_memory_fails_with_its_rows() -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    runner = StepRunner(base, num_blocks=40, num_cross_blocks=0, block_size=4, adapters=adapters().__getitem__)
    term = base.adapted._sites[SITE].dense.delta
    plain = term.put

    def put(slot: int, edit: object) -> None:
        if slot == 2:
            raise MemoryError
        plain(slot, edit)

    term.put = put
    installs = tuple(Install(slot=i + 1, adapter=a) for i, a in enumerate((GOOD, BAD)))
    result = runner.run(Step(id=1, rows=(row("a", 1), row("b", 2)), installs=installs))
    assert result.failed_installs == ((BAD, "memory ran out; try again later"),)
    assert result.was_short_of_memory
    assert [r.token is None for r in result.rows] == [False, True]


@pytest.mark.parametrize(
    "row_of",
    [
        lambda r: replace(r, draw=replace(r.draw, params=SamplingParams(do_sample=True, top_p=0.9, logprobs=True))),
        lambda r: replace(r, draw=None, wanted=((3,), (4,))),
        lambda r: replace(r, draw=replace(r.draw, num_candidates=4)),
        lambda r: replace(r, draw=replace(r.draw, suppress=(0,), params=SamplingParams(num_top_logprobs=3))),
    ],
    ids=["sampled", "scored", "searched", "edited"],
)
def test_no_way_of_asking_takes_a_nan_for_an_answer(row_of: Callable[[Row], Row]) -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    runner = StepRunner(base, num_blocks=40, num_cross_blocks=0, block_size=4, adapters=adapters().__getitem__)
    plain = Row(request=RequestId("0"), slot=0, tokens=(5, 6, 7), start=0, blocks=(1,), draw=row("x").draw)
    rows = tuple(row_of(replace(plain, request=RequestId(str(i)), slot=i, blocks=(i + 1,))) for i in range(3))
    installs = (Install(slot=1, adapter=GOOD), Install(slot=2, adapter=BAD))
    assert failed(runner.run(Step(id=1, rows=rows, installs=installs)).rows) == []
    Poisoned(base, 2, not_a_number)
    assert failed(runner.run(Step(id=2, rows=rows)).rows) == ["2"]


def test_a_reading_that_is_no_number_fails_alone() -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    runner = StepRunner(base, num_blocks=40, num_cross_blocks=0, block_size=4, adapters=adapters().__getitem__)
    plain = Row(request=RequestId("0"), slot=0, tokens=(5, 6), start=0, blocks=(1,), reading=Reading.LAST)
    rows = (plain, replace(plain, request=RequestId("2"), slot=2, blocks=(2,)))
    Poisoned(base, 2, not_a_number)
    result = runner.run(Step(id=1, rows=rows, installs=(Install(slot=2, adapter=BAD),)))
    assert failed(result.rows) == ["2"]
    assert len(result.rows[0].readings[0]) == 32
