"""Ids of combinations, and the expressions that name them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_serve.adapters.combined import MAX_PARTS, MAX_WEIGHT, Part, combined_id, is_combined, parts_of
from peft_serve.adapters.names import Term, parse_expression
from peft_serve.core import AdapterId
from peft_serve.errors import InvalidParameter

digests = st.text("0123456789abcdef", min_size=64, max_size=64).map(lambda text: AdapterId(f"sha256:{text}"))
weights = st.floats(-MAX_WEIGHT, MAX_WEIGHT, allow_nan=False).filter(bool)
parts = st.builds(Part, id=digests, weight=weights, task=st.none() | st.integers(0, 1000))
A, B = AdapterId("sha256:" + "a" * 64), AdapterId("sha256:" + "b" * 64)


@given(st.lists(parts, min_size=1, max_size=MAX_PARTS))
def test_an_id_tells_its_parts(given_parts: list[Part]) -> None:
    made = combined_id(given_parts)
    assert list(parts_of(made)) == given_parts
    assert is_combined(made) is not (len(given_parts) == 1 and given_parts[0].is_plain)


def test_a_checkpoint_as_it_is_keeps_its_id() -> None:
    assert combined_id([Part(id=A)]) == A
    assert not is_combined(A)
    assert not is_combined(AdapterId("base"))
    assert combined_id([Part(id=A, weight=0.7), Part(id=B, task=2)]) == f"{A}*0.7+{B}#2"


def test_order_weight_and_task_tell_combinations_apart() -> None:
    made = [
        [Part(id=A), Part(id=B)],
        [Part(id=B), Part(id=A)],
        [Part(id=A, weight=2.0), Part(id=B)],
        [Part(id=A, task=0), Part(id=B)],
        [Part(id=A, task=1), Part(id=B)],
    ]
    assert len({combined_id(each) for each in made}) == len(made)


@pytest.mark.parametrize("text", ["", "base", "sha256:abc", f"{A}*", f"{A}#x", f"{A}*0.5*2", f"{A}+", f"{A}*nan"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a part"):
        parts_of(AdapterId(text))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a", [("a", 1.0)]),
        ("a+b", [("a", 1.0), ("b", 1.0)]),
        ("a:0.7+b@2:.3", [("a", 0.7), ("b@2", 0.3)]),
        ("a:-1+b", [("a", -1.0), ("b", 1.0)]),
        (f"a@{A}:2+b@{B}", [(f"a@{A}", 2.0), (f"b@{B}", 1.0)]),
        (f"a@{A}", [(f"a@{A}", 1.0)]),
        ("../x", [("../x", 1.0)]),
    ],
)
def test_an_expression_is_its_terms(text: str, terms: list[tuple[str, float]]) -> None:
    assert parse_expression(text) == tuple(Term(ref=ref, weight=weight) for ref, weight in terms)


@pytest.mark.parametrize("text", ["a:0", "a:", "a:x", "a:nan", "a:inf", "a:1e9", "a:101", "a+b:0", "a+a", "a+b+a:2"])
def test_weights_and_repetitions_have_rules(text: str) -> None:
    with pytest.raises(InvalidParameter, match="weight") as refused:
        parse_expression(text)
    assert refused.value.param == "adapter"


def test_as_many_parts_as_the_limit() -> None:
    assert len(parse_expression("+".join(f"n{i}" for i in range(MAX_PARTS)))) == MAX_PARTS
    with pytest.raises(InvalidParameter, match="at most 8"):
        parse_expression("+".join(f"n{i}" for i in range(MAX_PARTS + 1)))


@given(st.text(max_size=30))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    try:
        terms = parse_expression(text)
    except InvalidParameter:
        return
    assert [term.ref.partition(":")[0] for term in terms] == [part.partition(":")[0] for part in text.split("+")]
