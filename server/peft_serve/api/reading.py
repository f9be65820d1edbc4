"""From one input to the engine's request that reads one pass over it: a task head's logits, or an embedding.

Which head reads is decided here: the adapter's, else the base's own. An adapter with neither may have choices, and
then the choices are scored. Knows no queue and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from peft_serve.adapters.records import HeadFacts, Profile
from peft_serve.api.abilities import READINGS, NothingToClassify, check_reads, generates, labels_of, reads
from peft_serve.api.codecs import Codecs
from peft_serve.api.generating import GenerationPlans
from peft_serve.api.plan import Ask, Call, Plan, Purpose
from peft_serve.api.prompts import LONG_TEXT_CHARS, check_known, check_room
from peft_serve.api.served import Served
from peft_serve.api.text_threads import TextThreads
from peft_serve.core import Reading, Request, RequestId
from peft_serve.engine.parts import ServerParts
from peft_serve.errors import InvalidParameter, PromptTooLong
from peft_serve.text import Encoded, TextCodec

_CHOICE_PARAMETERS: Final = ("template", "choices", "task_id")
"""What of a call's parameters concerns the scoring of choices."""


class ReadingPlans:
    """See the module's docstring. Choices are `generating`'s business."""

    def __init__(
        self,
        parts: ServerParts,
        codecs: Codecs,
        generating: GenerationPlans,
        threads: TextThreads,
        *,
        new_id: Callable[[], RequestId],
        hold: Callable[[Served], Callable[[], None]],
    ) -> None:
        self._parts = parts
        self._codecs = codecs
        self._generating = generating
        self._threads = threads
        self._new_id = new_id
        self._hold = hold

    async def make(self, call: Call, ask: Ask, served: Served) -> list[Plan]:
        """The plan of the one answer, with a hold of the adapter."""
        if call.purpose is Purpose.EMBED:
            check_reads(self._parts.base)
            return [await self._plan(call, ask, served, None)]
        head = (served.head or self._parts.base.head) if reads(self._parts.base) else None
        if head is None:
            return await self._scored(call, ask, served)
        if call.explicit.get("choices"):
            raise InvalidParameter(
                "choices: a task head answers here, with labels of its own; leave choices out", param="choices"
            )
        _check_shape(ask, head)
        return [await self._plan(call, ask, served, head)]

    async def _scored(self, call: Call, ask: Ask, served: Served) -> list[Plan]:
        """Choices in the place of a head's labels."""
        choices = call.explicit.get("choices", served.profile(call.explicit).choices)
        if not choices or not generates(self._parts.base):
            raise NothingToClassify(self._parts.base, served)
        if ask.pair is not None:
            raise InvalidParameter("inputs: choices are scored behind one text; send a string", param="inputs")
        if call.cuts:
            raise InvalidParameter("truncate: a prompt of choices is not cut; send a shorter text", param="truncate")
        explicit = {name: call.explicit[name] for name in _CHOICE_PARAMETERS if name in call.explicit}
        return await self._generating.make(Call(asks=(ask,), explicit=explicit, tenant=call.tenant), ask, served)

    async def _plan(self, call: Call, ask: Ask, served: Served, head: HeadFacts | None) -> Plan:
        profile = served.profile(call.explicit)
        task_id = call.explicit.get("task_id", profile.parameters.get("task_id"))
        adapter = served.adapter(task_id)
        text = _templated(call, ask, profile, head)
        codec = await self._codecs.of(served)
        encoded = await self._encoded(call, ask, text, served, codec)
        check_known(encoded.ids, self._parts.base.vocab_size, param="input")
        has_segments = self._parts.base.is_encoder and any(encoded.segments) and not served.ignores_segments
        request = Request(
            id=self._new_id(),
            adapter=adapter,
            prompt=encoded.ids,
            reading=call.pooling if head is None else READINGS[head.task],
            segments=encoded.segments if has_segments else (),
            arrival_s=self._parts.clock(),
        )
        return Plan(
            request=request,
            served=served,
            codec=codec,
            prompt_text=text,
            pair_text=ask.pair or "",
            labels=() if head is None else labels_of(self._parts.base, head, profile),
            head=head,
            encoded=encoded,
            release=self._hold(served),
        )

    async def _encoded(self, call: Call, ask: Ask, text: str, served: Served, codec: TextCodec) -> Encoded:
        """The tokens, no more than there are positions for; raises PromptTooLong, and InvalidParameter for none."""
        limit = self._parts.base.max_context
        room = limit - served.num_virtual_tokens
        name = call.style.name("inputs")
        way_out = "Send a shorter context" if ask.is_question else "Send a shorter text, or set truncate to true"
        is_cut = call.cuts and not ask.is_question
        if ask.ids is None and not is_cut:
            fewest = codec.fewest_tokens(text) + codec.fewest_tokens(ask.pair or "")
            check_room(fewest, limit, param=name, way_out=way_out)
        encoded = _given(ask.ids) if ask.ids is not None else await self._tokenised(call, codec, text, ask.pair)
        if is_cut and len(encoded.ids) > room:
            encoded = encoded.shortened(room)
        if not encoded.ids:
            raise InvalidParameter(f"{name}: there are no tokens; send some text", param=name)
        if len(encoded.ids) > room:
            virtual = f" and the adapter's {served.num_virtual_tokens}" if served.num_virtual_tokens else ""
            raise PromptTooLong(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{len(encoded.ids)} tokens{virtual}, which are read in one pass. {way_out}.",
                param=name,
            )
        return encoded

    async def _tokenised(self, call: Call, codec: TextCodec, text: str, pair: str | None) -> Encoded:
        if len(text) + len(pair or "") > LONG_TEXT_CHARS:
            return await self._threads.run(call.tenant, len(text) + len(pair or ""), codec.encode_fully, text, pair)
        return codec.encode_fully(text, pair)


def _given(ids: tuple[int, ...]) -> Encoded:
    """Token ids as they came, special ones among them."""
    return Encoded(ids=ids, segments=(0,) * len(ids), texts=(0,) * len(ids), words=(None,) * len(ids), offsets=())


def _templated(call: Call, ask: Ask, profile: Profile, head: HeadFacts | None) -> str:
    """A template goes around a single text that is read as a whole; tokens are read where they stand."""
    text = ask.text or ""
    template: Any = call.explicit.get("template", profile.template)
    reading = call.pooling if head is None else READINGS[head.task]
    if template is None or ask.pair is not None or reading in (Reading.TOKENS, Reading.SPANS):
        return text
    return str(template).replace("{text}", text)


def _check_shape(ask: Ask, head: HeadFacts) -> None:
    if head.task == "QUESTION_ANS" and not ask.is_question:
        raise InvalidParameter(
            'inputs: this head answers questions; send {"question": .., "context": ..}', param="inputs"
        )
    if head.task != "QUESTION_ANS" and ask.is_question:
        raise InvalidParameter(
            'inputs: this head labels texts; send a string, or {"text": .., "text_pair": ..}', param="inputs"
        )
    if head.task == "TOKEN_CLS" and ask.pair is not None:
        raise InvalidParameter("inputs: this head labels the tokens of one text; send a string", param="inputs")
