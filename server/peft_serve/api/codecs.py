"""The codec of a request: the base's, or one that speaks an adapter's own tokens and chat template.

Owns the codecs of the adapters that were asked last.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from peft_serve.adapters.once_each import OnceEach
from peft_serve.adapters.records import Resolved
from peft_serve.api.served import Served
from peft_serve.core import AdapterId
from peft_serve.engine.parts import ServerParts
from peft_serve.errors import BadRequest, InvalidParameter
from peft_serve.rendering.templates import TemplateError
from peft_serve.text import TextCodec

MAX_CODECS: Final = 16
"""A codec with added tokens is a copy of the base's tokenizer, which may take some tens of megabytes."""


class Codecs:
    """See the module's docstring. Thread-safe; an adapter's codec is made once, by whoever asks first."""

    def __init__(self, parts: ServerParts, *, max_codecs: int = MAX_CODECS) -> None:
        self._base = parts.codec
        self._vocab_size = parts.base.vocab_size
        self._templates = parts.templates
        self._max_codecs = max_codecs
        self._codecs: OnceEach[AdapterId, TextCodec] = OnceEach()
        self._recent: OrderedDict[AdapterId, None] = OrderedDict()
        self._lock = threading.Lock()

    async def of(self, served: Served) -> TextCodec:
        """The codec for what `served` is asked and answers.

        Raises AdapterInvalid for an adapter whose tokens do not fit the base, and InvalidParameter for a combination
        of adapters that bring different words.
        """
        own: list[tuple[Resolved, TextCodec]] = []
        for part in served.parts:
            codec = await self._of(part.resolved) if part.resolved.vocabulary else self._base
            if codec is not self._base:
                own.append((part.resolved, codec))
        if any(resolved.vocabulary != own[0][0].vocabulary for resolved, _ in own):
            raise InvalidParameter(
                f"adapter: {' and '.join(resolved.name for resolved, _ in own)} bring different added tokens or chat "
                "templates, and a text is read in one way; combine at most one of them",
                param="adapter",
            )
        return own[0][1] if own else self._base

    async def chat_prompt(
        self,
        codec: TextCodec,
        messages: Sequence[Mapping[str, Any]],
        name: str,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str | None:
        """Messages in the words of an adapter's own template, `name` being its name; None: it has none.

        Raises BadRequest for what the template refuses or does not get done, QueueFull and Unavailable.
        """
        if codec.own_template is None or self._templates is None:
            return None
        try:
            return await self._templates.rendered(codec.own_template, messages, codec.template_words, tools)
        except TemplateError as error:
            raise BadRequest(
                f"messages: the chat template of adapter '{name}' refuses them: {error.message}", param="messages"
            ) from error

    async def _of(self, resolved: Resolved) -> TextCodec:
        found = self._codecs.peek(resolved.id)
        if found is None:
            found = await asyncio.to_thread(self._codecs.get, resolved.id, lambda: self._made(resolved))
        self._note(resolved.id)
        return found

    def _made(self, resolved: Resolved) -> TextCodec:
        return self._base.speaking(
            resolved.vocabulary, vocab_size=self._vocab_size, with_template=self._templates is not None
        )

    def _note(self, adapter: AdapterId) -> None:
        """Asked for now; who was asked for longest ago is forgotten."""
        with self._lock:
            self._recent[adapter] = None
            self._recent.move_to_end(adapter)
            while len(self._recent) > self._max_codecs:
                oldest, _ = self._recent.popitem(last=False)
                self._codecs.drop(oldest)
