"""Text to token ids and back: prompts, choices, chat, incremental decoding, stop strings.

Owns the base's tokenizer. Knows nothing of adapters, requests or the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peft_serve.errors import BadRequest

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class TextCodec:
    """The base's tokenizer, asked the few questions a server has.

    Not for use from several threads at once with different options: fast tokenizers keep their truncation state.
    None of the methods here changes it.
    """

    def __init__(self, tokenizer: Any, *, is_encoder_decoder: bool) -> None:
        self._tokenizer = tokenizer
        self._is_encoder_decoder = is_encoder_decoder
        self._special_ids = frozenset(int(i) for i in tokenizer.all_special_ids)

    @classmethod
    def load(cls, source: str | Path, *, is_encoder_decoder: bool) -> TextCodec:
        """The tokenizer of a model folder or hub id."""
        return cls(AutoTokenizer.from_pretrained(source), is_encoder_decoder=is_encoder_decoder)

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Ids of `text`, with the tokenizer's own special tokens around it unless told otherwise."""
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return tuple(int(i) for i in ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token: int) -> str:
        """How one token reads on its own, special tokens spelled out."""
        return self.decode([token], skip_special_tokens=False)

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def choice_ids(self, prompt: str, choice: str) -> tuple[int, ...]:
        """Ids by which `choice` continues `prompt`.

        On a decoder-only base the words are parted by a space unless the prompt ends in white space, and
        tokenised together with the prompt, so that the ids are those the model would have to produce. On an
        encoder-decoder base the choice is the whole answer. No end-of-sequence id is added.
        """
        if self._is_encoder_decoder:
            ids = self.encode(choice, add_special_tokens=False)
        else:
            glue = "" if not prompt or prompt[-1].isspace() else " "
            before = self.encode(prompt)
            # A tokenizer that ends its prompts with a special token (a few add one) must not end the choice's so.
            whole = self.encode(prompt + glue + choice)
            while before and whole and before[-1] == whole[-1] and before[-1] in self._special_ids:
                before, whole = before[:-1], whole[:-1]
            same = whole[: len(before)] == before
            ids = whole[len(before) :] if same else self.encode(choice, add_special_tokens=False)
        if not ids:
            raise BadRequest(f"choices: {choice!r} has no tokens; give a word the tokenizer knows", param="choices")
        return ids

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages rendered by the base's chat template, or, for a base without one, a plain transcript."""
        if self.has_chat_template:
            try:
                rendered = self._tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
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


class Detokenizer:
    """Turns ids into text as they come, never showing half a character.

    Some tokenizers decode a token differently at the start of a text (a leading space is dropped), so each piece
    is read as the difference between two decodings that share a few ids of context.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(context)
        self._start = 0
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(known) or text.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def flush(self) -> str:
        """What is left at the end, an incomplete character included."""
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]


class StopFinder:
    """Finds stop strings in text that comes in pieces, holding back what may become one."""

    def __init__(self, stops: Sequence[str], *, keep_stop: bool) -> None:
        self._stops = tuple(s for s in stops if s)
        self._keep_stop = keep_stop
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is safe to show now. After a stop string was found, nothing more is."""
        if self.found is not None:
            return ""
        self._held += piece
        hits = [(self._held.find(s), s) for s in self._stops if s in self._held]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            shown = self._held[: at + (len(self.found) if self._keep_stop else 0)]
            self._held = ""
            return shown
        keep = self._num_possible()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        shown, self._held = self._held, ""
        return shown if self.found is None else ""

    def _num_possible(self) -> int:
        longest = max((len(s) for s in self._stops), default=0)
        for n in range(min(longest - 1, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stops):
                return n
        return 0
