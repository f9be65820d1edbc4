"""What a grammar allows: every prefix that can become a right answer, and nothing else."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from peft_serve.errors import Internal, InvalidParameter
from peft_serve.grammars.compiler import GrammarCompiler
from peft_serve.grammars.grammar import (
    Grammar,
    GrammarRefused,
    of_choice,
    of_json_object,
    of_json_schema,
    of_regex,
    of_rules,
)
from peft_serve.grammars.matching import GrammarConstraint, GrammarMatcher
from tests.grammars.vocabularies import (
    EOS,
    byte_level,
    ids_in,
    sentencepiece_bpe,
    spelled,
    started,
    unigram,
    word_pieces,
)

BYTES = byte_level()
SPELLING = spelled(BYTES)
COMPILER = GrammarCompiler(max_compiled=4)

LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "integer", "minimum": -20, "maximum": 300},
        {"type": "string", "maxLength": 3},
        {"enum": ["a b", 'q"', 7, None]},
        {"type": "null"},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": sorted(set(properties) & required),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            st.sets(st.sampled_from("abc")),
        ),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
    ),
    max_leaves=3,
)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether the value is what the schema asks for, for the schemas that are drawn above."""
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        return isinstance(value, list) and len(value) <= 2 and all(fits(v, schema["items"]) for v in value)
    if kind == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys() <= known.keys()
            and all(fits(v, known[k]) for k, v in value.items())
        )
    if kind == "integer":
        return type(value) is int and -20 <= value <= 300
    if kind == "string":
        return isinstance(value, str) and len(value) <= 3
    return value is None if kind == "null" else isinstance(value, bool)


async def begun(grammar: Grammar) -> GrammarMatcher:
    compiled = await COMPILER.compiled("bytes", lambda: SPELLING, grammar)
    return GrammarConstraint(compiled, frozenset({EOS})).start()


def walked(matcher: GrammarMatcher, rng: random.Random, *, most: int = 400) -> tuple[bytes, bool]:
    """A random answer, and whether it came to its end."""
    said = b""
    for _ in range(most):
        allowed = ids_in(matcher.mask())
        assert allowed
        token = EOS if EOS in allowed and rng.random() < 0.3 else rng.choice(allowed)
        if token == EOS:
            return said, True
        matcher.accept(token)
        said += SPELLING.tokens[token]
    return said, False


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SCHEMAS, st.integers(0, 99))
async def test_every_answer_that_may_end_is_what_the_schema_asks_for(schema: dict[str, Any], seed: int) -> None:
    said, is_whole = walked(await begun(of_json_schema(schema)), random.Random(seed))
    assert is_whole
    assert fits(json.loads(said), schema), (schema, said)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(min_size=1, max_size=6).filter(lambda t: t.isprintable()), min_size=1, max_size=4))
async def test_every_prefix_of_a_choice_is_allowed_token_by_token_in_every_spelling(texts: list[str]) -> None:
    grammar = of_choice(texts)
    for text in texts:
        matcher, left = await begun(grammar), text.encode()
        while left:
            allowed = set(ids_in(matcher.mask()))
            able = {i for i, spelt in enumerate(SPELLING.tokens) if spelt and left.startswith(spelt)}
            assert able <= allowed
            token = max(able, key=lambda i: len(SPELLING.tokens[i]))
            matcher.accept(token)
            left = left[len(SPELLING.tokens[token]) :]
        assert EOS in ids_in(matcher.mask())
        assert matcher.is_over == (not any(t != text and t.startswith(text) for t in texts))


@pytest.mark.parametrize(
    "pattern", [r"\d{3}-\d{4}", "(yes|no)!?", r"[a-c]+\.(com|org)", "^ab?$", r"a\$", "é+", r"\w \w", "a\nb", "x/y"]
)
async def test_an_answer_matches_its_pattern_as_a_whole(pattern: str) -> None:
    for seed in range(5):
        said, is_whole = walked(await begun(of_regex(pattern)), random.Random(seed))
        assert is_whole
        assert re.fullmatch(pattern, said.decode(), re.ASCII if "é" not in pattern else 0), said


async def test_a_grammar_of_ones_own_in_either_notation() -> None:
    for rules in ('start: "a" pair+\npair: "b" | "é"', 'root ::= "a" pair+\npair ::= "b" | "é"'):
        said, is_whole = walked(await begun(of_rules(rules)), random.Random(3))
        assert is_whole
        assert re.fullmatch("a[bé]+", said.decode())


async def test_white_space_in_json_does_not_go_on_for_ever() -> None:
    matcher = await begun(of_json_object())
    matcher.accept(BYTES.token_to_id("{"))
    (space,) = BYTES.encode(" ").ids
    assert space in ids_in(matcher.mask())
    matcher.accept(space)
    assert space not in ids_in(matcher.mask())


async def test_the_end_is_allowed_exactly_where_the_answer_may_end_and_means_what_the_request_says() -> None:
    compiled = await COMPILER.compiled("bytes", lambda: SPELLING, of_regex("ab?"))
    matcher = GrammarConstraint(compiled, frozenset({5, 2, 10**6})).start()
    a, b = BYTES.token_to_id("a"), BYTES.token_to_id("b")
    assert ids_in(matcher.mask()) == [a]
    matcher.accept(a)
    assert ids_in(matcher.mask()) == sorted({2, 5, b})
    assert not matcher.is_over
    matcher.accept(b)
    assert ids_in(matcher.mask()) == [2, 5]
    assert matcher.is_over
    endless = GrammarConstraint(compiled, frozenset()).start()
    endless.accept(a)
    assert ids_in(endless.mask()) == [b]


async def test_answers_do_not_see_each_other_and_a_forbidden_token_is_noticed() -> None:
    compiled = await COMPILER.compiled("bytes", lambda: SPELLING, of_regex("a|b"))
    one, two = (GrammarConstraint(compiled, frozenset({EOS})).start() for _ in range(2))
    one.accept(BYTES.token_to_id("a"))
    assert EOS in ids_in(one.mask())
    assert EOS not in ids_in(two.mask())
    with pytest.raises(Internal, match="does not allow"):
        two.accept(BYTES.token_to_id("c"))


@pytest.mark.parametrize("make", [sentencepiece_bpe, unigram])
async def test_a_first_space_that_is_not_shown_is_let_pass(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    matcher = await started(of_choice(["a"]), tokenizer)
    texts = {tokenizer.id_to_token(i) for i in ids_in(matcher.mask())} - {"<0x20>", "<0x61>"}
    assert texts == {"\u2581", "a", "\u2581a"}
    matcher.accept(tokenizer.token_to_id("\u2581a"))
    assert ids_in(matcher.mask()) == [EOS]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: of_regex("(a"), "unclosed group"),
        (lambda: of_regex(r"(a)\1"), "backreferences are not supported"),
        (lambda: of_regex("(?=a)b"), "look-around"),
        (lambda: of_regex(""), "one character at least"),
        (lambda: of_regex("a$^b"), "not supported"),
        (lambda: of_choice([]), "at least one text"),
        (lambda: of_json_schema("{"), "has to be JSON"),
        (lambda: of_json_schema(["a"]), "JSON object"),
        (lambda: of_json_schema({"type": "foo"}), "Invalid type: foo"),
        (
            lambda: of_json_schema({"type": "array", "uniqueItems": True}),
            'not done here: "uniqueItems"; leave them out',
        ),
        (lambda: of_regex(".*" * 500), "^it is too large, or a number in it is; repeat less"),
        (lambda: of_json_schema({"type": "string", "minLength": 10**12}), "^it is too large, or a number in it is"),
        (lambda: of_json_schema({"$ref": "#/limits.panic"}), "'/limits.panic' does not exist"),
        (lambda: of_rules('start: "a'), "^it cannot be read; look for quotes"),
        (lambda: of_json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "greater than maximum"),
        (lambda: of_json_schema({"$ref": "http://127.0.0.1:9/x"}), "does not fetch"),
        (lambda: of_json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (lambda: of_json_schema({"$ref": "#/nowhere"}), "does not exist"),
        (lambda: of_rules('start: "a" {'), "Expected token"),
        (lambda: of_rules("start: other"), "unknown name"),
        (lambda: of_rules("root ::= other"), "not found"),
        (lambda: of_rules('%llguidance {"no_forcing": false}\nstart: "a"'), "the server's"),
        (lambda: of_rules('start: ""'), "empty text only"),
        (lambda: of_rules("((((" * 9000), "."),
    ],
)
async def test_what_is_no_grammar_is_refused_with_the_reason(make: Callable[[], Grammar], reason: str) -> None:
    with pytest.raises(GrammarRefused, match=reason) as refused:
        await begun(make())
    assert len(str(refused.value)) < 400
    assert "%llguidance {" not in str(refused.value)


async def test_depth_is_bounded_without_recursion() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(GrammarRefused, match="64 levels"):
        of_json_schema(deep)


async def test_a_vocabulary_that_cannot_be_spelled_or_cannot_spell_is_told() -> None:
    with pytest.raises(GrammarRefused, match="WordPiece"):
        await started(of_json_object(), word_pieces())
    spelling = replace(spelled(unigram()), drops_first_space=False)
    with pytest.raises(GrammarRefused, match="no token of this base"):
        await COMPILER.compiled("unigram", lambda: spelling, of_choice(["€"]))
    compiled = await COMPILER.compiled("unigram", lambda: spelling, of_choice(["a€"]))
    matcher = GrammarConstraint(compiled, frozenset({EOS})).start()
    matcher.accept(unigram().token_to_id("a"))
    with pytest.raises(InvalidParameter, match="no token of this base"):
        matcher.mask()


HOSTILE: dict[str, Callable[[], Grammar]] = {
    "repetitions of repetitions": lambda: of_regex("((a{1,100}){1,100}){1,100}"),
    "an automaton of 2^500 states": lambda: of_regex(".*a.{500}"),
    "an automaton of 2^20 states": lambda: of_regex("(a|b)*a(a|b){20}"),
    "ambiguous": lambda: of_rules('start: s\ns: s s | "a" | '),
    "many properties": lambda: of_json_schema({"type": "object", "properties": {f"k{i}": {} for i in range(1500)}}),
    "references in a circle": lambda: of_json_schema(
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"}
    ),
    "a long array": lambda: of_json_schema({"type": "array", "items": {"type": "null"}, "minItems": 10**6}),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_grammar_is_refused_or_stays_cheap(make: Callable[[], Grammar]) -> None:
    began = time.monotonic()
    with contextlib.suppress(GrammarRefused, InvalidParameter):
        walked(await begun(make()), random.Random(1), most=20)
    assert time.monotonic() - began < 10
