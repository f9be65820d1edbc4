"""The text that comes with an adapter: what is read of a saved tokenizer, and what is refused."""

from __future__ import annotations

import json

import pytest

from peft_serve.adapters.manifest import Manifest, decode_manifest, encode_manifest
from peft_serve.adapters.records import Profile, Summary
from peft_serve.adapters.verdict import Verdict
from peft_serve.adapters.vocabulary import (
    ADDED_FILE,
    MAX_ADDED,
    MAX_TEMPLATE_BYTES,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    Vocabulary,
    parse_vocabulary,
)
from peft_serve.errors import AdapterInvalid, MalformedUpload


def parsed(**files: bytes | str | dict[str, object]) -> Vocabulary:
    names = {"template": TEMPLATE_FILE, "config": TOKENIZER_FILE, "added": ADDED_FILE}
    contents = {
        names[key]: value
        if isinstance(value, bytes)
        else (value if isinstance(value, str) else json.dumps(value)).encode()
        for key, value in files.items()
    }
    verdict = Verdict()
    result = parse_vocabulary(contents, verdict)
    verdict.settle()
    return result


def test_nothing_is_nothing() -> None:
    assert not parsed()
    assert not parsed(config={"tokenizer_class": "PreTrainedTokenizerFast"})


def test_template_and_tokens_of_a_saved_tokenizer() -> None:
    decoder = {"100": {"content": "<a>", "special": True}, "101": {"content": "<b>", "special": False}}
    vocabulary = parsed(template="{{ messages }}", config={"added_tokens_decoder": decoder, "chat_template": "old"})
    assert vocabulary.chat_template == "{{ messages }}"
    assert vocabulary.added == {"<a>": 100, "<b>": 101}
    assert vocabulary.special == {"<a>"}


def test_older_files() -> None:
    both = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    vocabulary = parsed(added={"<a>": 7}, config={"chat_template": both})
    assert vocabulary.added == {"<a>": 7}
    assert vocabulary.chat_template == "d"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config": {"added_tokens_decoder": []}}, "object from ids"),
        ({"config": {"added_tokens_decoder": {"x": {"content": "<a>"}}}}, "no token"),
        ({"config": {"added_tokens_decoder": {"1": {"content": 3}}}}, "no token"),
        ({"config": {"added_tokens_decoder": {"1": {"content": "a"}, "2": {"content": "a"}}}}, "no token"),
        ({"added": {"<a>": -1}}, "whole number"),
        ({"added": {"<a>": True}}, "whole number"),
        ({"added": {"<a>": 1 << 40}}, "whole number"),
        ({"added": {"": 3}}, "characters"),
        ({"added": {"a" * 300: 3}}, "characters"),
        ({"added": {"<a>": 3}, "config": {"added_tokens_decoder": {"4": {"content": "<a>"}}}}, "another id"),
        ({"added": {f"<{i}>": i for i in range(MAX_ADDED + 1)}}, "at most"),
        ({"template": "x" * (MAX_TEMPLATE_BYTES + 1)}, "template"),
        ({"template": b"\xff\xfe"}, "UTF-8"),
        ({"config": {"chat_template": 3}}, "template"),
    ],
)
def test_refused_by_name(files: dict[str, bytes | str | dict[str, object]], reason: str) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        parsed(**files)
    assert any(reason in error.reason for error in refused.value.errors), refused.value.errors


def test_unreadable_json_is_malformed() -> None:
    with pytest.raises(MalformedUpload, match=TOKENIZER_FILE):
        parsed(config="{")


def test_names_and_flags_of_tokens() -> None:
    decoder = {"100": {"content": "<a>", "special": True, "lstrip": True, "rstrip": False}, "101": {"content": "<b>"}}
    config = {"added_tokens_decoder": decoder, "eos_token": "<b>", "pad_token": {"content": "<pad>"}, "bos_token": None}
    vocabulary = parsed(config=config)
    assert vocabulary.names == {"eos_token": "<b>", "pad_token": "<pad>"}
    assert vocabulary.special == {"<a>", "<b>"}, "a token with a name is special; one that is not added is none of ours"
    assert vocabulary.traits == {"<a>": ("lstrip",), "<b>": ()}


def test_special_tokens_of_the_older_list_are_known_by_the_config() -> None:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        vocabulary = parsed(added={"<a>": 7, "<b>": 8}, config={key: ["<a>", {"content": "<c>"}, 3]})
        assert vocabulary.special == {"<a>"}


def test_a_name_that_is_no_token_is_refused() -> None:
    with pytest.raises(AdapterInvalid, match="eos_token"):
        parsed(config={"eos_token": "x" * 300})


def test_a_vocabulary_survives_its_manifest() -> None:
    vocabulary = Vocabulary(
        chat_template="{{ messages }}",
        added={"<a>": 7, "<b>": 8},
        special=frozenset({"<a>"}),
        traits={"<a>": ("lstrip",)},
        names={"eos_token": "<a>"},
    )
    summary = Summary(
        peft_type="LORA", task_type=None, base=None, rank=1, num_bytes=1, num_tensors=1, num_sites=1, modules=()
    )
    manifest = Manifest(checked_for="x", summary=summary, profile=Profile(), vocabulary=vocabulary)
    assert decode_manifest(encode_manifest(manifest)) == manifest
