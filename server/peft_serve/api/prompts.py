"""From an input to token ids: template, chat template, choices, truncation.

Knows the tokenizer and an adapter's profile; no sampling, no bounds of the context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from peft_serve.adapters.records import Profile
from peft_serve.api.plan import Ask, Style
from peft_serve.errors import InvalidParameter
from peft_serve.text import TextCodec

LONG_TEXT_CHARS: Final = 2048
"""Longer texts are tokenised beside the event loop, which would stand still for a millisecond and more; for shorter
ones the way to another thread and back takes as long as the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How an input is put to the model: the adapter's profile, overridden by the call."""

    template: str | None = None
    choices: Mapping[str, str] | None = None  # label -> words
    truncate: int | None = None
    add_special_tokens: bool = True
    input_name: str = "inputs"  # what the caller's family calls an input

    @classmethod
    def of(cls, profile: Profile, explicit: Mapping[str, Any], style: Style) -> Asking:
        """What is in `explicit` counts, None included: null switches the profile's own off."""
        choices = explicit.get("choices", profile.choices)
        if isinstance(choices, list):
            choices = {label: label for label in choices}
        return cls(
            template=explicit.get("template", profile.template),
            choices=choices or None,
            truncate=explicit.get("truncate"),
            add_special_tokens=style.add_special_tokens,
            input_name=style.name("inputs"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """An input as the model sees it; `labels` are parallel to `choices`."""

    text: str
    ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    labels: tuple[str, ...] = ()


async def make_prompt(
    codec: TextCodec, ask: Ask, asking: Asking, explicit: Mapping[str, Any], chat: str | None = None
) -> Prompt:
    """The prompt of `ask`; `chat` are its messages if they are rendered already.

    Raises BadRequest and InvalidParameter.
    """
    if ask.ids is not None:
        if explicit.get("choices"):
            raise InvalidParameter(
                "choices: a prompt of token ids cannot be continued by words; send text", param="choices"
            )
        # Whoever sends ids has done the adapter's templating already.
        ids = _truncated(ask.ids, asking.truncate)
        return Prompt(text=codec.decode(ids), ids=ids)
    num_chars = len(chat or "") + len(ask.text or "") + sum(len(m.get("content") or "") for m in ask.messages or ())
    if num_chars * (1 + len(asking.choices or ())) > LONG_TEXT_CHARS:
        return await asyncio.to_thread(_tokenised, codec, ask, asking, chat)
    return _tokenised(codec, ask, asking, chat)


def check_known(ids: Sequence[int], vocab_size: int, *, param: str = "prompt") -> None:
    """Raise InvalidParameter for an id beyond the base's embedding: the step it is in would fail for every row."""
    largest = max(ids)
    if largest >= vocab_size:
        raise InvalidParameter(
            f"{param}: token id {largest} is not in the vocabulary of {vocab_size} entries; see POST /tokenize",
            param=param,
        )


def _tokenised(codec: TextCodec, ask: Ask, asking: Asking, chat: str | None) -> Prompt:
    if ask.messages is not None and asking.template is None:
        text = codec.chat_prompt(ask.messages, ask.offered) if chat is None else chat
        ids = codec.encode_chat(text)
    else:
        text = _words(ask)
        if asking.template is not None:
            text = asking.template.replace("{text}", text)
        ids = codec.encode(text, add_special_tokens=asking.add_special_tokens)
    ids = _truncated(ids, asking.truncate)
    if not ids:
        name = asking.input_name
        raise InvalidParameter(f"{name}: the prompt has no tokens; send some text", param=name)
    choices = asking.choices or {}
    return Prompt(
        text=text,
        ids=ids,
        choices=tuple(codec.choice_ids(text, words) for words in choices.values()),
        labels=tuple(choices),
    )


def _words(ask: Ask) -> str:
    """The text that goes into a template: of a chat, what the user said last."""
    if ask.messages is None:
        return ask.text or ""
    said = [str(m.get("content") or "") for m in ask.messages if m.get("role") == "user"]
    if not said:
        raise InvalidParameter("messages: no message of role user to put into the adapter's template", param="messages")
    return said[-1]


def _truncated(ids: tuple[int, ...], truncate: int | None) -> tuple[int, ...]:
    return ids if truncate is None else ids[-truncate:]
