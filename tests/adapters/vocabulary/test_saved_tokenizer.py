"""A saved `tokenizer.json`: what is kept of it, what is refused, and what it is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from peft_serve.adapters.archive import files_from_parts
from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE
from peft_serve.adapters.saved_tokenizer import KEPT_FILE, SAVED_FILE, Foundation, Reduction, digest_of, reduced
from peft_serve.adapters.verdict import Verdict
from peft_serve.adapters.vocabulary import ADDED_FILE, TOKENIZER_FILE, Vocabulary, parse_vocabulary, vocabulary_files
from peft_serve.errors import AdapterInvalid, MalformedUpload, PayloadTooLarge
from peft_serve.model.loader import DEMO_NAMES, locate
from peft_serve.text import TextCodec

WORDS = {"a": 0, "b": 1, "c": 2}


def saved(vocab: Any = None, added: Any = (), **more: Any) -> bytes:
    model = {"type": "WordLevel", "vocab": WORDS if vocab is None else vocab}
    return json.dumps({"version": "1.0", "added_tokens": list(added), **more, "model": model}).encode()


def token(number: int, text: str, **flags: bool) -> dict[str, Any]:
    return {"id": number, "content": text, **flags}


def parsed(content: bytes, **beside: Any) -> Vocabulary:
    names = {"config": TOKENIZER_FILE, "added": ADDED_FILE}
    verdict = Verdict()
    more = {names[key]: json.dumps(value).encode() for key, value in beside.items()}
    vocabulary = parse_vocabulary(vocabulary_files({SAVED_FILE: content, **more}), verdict)
    verdict.settle()
    return vocabulary


def test_a_file_of_the_tokenizers_library() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<s>": 3}, merges=[("a", "b")]))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True, normalized=False), AddedToken("<y>", special=True)])
    vocabulary = parsed(tokenizer.to_str(pretty=True).encode())
    assert vocabulary.added == {"<s>": 3, "<x>": 4, "<y>": 5}
    assert vocabulary.special == {"<s>", "<y>"}
    assert vocabulary.traits["<x>"] == ("lstrip",)
    assert vocabulary.foundation == Foundation(3, digest_of({"a": 0, "b": 1, "ab": 2}, 3))


def test_a_vocabulary_in_order_as_unigram_has_it() -> None:
    listed = parsed(saved([["a", 0.0], ["b", -1.5], ["c", -2]], [token(1, "b"), token(3, "<x>")]))
    assert listed.added == {"<x>": 3}, "what is below a word that is not added is told by the digest"
    assert listed.foundation == Foundation(3, digest_of(WORDS, 3))


def test_the_words_below_are_compared_with_the_bases() -> None:
    foundation = parsed(saved(added=[token(3, "<x>")])).foundation
    assert foundation is not None
    foundation.check(WORDS)
    foundation.check({**WORDS, "<pad>": 3, "<more>": 4})
    for others in ({"a": 0, "b": 1}, {"a": 0, "b": 2, "c": 1}, {"a": 0, "b": 1, "d": 2}, {}):
        with pytest.raises(AdapterInvalid, match="other words than the base's tokenizer among its first 3"):
            foundation.check(others)


def test_what_follows_the_vocabulary_is_not_read() -> None:
    whole = saved()
    assert reduced(whole) == reduced(whole.rstrip(b"}") + b'}, "merges": [[[[[[[[[[[[[ nothing of ours')


def test_an_empty_vocabulary_is_one() -> None:
    assert parsed(saved({}, [token(0, "<x>")])).added == {"<x>": 0}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not valid JSON"),
        (b'{"added_tokens": [], "added_tokens": [], "model": {"vocab": {}}}', "occurs twice"),
        (b'{"added_tokens": [], "model": {"vocab": {"a": 0, "a": 1}}}', "occurs twice"),
        (b'{"added_tokens": [{"id": NaN}], "model": {"vocab": {}}}', "NaN"),
        (b'{"added_tokens": [],', "not valid JSON"),
        (b'{"added_tokens" []}', "not valid JSON"),
        (b"{3: 4}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "not valid JSON"),
        (b"\xff", "UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs"),
        (b'{"model": {"vocab": {}}, "added_tokens": []}', "no list of added_tokens before its model"),
        (b"{}", "model.vocab"),
        (b'{"added_tokens": [], "model": {"type": "BPE"}}', "model.vocab"),
        (b'{"added_tokens": [], "model": 3}', "model.vocab"),
        (saved({"a": -1}), "model.vocab"),
        (saved({"a": True}), "model.vocab"),
        (saved([["a"]]), "model.vocab"),
        (saved([3]), "model.vocab"),
        (saved(added=[3]), "no token"),
        (saved(added=[token(-1, "<x>")]), "no token"),
        (saved(added=[{"id": 3}]), "no token"),
        (saved(added=[token(3, "a")]), "two ids"),
        (saved(added=[token(3, "<x>"), token(4, "<x>")]), "two ids"),
    ],
)
def test_malformed_by_name(content: bytes, reason: str) -> None:
    with pytest.raises(MalformedUpload, match=reason) as refused:
        reduced(content)
    assert SAVED_FILE in refused.value.message


def test_a_token_has_one_id_in_all_files() -> None:
    content = saved(added=[token(3, "<x>")])
    same = parsed(
        content, added={"<x>": 3}, config={"added_tokens_decoder": {"3": {"content": "<x>", "special": True}}}
    )
    assert same.added == {"<x>": 3}
    assert same.special == {"<x>"}
    with pytest.raises(AdapterInvalid, match="another id in the files beside it"):
        parsed(content, added={"<x>": 4})


@pytest.mark.parametrize(
    "kept",
    [
        {"num_ids": "3", "digest": "x", "tokens": []},
        {"num_ids": 3, "digest": 4, "tokens": []},
        {"num_ids": 3, "digest": "x", "tokens": {}},
        {"num_ids": 3, "digest": "x", "tokens": [{"id": 3}]},
    ],
)
def test_a_reduced_form_that_is_not_ours_is_refused(kept: dict[str, Any]) -> None:
    verdict = Verdict()
    parse_vocabulary({KEPT_FILE: json.dumps(kept).encode()}, verdict)
    with pytest.raises(AdapterInvalid, match=KEPT_FILE):
        verdict.settle()


def test_tokens_of_a_reduced_form_keep_the_rules_of_tokens() -> None:
    for bad in (token(3, ""), token(3, "x" * 300), {"content": "<x>"}, {"id": "3", "content": "<x>"}):
        verdict = Verdict()
        kept = {"num_ids": 3, "digest": "x", "tokens": [bad]}
        parse_vocabulary({KEPT_FILE: json.dumps(kept).encode()}, verdict)
        with pytest.raises(AdapterInvalid):
            verdict.settle()


def test_an_upload_keeps_the_reduced_form_alone() -> None:
    parts = {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"w", SAVED_FILE: saved(added=[token(3, "<x>")])}
    files = files_from_parts(parts)
    assert files.vocabulary == {KEPT_FILE: reduced(parts[SAVED_FILE])}
    assert files.ignored == ()
    assert files_from_parts(files.contents()) == files, "what was kept may be uploaded again"
    with pytest.raises(PayloadTooLarge, match=SAVED_FILE):
        files_from_parts({**parts, SAVED_FILE: b" " * ((64 << 20) + 1)})


def test_a_tokenizer_seen_before_is_not_reduced_again() -> None:
    reduction = Reduction(num_kept=2)
    one, two, three = (saved(added=[token(3, text)]) for text in ("<x>", "<y>", "<z>"))
    first = reduction(one)
    assert first == reduced(one)
    second = reduction(two)
    assert reduction(one) is first
    reduction(three)
    assert reduction(one) is first, "the one that was asked for last stays"
    assert reduction(two) == second
    assert reduction(two) is not second


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_a_bases_own_tokenizer_is_nothing_new(name: str) -> None:
    """As it was published, and as today's library saves it again."""
    codec = TextCodec.load(locate(name), is_encoder_decoder=name == "demo-t5")
    published = (Path(locate(name)) / SAVED_FILE).read_bytes()
    again = AutoTokenizer.from_pretrained(locate(name)).backend_tokenizer.to_str(pretty=True).encode()
    for content in (published, again):
        vocabulary = parsed(content)
        assert vocabulary.foundation is not None
        assert codec.speaking(vocabulary, vocab_size=1 << 20, with_template=True) is codec
