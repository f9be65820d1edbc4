"""Prefix tuning that AdapterHub's library saved, alone and in unions, gives what that library computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peft_serve.adapters.combining import combine
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.primitives import KVPrefix
from peft_serve.core import BASE, AdapterId, Reading
from peft_serve.model.base import ResidentBase
from tests.adapters.adapterhub.bases import ENCODERS, FAMILIES, NUM_NEW, SEQ2SEQ, base_model, inputs
from tests.adapters.adapterhub.served import LIMITS, compiled, expected_of, in_front, relative, resident
from tests.adapters.adapterhub.serving import Served
from tests.adapters.checkpoints import make_checkpoint, oracle_logits
from tests.model.driver import Driver, Job
from tests.model.reading_driver import ReadingDriver, Wish

TOLERANCE = 1e-5
GENERATING = tuple(family for family in FAMILIES if family not in ENCODERS)


def job_of(family: str, adapter: AdapterId) -> Job:
    """The prompt whose logits the library's are kept of."""
    given = {name: tuple(ids[0].tolist()) for name, ids in inputs(family).items()}
    if family in SEQ2SEQ:
        return Job(prompt=given["decoder_input_ids"], source=given["input_ids"], num_new=1, adapter=adapter)
    return Job(prompt=given["input_ids"], num_new=1, adapter=adapter)


def driver_of(family: str, *, is_reference: bool = False) -> tuple[Driver, list[AdapterId]]:
    adapters = {AdapterId(form): compiled(family, form) for form in in_front(family)}
    driver = Driver(ResidentBase(base_model(family), name="tiny"), adapters)
    driver.base.runs.attention.is_reference = is_reference
    assert not driver.install(*adapters).failed_installs
    return driver, list(adapters)


@pytest.mark.parametrize("chunk", [100, 2])
@pytest.mark.parametrize("is_reference", [False, True])
@pytest.mark.parametrize("family", GENERATING)
def test_logits_of_every_token_alone_and_in_one_batch(family: str, is_reference: bool, chunk: int) -> None:
    driver, adapters = driver_of(family, is_reference=is_reference)
    together = [BASE, *adapters]
    for members in (*([each] for each in together), together):
        jobs = [job_of(family, adapter) for adapter in members]
        for adapter, rows in zip(members, driver.read(jobs, chunk=chunk), strict=True):
            wanted = torch.log_softmax(expected_of(family)[adapter], dim=-1)
            assert relative(torch.tensor(rows), wanted) < TOLERANCE, adapter
        driver.give_back(jobs)


@pytest.mark.parametrize("max_step_tokens", [64, 3])
@pytest.mark.parametrize("family", GENERATING)
def test_generated_tokens_through_the_scheduler(family: str, max_step_tokens: int) -> None:
    """Two requests of each adapter, with too few blocks for all of them, or in chunks so small that they queue up."""
    adapters = {AdapterId(form): compiled(family, form) for form in in_front(family)}
    base = ResidentBase(base_model(family), name="tiny")
    served = Served(base, adapters, num_blocks=6 + 3 * len(adapters) + 4, max_step_tokens=max_step_tokens)
    prompt = tuple(inputs(family)["input_ids"][0].tolist())
    asked = [BASE, *adapters] * 2
    (own,) = Served(base, {}).generate([BASE], prompt, NUM_NEW)
    for adapter, tokens in zip(asked, served.generate(asked, prompt, NUM_NEW), strict=True):
        wanted = own if adapter == BASE else expected_of(family)[f"{adapter}.tokens"].tolist()
        assert tokens == wanted, adapter
    if family not in SEQ2SEQ and max_step_tokens > NUM_NEW:
        assert served.num_preempted > 0, "the blocks were to be too few"


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_beside_the_base_and_prefixes_of_peft(family: str) -> None:
    """One counts its positions and the other does not, in one batch."""
    files, oracle = make_checkpoint("prefix_tuning", family, 1, base=base_model(family))
    of_peft = compile_adapter(inspect(files, resident(family), LIMITS), resident(family), LIMITS)
    adapters = {AdapterId("peft"): of_peft, **{AdapterId(form): compiled(family, form) for form in in_front(family)}}
    driver = Driver(ResidentBase(base_model(family), name="tiny"), adapters)
    assert not driver.install(*adapters).failed_installs
    given = inputs(family)
    peft_logits = oracle_logits(oracle, given["input_ids"], given.get("decoder_input_ids", given["input_ids"]))[0]
    names = [BASE, *adapters]
    for adapter, rows in zip(names, driver.read([job_of(family, name) for name in names], chunk=4), strict=True):
        wanted = peft_logits if adapter == "peft" else expected_of(family)[adapter]
        assert relative(torch.tensor(rows), torch.log_softmax(wanted, dim=-1)) < TOLERANCE, adapter


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_choices_are_scored_behind_a_prefix(family: str) -> None:
    """What a choice of three tokens gets is what its tokens get one after the other."""
    name = AdapterId("prefix")
    base = ResidentBase(base_model(family), name="tiny")
    adapters = {name: compiled(family, "prefix")}
    prompt, choice = tuple(inputs(family)["input_ids"][0].tolist()), (7, 21, 30)
    (scored, _) = Served(base, adapters).score(name, prompt, (choice, (8, 9)))
    driver = Driver(ResidentBase(base_model(family), name="tiny"), adapters)
    driver.install(name)
    has_source = family in SEQ2SEQ
    before = base.decoder_start_ids if has_source else prompt
    job = Job(prompt=(*before, *choice[:-1]), source=prompt if has_source else (), num_new=1, adapter=name)
    (rows,) = driver.read([job])
    wanted = sum(row[token] for row, token in zip(rows[-len(choice) :], choice, strict=True))
    assert scored == pytest.approx(wanted, rel=1e-5)


def test_a_prefix_takes_nothing_of_the_context() -> None:
    """A prompt as long as the table of positions has room behind any prefix of AdapterHub's, and not behind peft's."""
    family, name = "gpt2", AdapterId("prefix")
    adapters = {name: compiled(family, "prefix")}
    longest = resident(family).shape.max_positions
    driver = ReadingDriver(ResidentBase(base_model(family), name="tiny"), adapters)
    fits, fails = driver.read([Wish(Reading.LAST, (5,) * n, name) for n in (longest, longest + 1)])
    assert isinstance(fits, tuple)
    assert isinstance(fails, Exception)
    assert "needs 65 positions" in str(fails)


def test_an_answer_ends_where_the_positions_end() -> None:
    served = Served(ResidentBase(base_model("gpt2"), name="tiny"), {AdapterId("prefix"): compiled("gpt2", "prefix")})
    (tokens,) = served.generate([AdapterId("prefix")], (5,) * 60, 30)
    assert len(tokens) == 4


def test_two_prefixes_in_one_request() -> None:
    """Neither takes positions, so that their order is none: both are read, and the tokens count from 0."""
    first, second = (compiled("llama", form) for form in ("prefix", "prefix_flat"))
    both = [
        combine([(a, 1.0), (b, 1.0)], AdapterId(name))
        for name, a, b in (("one", first, second), ("other", second, first))
    ]
    driver = Driver(ResidentBase(base_model("llama"), name="tiny"), {adapter.id: adapter for adapter in both})
    driver.install(*(adapter.id for adapter in both))
    one, other = (torch.tensor(rows) for rows in driver.read([job_of("llama", adapter.id) for adapter in both]))
    assert relative(one, other) < TOLERANCE
    for form in ("prefix", "prefix_flat"):
        assert relative(one, torch.log_softmax(expected_of("llama")[form], dim=-1)) > 1e-3


def test_the_keys_of_a_left_out_layer_are_not_there() -> None:
    prefix = compiled("gpt2", "prefix_left_out").prefix
    assert prefix is not None
    assert prefix.absent == {0}
    assert prefix.keys_LHPD[1].any()


def test_what_two_prefixes_are_to_each_other_is_in_the_key_of_their_cache() -> None:
    adapter = compiled("gpt2", "prefix")
    prefix = adapter.prefix
    assert prefix is not None
    keys = {
        combine([(adapter, 1.0)], adapter.id).footprint(is_encoder_decoder=False).kv_key,
        replace(adapter, prefix=KVPrefix(prefix.keys_LHPD, prefix.values_LHPD))
        .footprint(is_encoder_decoder=False)
        .kv_key,
        replace(adapter, prefix=replace(prefix, absent=frozenset({0}))).footprint(is_encoder_decoder=False).kv_key,
    }
    assert len(keys) == 3


@pytest.mark.parametrize("family", [family for family in ENCODERS if family != "deberta-v2"])
def test_states_of_encoders_with_all_forms_and_the_base_in_one_batch(family: str) -> None:
    """The first state is that of a prompt, where there is one, as for the library's heads."""
    forms = in_front(family)
    adapters = {AdapterId(form): compiled(family, form) for form in forms}
    driver = ReadingDriver(ResidentBase(base_model(family), name="tiny"), adapters)
    ids = tuple(inputs(family)["input_ids"][0].tolist())
    wishes = [
        Wish(reading, ids, adapter)
        for adapter in (BASE, *adapters)
        for reading in (Reading.FIRST, Reading.LAST, Reading.MEAN)
    ]
    given = driver.read(wishes)
    for wish, rows in zip(wishes, given, strict=True):
        states = expected_of(family)[wish.adapter]
        of_reading = {Reading.FIRST: states[0], Reading.LAST: states[-1], Reading.MEAN: states[-len(ids) :].mean(0)}
        assert not isinstance(rows, Exception), rows
        assert relative(torch.tensor(rows[0]), of_reading[wish.reading]) < TOLERANCE, wish


def test_a_bare_prompt_takes_nothing_of_the_context() -> None:
    name = AdapterId("prompt")
    driver = ReadingDriver(ResidentBase(base_model("bert"), name="tiny"), {name: compiled("bert", "prompt")})
    fits, fails = driver.read([Wish(Reading.LAST, (5,) * n, name) for n in (64, 65)])
    assert isinstance(fits, tuple)
    assert "needs 65 positions" in str(fails)
