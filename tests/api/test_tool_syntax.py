"""Tool calls read out of answers: whole, in pieces of any size, and what only looks like one."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from peft_serve.api.tool_syntax import CallReader, ToolCall, ToolSyntax, syntax_of

HERMES, LLAMA, MISTRAL, LIST = ToolSyntax.HERMES, ToolSyntax.LLAMA3_JSON, ToolSyntax.MISTRAL, ToolSyntax.LIST
F = ToolCall("f", '{"a": 1}')
G = ToolCall("g", "{}")

CASES: list[tuple[ToolSyntax, str, list[str | ToolCall]]] = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [F]),
    (HERMES, 'Let me see. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', ["Let me see.", F]),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}'
        "</tool_call>",
        [F, G],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call> done', [F, "done"]),
    (HERMES, "a < b <tool", ["a < b <tool"]),
    (HERMES, '<tool_call>{"nam', ['<tool_call>{"nam']),
    (HERMES, '<tool_call>{"name": 3}</tool_call>', ['<tool_call>{"name": 3}</tool_call>']),
    (HERMES, '{"name": "f", "arguments": {"a": 1}}', ['{"name": "f", "arguments": {"a": 1}}']),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": "}</tool_call>"}}',
        [ToolCall("f", '{"a": "}</tool_call>"}')],
    ),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', [F]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', [F, G]),
    (LLAMA, "Hello {there}", ["Hello {there}"]),
    (LLAMA, '{"colour": "red"}', ['{"colour": "red"}']),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', [F, G]),
    (MISTRAL, "[1, 2]", ["[1, 2]"]),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', [F, G]),
    (MISTRAL, 'Let me see.[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"a": 1}', ["Let me see.", F]),
    (MISTRAL, '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}', [F, G]),
    (MISTRAL, '[TOOL_CALLS] my.tool-2 [ARGS] {"a": "}]"} done', [ToolCall("my.tool-2", '{"a": "}]"}'), "done"]),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": ', ['[TOOL_CALLS]f[ARGS]{"a": ']),
    (MISTRAL, "[TOOL_CALLS] of what?", ["[TOOL_CALLS] of what?"]),
    (HERMES, 'f[ARGS]{"a": 1}', ['f[ARGS]{"a": 1}']),
    (LIST, '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', [F, G]),
    (LIST, '[{"name": "f", "argu', ['[{"name": "f", "argu']),
]


def read(syntax: ToolSyntax, pieces: list[str], *, is_single: bool = False) -> list[str | ToolCall]:
    """What is found, words joined."""
    reader = CallReader(syntax, is_single=is_single)
    found = [each for piece in pieces for each in reader.push(piece)] + reader.flush()
    joined: list[str | ToolCall] = []
    for each in found:
        if isinstance(each, str) and joined and isinstance(joined[-1], str):
            joined[-1] += each
        else:
            joined.append(each)
    return joined


@pytest.mark.parametrize(("syntax", "text", "expected"), CASES)
def test_calls_and_words_come_out_however_the_answer_is_cut(
    syntax: ToolSyntax, text: str, expected: list[str | ToolCall]
) -> None:
    rng = random.Random(text)
    assert read(syntax, [text]) == expected
    assert read(syntax, list(text)) == expected
    for _ in range(20):
        cuts = sorted({0, len(text), *(rng.randrange(len(text)) for _ in range(3))})
        assert read(syntax, [text[a:b] for a, b in pairwise(cuts)]) == expected


def test_words_are_not_held_back_longer_than_they_must_be() -> None:
    reader = CallReader(HERMES)
    assert reader.push("Hello <") == ["Hello"]
    assert reader.push("b> you") == [" <b> you"]


def test_one_call_at_most_if_that_is_wanted() -> None:
    for syntax, text, expected in CASES:
        if expected == [F, G]:
            assert read(syntax, [text], is_single=True) == [F]
            assert read(syntax, list(text), is_single=True) == [F]


def test_a_template_tells_its_syntax() -> None:
    assert syntax_of("return a json object within <tool_call></tool_call> tags") is HERMES
    assert syntax_of("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert syntax_of('{"name": .., "parameters": ..}') is LLAMA
    assert syntax_of("{{ messages[0].content }}") is None
