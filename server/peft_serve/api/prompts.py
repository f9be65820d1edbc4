"""From an input to token ids: template, chat template, choices, truncation.

Knows the tokenizer and an adapter's profile; no sampling. Of the bounds of the context it knows one, the most tokens
that any prompt may have: a text that cannot be so few is refused before it is tokenised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from peft_serve.adapters.records import Profile
from peft_serve.api.plan import Ask, Call, Style
from peft_serve.api.text_threads import GIANT_CHARS, TextThreads
from peft_serve.continuations import Continuations
from peft_serve.errors import InvalidParameter, PromptTooLong
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
    truncate_name: str = "truncate"
    max_tokens: int  # no prompt of more can fit

    @classmethod
    def of(cls, profile: Profile, explicit: Mapping[str, Any], style: Style, *, max_tokens: int) -> Asking:
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
            truncate_name=style.name("truncate"),
            max_tokens=max_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """An input as the model sees it; `labels` are parallel to `choices`."""

    text: str
    ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    labels: tuple[str, ...] = ()


async def make_prompt(
    codec: TextCodec, ask: Ask, asking: Asking, call: Call, chat: str | None = None, *, threads: TextThreads
) -> Prompt:
    """The prompt of `ask`, one of `call`; `chat` are its messages if they are rendered already.

    Raises BadRequest, InvalidParameter, PromptTooLong and QueueFull.
    """
    if ask.ids is not None:
        return await _of_ids(codec, ask.ids, asking, call, threads)
    words = tuple((asking.choices or {}).values())
    num_chars = len(asking.template or "") + _size((chat, ask.text, ask.messages, ask.offered))
    if num_chars * (1 + len(words)) + _size(words) <= LONG_TEXT_CHARS:
        prompt = _tokenised(codec, ask, asking, chat)
        return _with_choices(prompt, asking, _continued(codec.continuations(prompt.text), words) if words else [])
    prompt = await threads.run(call.tenant, num_chars, _tokenised, codec, ask, asking, chat)
    ids: list[tuple[int, ...]] = []
    if words:
        behind = await threads.run(call.tenant, num_chars, codec.continuations, prompt.text)
        for lot, size in _lots(words, behind.num_chars):
            ids += await threads.run(call.tenant, size, _continued, behind, lot)
    return _with_choices(prompt, asking, ids)


async def _of_ids(codec: TextCodec, ids: tuple[int, ...], asking: Asking, call: Call, threads: TextThreads) -> Prompt:
    """The prompt of token ids. Whoever sends them has done the adapter's templating already."""
    if call.explicit.get("choices"):
        raise InvalidParameter(
            "choices: a prompt of token ids cannot be continued by words; send text", param="choices"
        )
    ids = _truncated(ids, asking.truncate)
    _check_fits(len(ids), asking)
    if len(ids) <= LONG_TEXT_CHARS:
        return Prompt(text=codec.decode(ids), ids=ids)
    return Prompt(text=await threads.run(call.tenant, len(ids), codec.decode, ids), ids=ids)


def _size(value: Any) -> int:
    """Characters of all the strings in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(name) + _size(each) for name, each in value.items())
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 1


def _lots(words: Sequence[str], num_chars: int) -> Iterator[tuple[list[str], int]]:
    """Words that are tokenised in one go, behind `num_chars` each, and how much that is: no giant but for one word."""
    lot, size = list[str](), 0
    for word in words:
        more = num_chars + len(word)
        if lot and size + more > GIANT_CHARS:
            yield lot, size
            lot, size = [], 0
        lot.append(word)
        size += more
    yield lot, size


def _continued(behind: Continuations, words: Sequence[str]) -> list[tuple[int, ...]]:
    return [behind.ids(word) for word in words]


def _with_choices(prompt: Prompt, asking: Asking, ids: Sequence[tuple[int, ...]]) -> Prompt:
    return replace(prompt, choices=tuple(ids), labels=tuple(asking.choices or ()))


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
        _check_length(codec, text, asking)
        ids = codec.encode_chat(text)
    else:
        text = _words(ask)
        if asking.template is not None:
            text = asking.template.replace("{text}", text)
        _check_length(codec, text, asking)
        ids = codec.encode(text, add_special_tokens=asking.add_special_tokens)
    ids = _truncated(ids, asking.truncate)
    if not ids:
        name = asking.input_name
        raise InvalidParameter(f"{name}: the prompt has no tokens; send some text", param=name)
    if asking.choices:  # of no use behind a prompt that does not fit
        _check_fits(len(ids), asking)
    return Prompt(text=text, ids=ids)


def _check_length(codec: TextCodec, text: str, asking: Asking) -> None:
    """Raise PromptTooLong for what cannot fit; of a prompt that is cut only the end has to."""
    if asking.truncate is None:
        _check_fits(codec.fewest_tokens(text), asking)


def _check_fits(fewest: int, asking: Asking) -> None:
    way_out = f"Shorten the prompt (or set {asking.truncate_name})"
    check_room(fewest, asking.max_tokens, param=asking.input_name, way_out=way_out)


def check_room(fewest: int, max_tokens: int, *, param: str, way_out: str) -> None:
    """Raise PromptTooLong for a text of no fewer than `fewest` tokens that has too many then."""
    if fewest > max_tokens:
        raise PromptTooLong(
            f"This model's maximum context length is {max_tokens} tokens. However, you requested at least {fewest} "
            f"tokens in the prompt. {way_out}.",
            param=param,
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
