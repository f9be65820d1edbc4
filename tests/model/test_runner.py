"""A step's order of work, and what fails alone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from peft_serve.adapters.primitives import Adapter, Affine, LowRank, SoftPrompt
from peft_serve.core import BASE, AdapterId, Draw, Install, RequestId, Row, SamplingParams, Step
from peft_serve.errors import AdapterUnavailable
from peft_serve.model.base import ResidentBase
from peft_serve.model.routing import acting_runs, divided
from peft_serve.model.runner import StepRunner
from tests.model.driver import Driver, Job
from tests.model.tiny_models import tiny

LORA, LOST, UNFIT = AdapterId("sha256:lora"), AdapterId("sha256:lost"), AdapterId("sha256:unfit")
SITE = "model.layers.0.self_attn.q_proj"
DRAW = Draw(params=SamplingParams(logprobs=True, num_top_logprobs=2), seed=0, index=0)


def lora(path: str = SITE, rank: int = 3) -> Adapter:
    torch.manual_seed(1)
    delta = LowRank(torch.randn(rank, 32), torch.randn(32, rank))
    return Adapter(id=LORA, method="LORA", sites={path: Affine(delta=delta)})


def lookup(adapter: AdapterId) -> Adapter:
    if adapter == LOST:
        raise AdapterUnavailable("adapter 'lost': its files are gone; upload it again")
    return lora() if adapter == LORA else lora(path="no.such.site")


@pytest.fixture
def runner() -> StepRunner:
    return StepRunner(
        ResidentBase(tiny("llama"), name="llama"), num_blocks=40, num_cross_blocks=0, block_size=4, adapters=lookup
    )


def row(name: str, slot: int, tokens: tuple[int, ...], block: int, **more: object) -> Row:
    return Row(
        request=RequestId(name),
        slot=slot,
        tokens=tokens,
        start=0,
        blocks=tuple(range(block, block + 4)),
        **{"draw": DRAW, **more},  # type: ignore[arg-type]
    )


def own(model: PreTrainedModel, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)


def merged(adapter: Adapter) -> PreTrainedModel:
    """The model with the adapter added into its weight."""
    model = tiny("llama")
    edit = adapter.sites[SITE]
    assert isinstance(edit, Affine)
    assert edit.delta is not None
    model.get_submodule(SITE).weight += edit.delta.b_OR @ edit.delta.a_RI
    return model


def test_a_row_is_answered_by_its_own_adapter(runner: StepRunner) -> None:
    tokens = (5, 17, 33, 8)
    step = Step(
        id=7,
        installs=(Install(slot=2, adapter=LORA),),
        rows=(row("base", 0, tokens, 1), row("lora", 2, tokens, 5)),
    )
    result = runner.run(step)
    for got, model in zip(result.rows, (tiny("llama"), merged(lora())), strict=True):
        expected = own(model, tokens)[-1]
        assert got.token == int(expected.argmax())
        assert got.logprob == pytest.approx(float(expected.max()), abs=1e-4)
        assert [i for i, _ in got.top] == expected.topk(2).indices.tolist()
    assert result.step_id == 7
    assert result.rows[0].logprob != result.rows[1].logprob


@pytest.mark.parametrize(("bad", "word"), [(LOST, "lost"), (UNFIT, "no.such.site")])
def test_an_adapter_that_cannot_be_installed_fails_alone(runner: StepRunner, bad: AdapterId, word: str) -> None:
    tokens = (5, 17, 33, 8)
    result = runner.run(
        Step(
            id=1,
            installs=(Install(slot=1, adapter=bad), Install(slot=2, adapter=LORA)),
            rows=(row("a", 0, tokens, 1), row("b", 1, tokens, 5), row("c", 2, tokens, 9)),
        )
    )
    assert [adapter for adapter, _ in result.failed_installs] == [bad]
    assert word in result.failed_installs[0][1]
    assert [got.token is None for got in result.rows] == [False, True, False]
    assert result.rows[2].token == int(own(merged(lora()), tokens)[-1].argmax())
    assert [got.request for got in result.rows] == ["a", "b", "c"]
    after = runner.run(Step(id=2, rows=(), removes=(1, 2), installs=(Install(slot=1, adapter=LORA),)))
    assert after.failed_installs == ()


def test_a_slot_can_be_emptied_and_taken_in_one_step(runner: StepRunner) -> None:
    tokens = (5, 17, 33, 8)
    runner.run(Step(id=1, rows=(), installs=(Install(slot=1, adapter=LORA),)))
    swapped = runner.run(
        Step(id=2, rows=(row("x", 1, tokens, 1),), removes=(1,), installs=(Install(slot=1, adapter=LORA),))
    )
    assert swapped.rows[0].token == int(own(merged(lora()), tokens)[-1].argmax())


def test_scores_are_the_log_probabilities_of_the_ids_that_were_asked_for(runner: StepRunner) -> None:
    tokens = (5, 17, 33, 8, 60)
    wanted = ((8,), (60, 3), (1, 2, 3))
    result = runner.run(
        Step(
            id=1,
            rows=(
                row("chunk", 0, (9, 9, 9), 1, draw=None),
                row("scored", 0, tokens, 5, wanted=wanted, draw=None, branch=4),
                row("both", 0, tokens, 9, wanted=((7,),)),
                row("drawn", 0, tokens, 13),
            ),
        )
    )
    expected = own(tiny("llama"), tokens)
    chunk, scored, both, drawn = result.rows
    assert (chunk.token, chunk.scores) == (None, ())
    assert scored.token is None
    assert scored.branch == 4
    for got, ids, log_V in zip(scored.scores, wanted, expected[-3:], strict=True):
        assert got == pytest.approx(log_V[list(ids)].tolist(), abs=1e-4)
    assert both.scores[0] == pytest.approx([float(expected[-1, 7])], abs=1e-4)
    assert both.token == drawn.token == int(expected[-1].argmax())
    assert drawn.scores == ()


def test_a_copied_block_continues_as_its_source_would(runner: StepRunner) -> None:
    tokens = (5, 17, 33, 8, 60, 61)
    first = row("a", 0, tokens, 1)
    runner.run(Step(id=1, rows=(first,)))
    fork = Row(request=RequestId("b"), slot=0, tokens=(70,), start=6, blocks=(1, 20), draw=DRAW)
    stay = Row(request=RequestId("a"), slot=0, tokens=(71,), start=6, blocks=(1, 2), draw=DRAW)
    result = runner.run(Step(id=2, rows=(fork, stay), copies=((2, 20),)))
    model = tiny("llama")
    assert result.rows[0].token == int(own(model, (*tokens, 70))[-1].argmax())
    assert result.rows[1].token == int(own(model, (*tokens, 71))[-1].argmax())


def test_steps_never_change_the_base() -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    prompt = Adapter(id=UNFIT, method="PROMPT_TUNING", prompt=SoftPrompt(torch.randn(3, 32)))
    before = base.fingerprint()
    driver = Driver(base, {LORA: lora(), UNFIT: prompt})
    driver.install(LORA, UNFIT)
    driver.finish([Job(prompt=(5, 6, 7), num_new=4, adapter=a) for a in (LORA, UNFIT, BASE)])
    assert base.fingerprint() == before
    base.model.get_submodule(SITE).weight[0, 0] += 1e-3
    assert base.fingerprint() != before


def test_used_blocks_serve_the_next_request_as_new_ones_would() -> None:
    driver = Driver(ResidentBase(tiny("mistral"), name="mistral"), num_blocks=24)
    outputs = []
    for _ in range(6):
        job = Job(prompt=tuple(range(10, 27)), num_new=6)
        noise = Job(prompt=tuple(range(40, 61)), num_new=5)
        driver.finish([job, noise])
        outputs.append(job.output)
        driver.give_back([job, noise])
    assert all(output == outputs[0] for output in outputs)


def test_neighbours_of_one_slot_are_one_run() -> None:
    assert divided([(0, 3), (0, 1), (2, 0), (3, 2), (3, 5), (9, 1)]) == ((0, 4), (3, 7), (9, 1))
    assert divided([(3, 1), (0, 2), (3, 1)]) == ((3, 1), (0, 2), (3, 1))
    assert divided([]) == ()


def test_an_adapter_acts_from_a_token_on() -> None:
    assert acting_runs(3, 5, -2) == ((3, 5),)
    assert acting_runs(3, 5, 0) == ((3, 5),)
    assert acting_runs(3, 5, 2) == ((0, 2), (3, 3))
    assert acting_runs(3, 5, 5) == ((0, 5), (3, 0))
    assert acting_runs(3, 5, 99) == ((0, 5), (3, 0))
