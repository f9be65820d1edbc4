"""From one input to the engine's requests that generate its answers, or score its choices.

The adapter's profile fills in what the call leaves open; the text is templated and tokenised; every bound of the
context and of the server is checked. Knows no queue and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from peft_serve.api.abilities import check_generates
from peft_serve.api.bodies import MAX_SEED
from peft_serve.api.codecs import Codecs
from peft_serve.api.constraints import Constraints
from peft_serve.api.forms import field_of
from peft_serve.api.plan import Ask, Call, Plan, Style
from peft_serve.api.prompts import Asking, Prompt, check_known, make_prompt
from peft_serve.api.sampling import check_bias, check_bounds, layered, sampling_params, stops_of
from peft_serve.api.served import Served
from peft_serve.api.text_threads import TextThreads
from peft_serve.core import AdapterId, Constraint, Request, RequestId, SamplingParams
from peft_serve.engine.parts import BaseCard, ServerParts
from peft_serve.errors import InvalidParameter, PromptTooLong
from peft_serve.grammars.compiler import GrammarCompiler
from peft_serve.text import TextCodec

SEED_BITS: Final = 32


class GenerationPlans:
    """See the module's docstring. `new_id` gives ids of requests, `draw_bits(n)` n random bits, and `hold` holds an
    adapter once more and gives the way to let it go."""

    def __init__(
        self,
        parts: ServerParts,
        codecs: Codecs,
        threads: TextThreads,
        *,
        new_id: Callable[[], RequestId],
        draw_bits: Callable[[int], int],
        hold: Callable[[Served], Callable[[], None]],
    ) -> None:
        self._parts = parts
        self._codecs = codecs
        self._threads = threads
        self._new_id = new_id
        self._draw_bits = draw_bits
        self._hold = hold
        self._constraints = Constraints(
            GrammarCompiler(), vocab_size=parts.base.vocab_size, max_bytes=parts.settings.max_grammar_bytes
        )

    async def make(self, call: Call, ask: Ask, served: Served) -> list[Plan]:
        """One plan for each answer that is wanted, with one hold of the adapter each."""
        check_generates(self._parts.base)
        profile = served.profile(call.explicit)
        merged = layered(call, profile)
        adapter = served.adapter(merged.get("task_id"))
        asking = Asking.of(profile, merged, call.style, max_tokens=self._parts.base.max_context)
        self._check_choices(asking)
        codec = await self._codecs.of(served)
        if ask.tools is not None:
            template = codec.chat_template if asking.template is None else None
            ask.tools.check(template, self._parts.settings.tool_call_parser)
        chat = None
        if ask.messages is not None and asking.template is None:
            chat = await self._codecs.chat_prompt(codec, ask.messages, served.name, ask.offered)
        prompt = await make_prompt(codec, ask, asking, call, chat, threads=self._threads)
        check_known([*prompt.ids, *(i for choice in prompt.choices for i in choice)], self._parts.base.vocab_size)
        if prompt.choices:
            for name in ("min_new_tokens", "num_beams"):
                merged.pop(name, None)  # nothing is generated
            _check_unasked(call)
        max_new_tokens = self._max_new_tokens(merged, prompt, served.num_virtual_tokens, call)
        check_bounds(merged, max_new_tokens, call, self._parts.settings)
        stops = stops_of(merged, self._parts.settings, call.style)
        sampling = sampling_params(merged, call, max_new_tokens=max_new_tokens)
        check_bias(sampling, self._parts.base.vocab_size)
        eos_ids = self._parts.base.eos_ids | codec.own_eos_ids
        constraint = await self._constraint(call, prompt, codec, sampling, eos_ids)
        num_requests = 1 if sampling.num_beams > 1 else call.num_answers
        requests = [
            replace(
                request,
                prompt_logprobs=call.prompt_logprobs,
                max_time_s=merged.get("max_time"),
                constraint=constraint,
            )
            for request in self._requests(adapter, prompt, eos_ids, self._seeded(sampling, merged, num_requests))
        ]
        return [
            Plan(
                request=request,
                served=served,
                codec=codec,
                prompt_text=prompt.text,
                labels=prompt.labels,
                stops=stops,
                keep_stop=call.style.keep_stop,
                full_text=bool(merged.get("return_full_text")),
                num_answers=sampling.num_sequences,
                release=self._hold(served),
            )
            for request in requests
        ]

    async def _constraint(
        self, call: Call, prompt: Prompt, codec: TextCodec, sampling: SamplingParams, eos_ids: frozenset[int]
    ) -> Constraint | None:
        """What holds the answers to the form that is asked for; raises InvalidParameter."""
        form = call.form
        if form is None:
            return None
        if prompt.choices:
            reason = "the answer is one of the choices, of the request or the adapter; send `choices`: null for a form"
            raise InvalidParameter(f"{form.place}: {reason}", param=field_of(form.place))
        if sampling.num_beams > 1:
            raise InvalidParameter(f"{form.place}: not with beams; leave num_beams out", param=field_of(form.place))
        return await self._constraints.of(form, codec, frozenset() if sampling.ignore_eos else eos_ids)

    def _check_choices(self, asking: Asking) -> None:
        limit = self._parts.settings.max_choices
        if len(asking.choices or ()) > limit:
            raise InvalidParameter(
                f"choices: {len(asking.choices or ())}; this server scores at most {limit}", param="choices"
            )

    def _max_new_tokens(self, merged: Mapping[str, Any], prompt: Prompt, num_virtual: int, call: Call) -> int:
        """The number asked for, else the family's, as far as there is room; raises PromptTooLong."""
        base = self._parts.base
        num_prompt = len(prompt.ids)
        if base.is_encoder_decoder:
            used, room = len(base.decoder_start), base.max_context - len(base.decoder_start)
            if num_prompt > base.max_context:
                raise _too_long(call.style, base.max_context, num_prompt, num_prompt, 0)
        else:
            used, room = num_prompt + num_virtual, base.max_context - num_prompt - num_virtual
        longest_choice = max(map(len, prompt.choices), default=0)
        asked: int | None = longest_choice or merged.get("max_new_tokens")
        if asked is None:
            most = self._parts.settings.max_new_tokens
            asked = max(1, min(call.style.max_new_tokens or most, most, room))
        if asked > room:
            raise _too_long(call.style, base.max_context, used + asked, used, asked)
        return asked

    def _seeded(self, sampling: SamplingParams, merged: Mapping[str, Any], num_answers: int) -> list[SamplingParams]:
        """One for each answer: a seed is drawn if none is given, and counted up from answer to answer."""
        if not sampling.do_sample:
            return [sampling] * num_answers
        seed = merged.get("seed")
        first = int(seed) if seed is not None else self._draw_bits(SEED_BITS)
        return [replace(sampling, seed=(first + i) % (MAX_SEED + 1)) for i in range(num_answers)]

    def _requests(
        self, adapter: AdapterId, prompt: Prompt, eos_ids: frozenset[int], samplings: Sequence[SamplingParams]
    ) -> list[Request]:
        base = self._parts.base
        return [
            Request(
                id=self._new_id(),
                adapter=adapter,
                prompt=prompt.ids,
                decoder_prompt=_decoder_prompt(base, is_scored=bool(prompt.choices)),
                sampling=sampling,
                eos_ids=frozenset() if sampling.ignore_eos else eos_ids,
                forced_first=base.forced_first,
                forced_last=base.forced_last,
                choices=prompt.choices,
                arrival_s=self._parts.clock(),
            )
            for sampling in samplings
        ]


def _check_unasked(call: Call) -> None:
    """Raise InvalidParameter for log-probabilities of a prompt whose choices are scored."""
    if call.prompt_logprobs is not None:
        name = call.style.name("prompt_logprobs")
        raise InvalidParameter(f"{name}: not told of a prompt with choices; send choices: null", param=name)


def _too_long(style: Style, limit: int, requested: int, num_prompt: int, num_new: int) -> PromptTooLong:
    truncate, longest = style.name("truncate"), style.name("max_new_tokens")
    return PromptTooLong(
        f"This model's maximum context length is {limit} tokens. However, you requested {requested} tokens "
        f"({num_prompt} in the prompt, {num_new} to generate). Shorten the prompt (or set {truncate}), or "
        f"ask for fewer new tokens ({longest}).",
        param=style.name("inputs"),
    )


def _decoder_prompt(base: BaseCard, *, is_scored: bool) -> tuple[int, ...]:
    """What the decoder begins with. A choice is scored behind the id that every answer has to begin with."""
    if not base.is_encoder_decoder:
        return ()
    forced = () if base.forced_first is None or not is_scored else (base.forced_first,)
    return (*base.decoder_start, *forced)
