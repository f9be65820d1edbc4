"""Where the end of a text is tokenised alone: the ids of choices are those that the whole text gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peft_serve.api.plan import Ask, Call
from peft_serve.api.prompts import Asking, make_prompt
from peft_serve.api.text_threads import TextThreads
from peft_serve.continuations import Continuations
from peft_serve.errors import BadRequest, PromptTooLong
from peft_serve.seams import _PATTERNS, Seams
from peft_serve.text import TextCodec
from tests.conftest import REPOSITORY, make_tiny_tokenizer

SPOKEN = [
    "the cat isn't on the mat, the cats are in the hat",
    "Label : yes no maybe Answer: it's a DOG 's t he",
    "ab a b ab ba a b 12 123 1 2 3 \n\n and  more   spaces \u4e2d\u6587 e\u0301t\u00e9",
]
PARTS = ["a", "b", "th", "e", "x", "T", "'s", "'", " ", "  ", " a", "b ", "\n", "1", "12", ":", ",", "\u4e2d", "\u0301"]
PARTS += ["\u00e9", "\ufb01", "\u2581", "\u0120", "</s>", "<m>", "word", "\x00", "\u00a0", "\t", "-", "\U0001f642"]
CHOICES = ["yes", "no", "s", "'s", " a", "the hat", "</s>", "\u0301", "\n", "1", "\u4e2d\u6587", "<m>", "word"]
LLAMA_2 = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]


def wrapped(tokenizer: Tokenizer, **names: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def taught(model: Any, trainer: Any, *, words: Any = None, normalizer: Any = None, **names: str) -> Any:
    """A tokenizer that has learned `SPOKEN`."""
    made = Tokenizer(model)
    if words is not None:
        made.pre_tokenizer = words
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(SPOKEN * 3, trainer)
    return wrapped(made, **names)


def byte_level(words: Any = None, normalizer: Any = None) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    words = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return taught(models.BPE(), trainer, words=words, normalizer=normalizer, eos_token="</s>")


def of_pattern(pattern: str, *, is_inverted: bool = False) -> Any:
    behaviour = "removed" if is_inverted else "isolated"
    split = pre_tokenizers.Split(Regex(pattern), behavior=behaviour, invert=is_inverted)
    return byte_level(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )


def one_word(words: Any, normalizer: Any, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """As Llama 2 and Gemma: a text is one word of a byte-pair model, or may be."""
    merges = (("t", "h"), ("\u2581", "th"), ("\u2581th", "e"), ("\u2581", "\u2581"), ("\u2581", "a"), *merges)
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "\u2581"]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Tokenizer(model)
    if words is not None:
        made.pre_tokenizer = words
    if normalizer is not None:
        made.normalizer = normalizer
    return wrapped(made, unk_token="<unk>", eos_token="</s>")


def word_piece() -> Any:
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    words, normalizer = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    return taught(models.WordPiece(unk_token="[UNK]"), trainer, words=words, normalizer=normalizer, unk_token="[UNK]")


def unigram(words: Any) -> Any:
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return taught(models.Unigram(), trainer, words=words, unk_token="<unk>")


def with_token(text: str, **traits: Any) -> Any:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(text, **traits)])
    return tokenizer


def ending(token: str) -> Any:
    """Puts a token behind every text."""
    tokenizer = byte_level()
    place = tokenizer.convert_tokens_to_ids(token)
    template = processors.TemplateProcessing(single=f"$A {token}", special_tokens=[(token, place)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def sequence(*words: Any) -> Any:
    return pre_tokenizers.Sequence(list(words))


SEAMED: dict[str, Callable[[], Any]] = {
    "tiny": make_tiny_tokenizer,
    "gpt-2": byte_level,
    "nfc": lambda: byte_level(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "prefix space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "digits": lambda: byte_level(
        sequence(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))
    ),
    **{f"pattern {i}": lambda pattern=pattern: of_pattern(pattern) for i, pattern in enumerate(sorted(_PATTERNS))},
    "inverted": lambda: of_pattern(sorted(_PATTERNS)[0], is_inverted=True),
    "llama 2": lambda: one_word(None, normalizers.Sequence(LLAMA_2)),
    "one word": lambda: one_word(pre_tokenizers.Metaspace(split=False, prepend_scheme="first"), None),
    "gemma": lambda: one_word(
        pre_tokenizers.Split(" ", behavior="merged_with_previous"), normalizers.Replace(" ", "\u2581")
    ),
    "metaspace": lambda: unigram(pre_tokenizers.Metaspace()),
    "spaces": lambda: unigram(pre_tokenizers.Split(" ", behavior="merged_with_next")),
    "bert": word_piece,
    "left": lambda: with_token("<m>", lstrip=True),
    "left of a word": lambda: with_token("word", lstrip=True, normalized=False),
    "end": lambda: ending("</s>"),
}
SEAMLESS: dict[str, Callable[[], Any]] = {
    "a space at a word's end": lambda: byte_level(
        sequence(
            pre_tokenizers.Split(" ", behavior="merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        )
    ),
    "lots of four": lambda: byte_level(pre_tokenizers.Split(Regex(".{1,4}"), behavior="isolated")),
    "looks to the left": lambda: byte_level(pre_tokenizers.Split(Regex("(?<=a b)."), behavior="isolated")),
    "stripped": lambda: byte_level(normalizer=normalizers.Strip()),
    "a merge over a space": lambda: one_word(None, normalizers.Sequence(LLAMA_2), (("e", "\u2581"),)),
    "one word of bytes": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "right": lambda: with_token("word", rstrip=True),
    "words of their own": lambda: with_token(" b", single_word=True),
    "a token over a space": lambda: with_token("a b"),
    "an end that is a word": lambda: ending("a"),
}
CODECS = {name: TextCodec(make(), is_encoder_decoder=False) for name, make in (SEAMED | SEAMLESS).items()}


def whole(codec: TextCodec, prompt: str, words: str) -> tuple[int, ...]:
    """The ids of the words with the whole prompt before them."""
    made = Continuations(prompt, codec._encode_text, special_ids=codec._special_ids, seams=None)
    assert made.num_chars == len(prompt)
    return ids_of(made, words)


def ids_of(made: Continuations, words: str) -> tuple[int, ...]:
    try:
        return made.ids(words)
    except BadRequest:
        return ()


def apart(codec: TextCodec, text: str, end: str) -> list[int]:
    """The ids of a text without those of its end, which is told to have the same alone."""
    ids, last = codec._encode_text(text, False), codec._encode_text(end, False)
    assert ids[len(ids) - len(last) :] == last, (text, end)
    return ids[: len(ids) - len(last)]


@pytest.mark.parametrize("name", CODECS)
def test_a_choice_has_the_ids_that_the_whole_text_gives_it(name: str) -> None:
    codec = CODECS[name]

    @given(
        parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12),
        seam=st.sampled_from(["a b", "e t", "word word", "x th", "the a", "ab a b"]),
        end=st.lists(st.sampled_from(PARTS), max_size=3),
        words=st.sampled_from(CHOICES) | st.text(min_size=1, max_size=4),
    )
    @example(parts=["the cat"], seam="a b", end=[], words="yes")
    @example(parts=["</s>"], seam="a b", end=["</s>"], words="</s>")
    @example(parts=["</s>"], seam="word word", end=["</s>"], words="word</s>")
    @example(parts=[], seam="a b", end=[":", " "], words="the")
    @settings(max_examples=60, deadline=None)
    def holds(parts: list[str], seam: str, end: list[str], words: str) -> None:
        prompt = "".join((*parts, seam, *end)).encode("utf-8", "ignore").decode()
        words = words.encode("utf-8", "ignore").decode() or "a"
        assert ids_of(codec.continuations(prompt), words) == whole(codec, prompt, words)
        end_alone = None if codec._seams is None else codec._seams.end_of(prompt)
        if end_alone is not None:
            assert apart(codec, prompt, end_alone) == apart(codec, prompt + words, end_alone + words)

    holds()


@pytest.mark.parametrize("name", CODECS)
def test_a_prompt_is_cut_where_that_is_sound(name: str) -> None:
    prompt = "the cat " * 500 + "Label:"
    behind = CODECS[name].continuations(prompt)
    assert behind.num_chars == (len(prompt) if name in SEAMLESS else len(prompt.split(" ")[-1]) + (name != "llama 2"))


def test_a_seam_is_looked_for_at_the_end_only() -> None:
    seams = CODECS["tiny"]._seams
    assert isinstance(seams, Seams)
    assert seams.end_of("a b" + ":" * 4000) == " b" + ":" * 4000
    assert seams.end_of("a b" + ":" * 5000) is None
    assert seams.end_of("") is None


def test_a_tokenizer_of_the_demo_base_has_seams() -> None:
    file = REPOSITORY / "server/peft_serve/demo/demo-llama/tokenizer.json"
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_file=str(file)), is_encoder_decoder=False)
    assert codec.continuations("Tweet text : x Label :").num_chars < 10


class Counting:
    """A codec's tokenizer, and every text that it was given."""

    def __init__(self, codec: TextCodec) -> None:
        self.texts: list[str] = []
        self._encode = codec._encode_text
        codec._encode_text = self

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        self.texts.append(text)
        return self._encode(text, add_special_tokens)


@pytest.fixture
def threads() -> TextThreads:
    return TextThreads(max_waiting=4)


@pytest.mark.parametrize("num_words", [20, 600])
async def test_a_prompt_is_tokenised_once_however_many_choices(threads: TextThreads, num_words: int) -> None:
    codec = TextCodec(make_tiny_tokenizer(), is_encoder_decoder=False)
    counting = Counting(codec)
    text, choices = "BEGIN " + "the cat " * num_words + "Label:", {str(i): f"choice {i}" for i in range(64)}
    ask, call = Ask(text=text), Call(asks=(), explicit={})
    prompt = await make_prompt(codec, ask, Asking(choices=choices, max_tokens=10**6), call, threads=threads)
    assert sum(given.startswith("BEGIN") for given in counting.texts) == 1
    assert len(counting.texts) <= 2 + 64
    assert prompt.labels == tuple(choices)
    assert prompt.choices == tuple(whole(codec, text, words) for words in choices.values())


async def test_choices_behind_a_prompt_that_does_not_fit_are_not_tokenised(threads: TextThreads) -> None:
    codec = TextCodec(byte_level(normalizer=normalizers.StripAccents()), is_encoder_decoder=False)
    counting = Counting(codec)
    asking = Asking(choices={"a": "a", "b": "b"}, max_tokens=10)
    with pytest.raises(PromptTooLong, match="at least"):
        await make_prompt(codec, Ask(text="x" * 50), asking, Call(asks=(), explicit={}), threads=threads)
    assert counting.texts == ["x" * 50]


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": {"a": "word " * 4000}},
        {"template": "word " * 4000 + "{text}"},
        {"messages": ({"role": "user", "content": "x", "tool_calls": [{"arguments": "word " * 4000}]},)},
    ],
)
async def test_what_is_long_in_any_part_goes_to_the_threads(changes: dict[str, Any]) -> None:
    codec = TextCodec(make_tiny_tokenizer(), is_encoder_decoder=False)
    sizes: list[int] = []

    class Noting(TextThreads):
        async def run(self, tenant: str, num_chars: int, work: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(num_chars)
            return await super().run(tenant, num_chars, work, *args, **kwargs)

    asking = Asking(max_tokens=10**6)
    ask = Ask(text="x", messages=changes.pop("messages", None))
    noting = Noting(max_waiting=4)
    await make_prompt(codec, ask, replace(asking, **changes), Call(asks=(), explicit={}), threads=noting)
    assert max(sizes) > 16_000
