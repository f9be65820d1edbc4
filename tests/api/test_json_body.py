"""What is no JSON object, or one with two meanings: each is told by its own name, and nothing of it is echoed."""

import pytest

from peft_serve.api.bodies import ChatBody, Parameters
from peft_serve.api.fields import CHAT, PARAMETERS
from peft_serve.api.json_body import parse_object, validated
from peft_serve.api.problems import MAX_ERROR_CHARS, MAX_ERRORS, FieldsInvalid
from peft_serve.errors import InvalidParameter

DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "there is none"),
        (b" \r\n\t", "there is none"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
        (b"\xef\xbb\xbf{}", "a byte order mark (BOM) stands before the JSON; send UTF-8 without one"),
        (b'{"a": 1\n"b": 2}', "not valid JSON from line 2, column 1"),
        (b'{"a": 1', "not valid JSON"),
        (b"{} {}", "not valid JSON from line 1, column 4"),
        (DEEP, "nested too deeply"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (rb'{"a": "\ud83d"}', "stands alone"),
        (rb'{"\udc00": 1}', "stands alone"),
        (rb'{"a": "\udc00\ud83d"}', "stands alone"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"a": 1e400}', "a number is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "more than 400 digits"),
        (b'{"a": 1, "a": 1}', "says the field a twice"),
        (b'{"a": 1, "b": 2, "b": null}', "says the field b twice"),
        (rb'{"a": 1, "\u0061": 2}', "says the field a twice"),
        (b'{"parameters": {"seed": 1, "seed": 1}}', "says the field seed twice"),
        (b'{"messages": [{"role": "user"}, {"role": "user", "role": "system"}]}', "says the field role twice"),
        (rb'{"\u001b[31m": 1, "\u001b[31m": 1}', r"says the field '\x1b[31m' twice"),
        (b'{"%s": 1, "%s": 1}' % (b"n" * 5000, b"n" * 5000), "nnn"),
        (b"[]", "a JSON object is needed"),
        (b"null", "a JSON object is needed"),
    ],
)
def test_each_kind_of_no_object_is_told_by_its_own_name(content: bytes, told: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        parse_object(content)
    assert refused.value.param == "body"
    assert refused.value.message.startswith("body: ")
    assert told in refused.value.message
    assert len(refused.value.message) < 200


def test_what_only_looks_like_one_of_them_is_taken() -> None:
    assert parse_object(rb'{"a": "\ud83d\ude00", "A": "\\ud83d"}') == {"a": "\U0001f600", "A": "\\ud83d"}
    assert parse_object(b'{"a": {"b": 1}, "b": {"a": 1}}') == {"a": {"b": 1}, "b": {"a": 1}}
    assert parse_object(b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}")["a"] != []
    assert parse_object(b'{"a": -%s}' % (b"9" * 399))["a"] == -(10**399 - 1)


@pytest.mark.parametrize("path", ["", "parameters."])
def test_of_many_wrong_fields_the_first_are_told_and_the_others_counted(path: str) -> None:
    sent = {f"{'n' * 300}{i}": i for i in range(100_000)}
    with pytest.raises(FieldsInvalid) as caught:
        validated(Parameters, sent, PARAMETERS, path=path)
    assert len(caught.value.errors) == MAX_ERRORS
    assert caught.value.message.endswith(f" (and {100_000 - MAX_ERRORS} more)")
    assert len(caught.value.message) < MAX_ERRORS * 2 * MAX_ERROR_CHARS + 100


def test_of_many_wrong_items_of_a_field_too() -> None:
    sent = {"messages": ["n" * 300] * 2_000}
    with pytest.raises(FieldsInvalid) as caught:
        validated(ChatBody, sent, CHAT)
    assert len(caught.value.errors) <= MAX_ERRORS
    assert len(caught.value.message) < MAX_ERRORS * 2 * MAX_ERROR_CHARS + 100
