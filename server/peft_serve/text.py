"""Text to token ids and back: prompts, choices, chat.

Owns the base's tokenizer, and copies of it that know an adapter's added tokens as well. Knows nothing of adapters
but their vocabulary, and nothing of requests or the model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer

from peft_serve.adapters.verdict import Verdict, quoted
from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.continuations import Continuations
from peft_serve.detokenizing import Detokenizer
from peft_serve.errors import BadRequest
from peft_serve.fast_tokenizer import decoder_of, encoder_of
from peft_serve.fewest_tokens import FewestTokens
from peft_serve.seams import Seams


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One text, or a pair of them, as ids with what is known of each. All tuples are parallel to `ids`."""

    ids: tuple[int, ...]
    segments: tuple[int, ...]  # token types
    texts: tuple[int | None, ...]  # which of the texts a token is of, 0 or 1; None: a special token
    words: tuple[int | None, ...]  # which word of its text, if the tokenizer tells
    offsets: tuple[tuple[int, int], ...]  # characters of its text [start, stop); empty if the tokenizer cannot tell

    def places(self, text: int) -> list[int]:
        """The places of a text's tokens."""
        return [i for i, of in enumerate(self.texts) if of == text]

    def shortened(self, length: int) -> Encoded:
        """At most `length` tokens: the longer text loses its last ones, special tokens stay.

        As tokenizers' `longest_first` does it.
        """
        first, second = self.places(0), self.places(1)
        room = max(0, length - self.texts.count(None))
        if len(first) + len(second) <= room:
            return self
        short = min(len(first), len(second))
        if 2 * short > room:
            short = room // 2
        kept = (room - short, short) if len(first) > len(second) else (short, room - short)
        left = {*first[: kept[0]], *second[: kept[1]]}
        return self._of([i for i, of in enumerate(self.texts) if of is None or i in left])

    def _of(self, places: Sequence[int]) -> Encoded:
        return replace(
            self,
            ids=tuple(self.ids[i] for i in places),
            segments=tuple(self.segments[i] for i in places),
            texts=tuple(self.texts[i] for i in places),
            words=tuple(self.words[i] for i in places),
            offsets=tuple(self.offsets[i] for i in places) if self.offsets else (),
        )


class TextCodec:
    """A tokenizer, the base's or one that an adapter extends, asked the few questions a server has.

    Not for use from several threads at once with different options: fast tokenizers keep their truncation state.
    None of the methods here changes it.
    """

    def __init__(self, tokenizer: Any, *, is_encoder_decoder: bool) -> None:
        self._tokenizer = tokenizer
        self._is_encoder_decoder = is_encoder_decoder
        self._special_ids = frozenset(int(i) for i in tokenizer.all_special_ids)
        self._own_special: frozenset[int] = frozenset()
        self.own_eos_ids: frozenset[int] = frozenset()  # what ends an answer besides the base's own
        self.own_template: str | None = None  # a stranger's: it is for `rendering` to run, never for this class
        self._words: Mapping[str, str] = {}
        self._encode_text = encoder_of(tokenizer)
        self._decode_ids = decoder_of(tokenizer)
        self._fewest = FewestTokens.of(tokenizer)
        self._seams = None if is_encoder_decoder else Seams.of(tokenizer)

    @classmethod
    def load(cls, source: str | Path, *, is_encoder_decoder: bool, revision: str | None = None) -> TextCodec:
        """The tokenizer of a model folder or hub id, of which `revision` is a branch, a tag or a commit.

        ValueError where it needs code of its own: that is never run. Unless told so, transformers asks whoever sits
        at the terminal.
        """
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
        return cls(tokenizer, is_encoder_decoder=is_encoder_decoder)

    def speaking(self, vocabulary: Vocabulary, *, vocab_size: int, with_template: bool) -> TextCodec:
        """A codec that knows an adapter's own tokens as well, and its chat template if that is wanted.

        This one itself when the adapter brings nothing that the base does not have. `vocab_size` counts the rows of
        the base's embedding. Raises AdapterInvalid, token by token, for what cannot stand beside the base's own.
        """
        new = _new_tokens(self._tokenizer, vocabulary, vocab_size)
        has_template = with_template and self.has_news_in_template(vocabulary)
        if not new and not has_template:
            return self
        tokenizer = _extended(self._tokenizer, vocabulary, new) if new else self._tokenizer
        codec = TextCodec(tokenizer, is_encoder_decoder=self._is_encoder_decoder)
        codec._own_special = frozenset(vocabulary.added[text] for text in new if text in vocabulary.special)
        eos = vocabulary.names.get("eos_token")
        codec.own_eos_ids = frozenset({vocabulary.added[eos]} if eos in new else ())
        codec.own_template = vocabulary.chat_template if has_template else None
        codec._words = vocabulary.names
        return codec

    def has_news_in_template(self, vocabulary: Vocabulary) -> bool:
        """Whether the chat template is another than the base's."""
        return vocabulary.chat_template not in (None, getattr(self._tokenizer, "chat_template", None))

    def fingerprint(self) -> str:
        """A digest of what an adapter's words are compared with: the tokens and the chat template."""
        known = sorted(self._tokenizer.get_vocab().items())
        seen = repr((known, getattr(self._tokenizer, "chat_template", None)))
        return hashlib.sha256(seen.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def template_words(self) -> dict[str, str]:
        """The special tokens by the names that chat templates know, the adapter's before the base's."""
        return {**self._tokenizer.special_tokens_map, **self._words}

    @property
    def is_encoder_decoder(self) -> bool:
        return self._is_encoder_decoder

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text."""
        return self._special_ids | self._own_special

    def description(self) -> str | None:
        """The whole tokenizer in the JSON of the `tokenizers` library; None for one written in Python."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else str(backend.to_str())

    @property
    def has_chat_template(self) -> bool:
        return self.own_template is not None or bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Ids of `text`, with the tokenizer's own special tokens around it unless told otherwise."""
        return tuple(self._encode_text(text, add_special_tokens))

    def fewest_tokens(self, text: str) -> int:
        """No fewer tokens than this has `text`, told without tokenising it; 0 where nothing can be told."""
        return 0 if self._fewest is None else self._fewest.in_text(text)

    def encode_fully(self, text: str, pair: str | None = None) -> Encoded:
        """A text, or two as the tokenizer joins them, with its special tokens and where each token comes from."""
        is_fast = bool(self._tokenizer.is_fast)
        found = self._tokenizer(
            text, pair, return_special_tokens_mask=True, return_offsets_mapping=is_fast, verbose=False
        )
        ids, special = [int(i) for i in found["input_ids"]], [bool(i) for i in found["special_tokens_mask"]]
        segments = found.get("token_type_ids") or [0] * len(ids)
        texts: list[int | None]
        if is_fast:
            texts = [None if special[i] else of for i, of in enumerate(found.sequence_ids(0))]
        else:  # the second text is of another type where the base knows types at all
            texts = [None if special[i] else int(segments[i]) for i in range(len(ids))]
        return Encoded(
            ids=tuple(ids),
            segments=tuple(int(i) for i in segments),
            texts=tuple(texts),
            words=tuple(found.word_ids(0)) if is_fast else (None,) * len(ids),
            offsets=tuple((int(start), int(stop)) for start, stop in found["offset_mapping"]) if is_fast else (),
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """How the tokenizer itself spells its tokens (`##ing`, `\u0120the`)."""
        return [str(piece) for piece in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def joined(self, pieces: Sequence[str]) -> str:
        """Pieces that stand side by side, as text."""
        return str(self._tokenizer.convert_tokens_to_string(list(pieces)))

    @property
    def cls_id(self) -> int | None:
        """The id of the token that stands for the whole sequence, in BERT's relatives."""
        return getattr(self._tokenizer, "cls_token_id", None)

    @property
    def unknown_id(self) -> int | None:
        return getattr(self._tokenizer, "unk_token_id", None)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if skip_special_tokens and self._own_special:  # tokenizers written in Python leave out only what has a name
            ids = [i for i in ids if i not in self._own_special]
        return self._decode_ids(list(ids), skip_special_tokens)

    def token_text(self, token: int) -> str:
        """How one token reads on its own, special tokens spelled out."""
        return self.decode([token], skip_special_tokens=False)

    def is_special(self, token: int) -> bool:
        return token in self._special_ids or token in self._own_special

    def continuations(self, prompt: str) -> Continuations:
        """What tells the ids by which words continue `prompt`; on an encoder-decoder base they stand alone."""
        alone = self._is_encoder_decoder
        return Continuations(
            None if alone else prompt, self._encode_text, special_ids=self._special_ids, seams=self._seams
        )

    @property
    def chat_template(self) -> str | None:
        """The template that chats are put by, an adapter's own or the base's."""
        template = self.own_template or getattr(self._tokenizer, "chat_template", None)
        return template if isinstance(template, str) else None

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Messages rendered by the base's chat template, or, for a base without one, a plain transcript.

        `tools` are what the model may call, in OpenAI's words; a transcript cannot tell of them.
        """
        assert self.own_template is None, "a stranger's template is rendered elsewhere"
        if self.has_chat_template:
            try:
                rendered = self._tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tools=[*tools] or None, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # jinja raises whatever the template's author chose
                raise BadRequest(f"messages: the chat template refuses them: {error}", param="messages") from error
            return str(rendered)
        if len(messages) == 1:
            return str(messages[0].get("content") or "")
        lines = [f"{m.get('role')}: {m.get('content') or ''}" for m in messages]
        return "\n".join([*lines, "assistant:"])

    def encode_chat(self, prompt: str) -> tuple[int, ...]:
        """Ids of a rendered chat: a template writes its own special tokens, a plain transcript does not."""
        return self.encode(prompt, add_special_tokens=not self.has_chat_template)

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """A decoder of the tokens that follow `prompt_ids` (of the decoder; none matter to an encoder-decoder)."""
        context = () if self._is_encoder_decoder else tuple(prompt_ids)[-6:]
        return Detokenizer(self.decode, context)


def _new_tokens(tokenizer: Any, vocabulary: Vocabulary, vocab_size: int) -> list[str]:
    """The added tokens that the tokenizer does not have, in the order of their ids; raises AdapterInvalid."""
    if not vocabulary.added and vocabulary.foundation is None:
        return []
    known: Mapping[str, int] = tokenizer.get_vocab()
    if vocabulary.foundation is not None:
        vocabulary.foundation.check(known)
    wanted = set(vocabulary.added.values())
    holders = {number: text for text, number in known.items() if number in wanted}
    new = sorted((text for text in vocabulary.added if text not in known), key=vocabulary.added.__getitem__)
    verdict, place = Verdict(), {text: vocabulary.place_of(text) for text in vocabulary.added}
    for text, number in vocabulary.added.items():
        if known.get(text, number) != number:
            reason = f"has the id {number}, and the base's tokenizer has it as {known[text]}"
            verdict.refuse(place[text], f"{reason}; train with the base's own tokenizer, and add to it only")
    following = max(known.values(), default=-1) + 1
    for i, text in enumerate(new):
        number = vocabulary.added[text]
        if number in holders:
            reason = f"has the id {number}, which is {quoted(holders[number])} in the base's tokenizer"
            verdict.refuse(place[text], f"{reason}; train with the base's own tokenizer, and add to it only")
        elif number >= vocab_size:
            reason = f"has the id {number}, and the base's embedding has {vocab_size} rows"
            verdict.refuse(place[text], f"{reason}; resize the base and serve the resized one")
        elif number != following + i:
            reason = f"has the id {number} where {following + i} is due"
            verdict.refuse(place[text], f"{reason}: added tokens follow the base tokenizer's directly, without a gap")
    verdict.settle()
    return new


def _extended(tokenizer: Any, vocabulary: Vocabulary, new: Sequence[str]) -> Any:
    """A copy of the tokenizer with new tokens, in the order of their ids; raises AdapterInvalid."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([_token(text, vocabulary) for text in new])
    verdict = Verdict()
    for text, number in zip(new, own.convert_tokens_to_ids(list(new)), strict=True):
        if number != vocabulary.added[text]:
            reason = f"has the id {vocabulary.added[text]}; the base's tokenizer can add it as {number} only"
            verdict.refuse(vocabulary.place_of(text), f"{reason}; train with the base's own tokenizer")
    verdict.settle()
    return own


def _token(text: str, vocabulary: Vocabulary) -> Any:
    flags = dict.fromkeys(vocabulary.traits.get(text, ()), True)
    return AddedToken(text, **{"normalized": False, "special": text in vocabulary.special, **flags})
