"""Text to ids and back: pieces of a stream add up to the whole, and nothing shows half a character."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.detokenizing import StopFinder
from peft_serve.errors import BadRequest
from peft_serve.text import TextCodec


@pytest.fixture(scope="module")
def codec(tiny_tokenizer: Any) -> TextCodec:
    return TextCodec(tiny_tokenizer, is_encoder_decoder=False)


@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
@settings(max_examples=60, deadline=None)
def test_pieces_of_a_stream_add_up_to_the_text(codec: TextCodec, text: str, prompt: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    detokenizer = codec.detokenizer(codec.encode(prompt.encode("utf-8", "ignore").decode()))
    pieces = [detokenizer.push(i) for i in codec.encode(text)]
    assert "".join(pieces) + detokenizer.flush() == text


def test_half_a_character_is_held_back(codec: TextCodec) -> None:
    detokenizer = codec.detokenizer(())
    ids = codec.encode("é€")
    assert len(ids) == 5
    assert [detokenizer.push(i) for i in ids] == ["", "é", "", "", "€"]


def test_a_cut_character_is_shown_at_the_end_as_broken(codec: TextCodec) -> None:
    detokenizer = codec.detokenizer(())
    assert detokenizer.push(codec.encode("€")[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_not_text(codec: TextCodec) -> None:
    assert codec.decode([1, *codec.encode("a")]) == "a"
    assert codec.is_special(1)
    assert not codec.is_special(codec.encode("a")[0])
    assert codec.token_text(1) == "</s>"


def test_a_choice_continues_the_prompt_after_a_space(codec: TextCodec) -> None:
    assert codec.continuations("Label :").ids("no") == codec.encode(" no")
    assert codec.continuations("Label : ").ids("no") == codec.encode("no")


def test_a_choice_of_an_encoder_decoder_stands_alone(tiny_tokenizer: Any) -> None:
    codec = TextCodec(tiny_tokenizer, is_encoder_decoder=True)
    assert codec.continuations("Label :").ids("no") == codec.encode("no", add_special_tokens=False)


def test_an_empty_choice_is_refused_by_name(tiny_tokenizer: Any) -> None:
    codec = TextCodec(tiny_tokenizer, is_encoder_decoder=True)
    with pytest.raises(BadRequest, match="choices"):
        codec.continuations("p").ids("")


def test_chat_without_a_template_is_a_transcript(codec: TextCodec) -> None:
    assert codec.chat_prompt([{"role": "user", "content": "hi"}]) == "hi"
    two = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert codec.chat_prompt(two) == "system: be brief\nuser: hi\nassistant:"


@given(
    text=st.text(alphabet="abc ", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), max_size=30),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    finder = StopFinder(stops, keep_stop=False)
    shown, rest, found_early = "", text, False
    for n in [*cuts, len(text)]:
        shown += finder.push(rest[:n])
        rest = rest[n:]
        if finder.found is not None:
            found_early = True
            break
    shown += finder.flush()
    ends = [text.find(s) + len(s) for s in stops if s in text]
    assert found_early == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not any(s in shown for s in stops)
        assert finder.found is not None
        assert text.startswith(shown + finder.found)


def test_a_kept_stop_string_ends_the_text() -> None:
    finder = StopFinder(["END"], keep_stop=True)
    assert finder.push("one E") == "one "
    assert finder.push("ND two") == "END"
    assert finder.push("three") == ""


def test_a_text_is_encoded_with_where_its_tokens_come_from(codec: TextCodec) -> None:
    encoded = codec.encode_fully("hé llo")
    assert encoded.ids == codec.encode("hé llo")
    assert set(encoded.texts) == {0}
    assert set(encoded.segments) == {0}
    assert encoded.offsets[:3] == ((0, 1), (1, 2), (1, 2)), "two bytes of one character"
    assert encoded.places(0) == list(range(7))
    assert encoded.places(1) == []
    pair = codec.encode_fully("ab", "cd")
    assert (pair.ids, pair.texts) == (codec.encode("abcd"), (0, 0, 1, 1))
    assert codec.joined(codec.pieces(pair.ids)) == "abcd"


def test_a_slow_tokenizer_tells_less() -> None:
    class Slow:
        """As the tokenizers of transformers that are written in Python."""

        is_fast = False
        all_special_ids = (0,)

        def __call__(self, text: str, pair: str | None = None, **_: Any) -> dict[str, list[int]]:
            first, second = [1] * len(text), [2] * len(pair or "")
            return {
                "input_ids": [0, *first, 0, *second],
                "special_tokens_mask": [1, *[0] * len(first), 1, *[0] * len(second)],
                "token_type_ids": [0] * (len(first) + 2) + [1] * len(second),
            }

    encoded = TextCodec(Slow(), is_encoder_decoder=False).encode_fully("ab", "c")
    assert encoded.texts == (None, 0, 0, None, 1)
    assert encoded.offsets == ()
    assert encoded.words == (None,) * 5
    assert encoded.shortened(4).ids == (0, 1, 0, 2)


def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own:\n    pass\n")
    asked: list[str] = []

    def consent(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", consent)
    with pytest.raises(ValueError, match="custom code"):
        TextCodec.load(tmp_path, is_encoder_decoder=False)
    assert not asked
    assert not marker.exists()
