"""From a call to requests of the engine: one way in for every family of routes.

An adapter is resolved once and kept until the answer's end; its profile fills in what the call leaves open; the
text is templated and tokenised; every bound is checked. Either all inputs of a call are submitted, or none.

Knows no body and no response.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from peft_serve.adapters.records import Profile, Resolved
from peft_serve.api.bodies import MAX_SEED
from peft_serve.api.generation import Generation
from peft_serve.api.naming import BASE_NAME
from peft_serve.api.plan import Ask, Call, Plan, Served, Style
from peft_serve.api.prompts import Asking, Prompt, check_known, make_prompt
from peft_serve.api.sampling import check_bounds, layered, sampling_params, stops_of
from peft_serve.core import BASE, AdapterId, Request, RequestId, SamplingParams
from peft_serve.engine.client import EngineClient
from peft_serve.engine.parts import BaseCard, ServerParts
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import InvalidParameter, PromptTooLong, Unavailable

SEED_BITS: Final = 32
RETRY_AFTER_S: Final = 1.0

_NO_PROFILE: Final = Profile()


class Admission:
    """Lets calls in; see the module's docstring. `draw_bits(n)` gives n random bits."""

    def __init__(
        self,
        parts: ServerParts,
        client: EngineClient,
        draw_bits: Callable[[int], int],
        *,
        learn: Callable[[AdapterId, str], None],
    ) -> None:
        """`learn` is told by which name an adapter was asked for."""
        self._parts = parts
        self._learn = learn
        self._client = client
        self._draw_bits = draw_bits
        self._numbers = itertools.count(1)

    async def admit(self, call: Call) -> list[Generation]:
        """The running answers of a call, `call.num_answers` to each input, in order. The caller closes each.

        Raises what `errors` says a request can be refused with; then nothing runs.
        """
        self._check_open()
        self._check_number(call)
        served = await self._resolve([ask.adapter for ask in call.asks])
        plans: list[Plan] = []
        try:
            for ask in call.asks:
                plans += await self._plans(call, ask, served[ask.adapter])
            return self._submit(plans)
        except BaseException:
            for plan in plans:
                plan.release()
            raise
        finally:
            for one in served.values():
                self._release(one)

    def _check_open(self) -> None:
        state = self._parts.engine.snapshot().state
        if state is not EngineState.RUNNING:
            raise Unavailable(f"the server is {state.value}; try again in a moment", retry_after_s=RETRY_AFTER_S)

    def _check_number(self, call: Call) -> None:
        limit = self._parts.settings.max_inputs
        if len(call.asks) * call.num_answers > limit:
            name = call.style.name("inputs")
            raise InvalidParameter(
                f"{name}: {len(call.asks)} with {call.num_answers} answer(s) to each; this server takes {limit} in "
                "one request; send several",
                param=name,
            )

    async def _resolve(self, names: Sequence[str]) -> dict[str, Served]:
        """Who answers to each name. Every adapter is retained once, until the plans have retained it themselves."""
        served = {BASE_NAME: Served(name=BASE_NAME)}
        wanted = [name for name in dict.fromkeys(names) if name != BASE_NAME]
        if wanted:
            # The first resolution of a name may read the disk.
            work = asyncio.ensure_future(asyncio.to_thread(self._retained, wanted))
            try:
                found = await asyncio.shield(work)
            except asyncio.CancelledError:
                work.add_done_callback(self._release_late)
                raise
            for resolved in found:
                self._learn(resolved.id, resolved.name)
            served |= {name: Served(name=r.name, resolved=r) for name, r in zip(wanted, found, strict=True)}
        return served

    def _retained(self, names: Sequence[str]) -> list[Resolved]:
        found: dict[str, Resolved] = {}
        try:
            for name in names:
                found[name] = self._parts.catalog.resolve(name, hold=True)
        except BaseException:
            for resolved in found.values():
                self._parts.catalog.release(resolved.id)
            raise
        return list(found.values())

    def _release_late(self, work: asyncio.Future[list[Resolved]]) -> None:
        if not work.cancelled() and work.exception() is None:
            for resolved in work.result():
                self._parts.catalog.release(resolved.id)

    def _release(self, served: Served) -> None:
        if served.resolved is not None:
            self._parts.catalog.release(served.resolved.id)

    async def _plans(self, call: Call, ask: Ask, served: Served) -> list[Plan]:
        """The engine's requests for one input, with one adapter retention each."""
        resolved = served.resolved
        profile = resolved.profile if resolved is not None else _NO_PROFILE
        merged = layered(call, profile)
        asking = Asking.of(profile, merged, call.style)
        self._check_choices(asking)
        prompt = await make_prompt(self._parts.codec, ask, asking, call.explicit)
        check_known([*prompt.ids, *(i for choice in prompt.choices for i in choice)], self._parts.base.vocab_size)
        if prompt.choices:
            merged.pop("min_new_tokens", None)  # nothing is generated
        num_virtual = resolved.num_virtual_tokens if resolved is not None else 0
        max_new_tokens = self._max_new_tokens(merged, prompt, num_virtual, call)
        check_bounds(merged, max_new_tokens, call, self._parts.settings)
        stops = stops_of(merged, self._parts.settings, call.style)
        sampling = sampling_params(merged, max_new_tokens=max_new_tokens, num_logprobs=call.num_logprobs)
        requests = self._requests(served, prompt, self._seeded(sampling, merged, call.num_answers))
        return [
            Plan(
                request=request,
                served=served,
                prompt_text=prompt.text,
                labels=prompt.labels,
                stops=stops,
                keep_stop=call.style.keep_stop,
                full_text=bool(merged.get("return_full_text")),
                release=self._retain_again(served),
            )
            for request in requests
        ]

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

    def _requests(self, served: Served, prompt: Prompt, samplings: Sequence[SamplingParams]) -> list[Request]:
        base = self._parts.base
        adapter: AdapterId = served.resolved.id if served.resolved is not None else BASE
        return [
            Request(
                id=RequestId(f"{next(self._numbers)}-{self._draw_bits(64):016x}"),
                adapter=adapter,
                prompt=prompt.ids,
                decoder_prompt=_decoder_prompt(base, is_scored=bool(prompt.choices)),
                sampling=sampling,
                eos_ids=frozenset() if sampling.ignore_eos else base.eos_ids,
                forced_first=base.forced_first,
                forced_last=base.forced_last,
                choices=prompt.choices,
                arrival_s=self._parts.clock(),
            )
            for sampling in samplings
        ]

    def _retain_again(self, served: Served) -> Callable[[], None]:
        """Retain the adapter for one request; what is returned gives it back, once however often it is called."""
        if served.resolved is None:
            return lambda: None
        self._parts.catalog.retain(served.resolved.id)
        held = [served]

        def release() -> None:
            if held:
                self._release(held.pop())

        return release

    def _submit(self, plans: Sequence[Plan]) -> list[Generation]:
        running: list[Generation] = []
        try:
            for plan in plans:
                running.append(self._generation(plan))  # noqa: PERF401  # those before a refusal are closed
        except BaseException:
            for generation in running:
                generation.close()
            raise
        return running

    def _generation(self, plan: Plan) -> Generation:
        return Generation(
            plan,
            self._client.submit(plan.request),
            client=self._client,
            codec=self._parts.codec,
            metrics=self._parts.metrics,
            clock=self._parts.clock,
        )


def _too_long(style: Style, limit: int, requested: int, num_prompt: int, num_new: int) -> PromptTooLong:
    truncate = style.name("truncate")
    return PromptTooLong(
        f"This model's maximum context length is {limit} tokens. However, you requested {requested} tokens "
        f"({num_prompt} in the prompt, {num_new} to generate). Shorten the prompt (or set {truncate}), or "
        "ask for fewer new tokens.",
        param=style.name("inputs"),
    )


def _decoder_prompt(base: BaseCard, *, is_scored: bool) -> tuple[int, ...]:
    """What the decoder begins with. A choice is scored behind the id that every answer has to begin with."""
    if not base.is_encoder_decoder:
        return ()
    forced = () if base.forced_first is None or not is_scored else (base.forced_first,)
    return (*base.decoder_start, *forced)
