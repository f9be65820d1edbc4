"""From a call to requests of the engine: one way in for every family of routes.

An adapter is resolved once and kept until the answer's end; every input becomes plans; either all of a call are
submitted, or none. Knows no body and no response, and of an input only who plans it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from peft_serve.api.codecs import Codecs
from peft_serve.api.generating import GenerationPlans
from peft_serve.api.generation import Generation
from peft_serve.api.naming import BASE_NAME
from peft_serve.api.plan import Call, Plan, Purpose
from peft_serve.api.principal import Principal, Tenant
from peft_serve.api.quotas import Quotas
from peft_serve.api.reading import ReadingPlans
from peft_serve.api.resolving import Resolver
from peft_serve.api.splitting import Draws
from peft_serve.api.text_threads import TextThreads
from peft_serve.api.waiting import until
from peft_serve.core import BASE, AdapterId, Request, RequestId
from peft_serve.engine.client import EngineClient
from peft_serve.engine.parts import ServerParts
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import InvalidParameter, QueueFull, QuotaExceeded, Unavailable
from peft_serve.metrics import RequestFigures
from peft_serve.text import TextCodec

RETRY_AFTER_S: Final = 1.0


class Admission:
    """Lets calls in; see the module's docstring. `draw_bits(n)` gives n random bits."""

    def __init__(
        self,
        parts: ServerParts,
        client: EngineClient,
        draw_bits: Callable[[int], int],
        *,
        learn: Callable[[AdapterId, str], None],
        quotas: Quotas,
        threads: TextThreads,
    ) -> None:
        """`learn` is told by which name an adapter was asked for; `quotas` are charged for the answers; long texts
        are tokenised on `threads`."""
        self._parts = parts
        self._quotas = quotas
        self._learn = learn
        self._client = client
        self._draw_bits = draw_bits
        self._numbers = itertools.count(1)
        self._resolver = Resolver(parts.catalog, parts.base.name)
        hold = self._resolver.hold
        self._codecs = Codecs(parts)
        self._generating = GenerationPlans(
            parts, self._codecs, threads, new_id=self._new_id, draw_bits=draw_bits, hold=hold
        )
        self._reading = ReadingPlans(parts, self._codecs, self._generating, threads, new_id=self._new_id, hold=hold)

    async def admit(
        self, call: Call, principal: Principal, *, max_wait_s: float | None = None, session: str = ""
    ) -> list[Generation]:
        """The running answers of a call, `call.num_answers` to each input, in order. The caller closes each.

        Each is to have its first token in `max_wait_s`, else in what the operator allows. Calls of one `session` get
        the same target of an alias.

        Raises what `errors` says a request can be refused with; then nothing runs.
        """
        self._check_open()
        self._check_number(call)
        self._check_may(call, principal)
        served = await self._resolver.resolve(
            [ask.adapter for ask in call.asks], principal, Draws(session, self._draw_bits)
        )
        call = replace(call, tenant=principal.tenant.name)
        planner = self._generating if call.purpose is Purpose.GENERATE else self._reading
        plans: list[Plan] = []
        try:
            for ask in call.asks:
                if plans:  # short texts are tokenised right here, on everybody's loop: one in a turn of it
                    await asyncio.sleep(0)
                plans += await planner.make(call, ask, served[ask.adapter])
            check_members(plans, call.num_members)
            longest_s = max_wait_s or self._parts.settings.max_wait_s
            whose = principal.tenant
            plans = [replace(plan, request=_owned(until(plan.request, longest_s), whose)) for plan in plans]
            return self._submit(plans, principal)
        except BaseException:
            for plan in plans:
                plan.release()
            raise
        finally:
            for one in served.values():
                self._resolver.release(one)

    async def codec_of(self, name: str, principal: Principal, *, session: str = "") -> TextCodec:
        """The codec that an adapter is asked and answers in; raises as `admit` does."""
        served = await self._resolver.resolve([name], principal, Draws(session, self._draw_bits))
        try:
            return await self._codecs.of(served[name])
        finally:
            for one in served.values():
                self._resolver.release(one)

    def _new_id(self) -> RequestId:
        return RequestId(f"{next(self._numbers)}-{self._draw_bits(64):016x}")

    def _check_open(self) -> None:
        """The engine says both of these itself, but only of what has been read and planned, which takes longer."""
        snapshot = self._parts.engine.snapshot()
        state, limit = snapshot.state, self._parts.settings.max_queue
        if state is not EngineState.RUNNING:
            raise Unavailable(f"the server is {state.value}; try again in a moment", retry_after_s=RETRY_AFTER_S)
        if snapshot.num_waiting >= limit:
            raise QueueFull(
                f"{snapshot.num_waiting} requests wait, and this server queues {limit} (--max-queue); try again later",
                retry_after_s=RETRY_AFTER_S,
            )

    def _check_number(self, call: Call) -> None:
        settings, num_inputs, inputs = self._parts.settings, len(call.asks), call.style.name("inputs")
        limit = min(settings.max_inputs, settings.max_queue)  # what can never be queued is no matter of trying again
        if num_inputs * call.num_answers <= limit:
            return
        name, what = inputs, f"{num_inputs}"
        if call.num_answers > 1:
            name = call.style.name("num_answers")
            what = f"{call.num_answers} answers to each of {num_inputs} {inputs}"
        raise InvalidParameter(f"{name}: {what}; this server takes {limit} in one request; send several", param=name)

    def _check_may(self, call: Call, principal: Principal) -> None:
        if any(ask.adapter == BASE_NAME for ask in call.asks):
            principal.require_base()
        try:
            self._quotas.require_tokens(principal.tenant)
        except QuotaExceeded as error:
            self._parts.metrics.tenants.observe_quota(principal.tenant.name, error.quota)
            raise

    def _submit(self, plans: Sequence[Plan], principal: Principal) -> list[Generation]:
        running: list[Generation] = []
        try:
            for plan in plans:
                if plan.request.adapter != BASE:
                    self._learn(plan.request.adapter, plan.served.name)
                running.append(self._generation(plan, principal))
        except BaseException:
            for generation in running:
                generation.close()
            raise
        return running

    def _generation(self, plan: Plan, principal: Principal) -> Generation:
        def charge(figures: RequestFigures) -> None:
            self._count_aliases(plan, figures)
            if figures.ttft_s is not None:  # what never began was given nothing
                self._quotas.charge_tokens(principal.tenant, figures.num_prompt_tokens + figures.num_output_tokens)

        return Generation(
            plan,
            self._client.submit(plan.request),
            client=self._client,
            metrics=self._parts.metrics,
            clock=self._parts.clock,
            on_end=charge,
        )

    def _count_aliases(self, plan: Plan, figures: RequestFigures) -> None:
        for part in plan.served.parts:
            if part.alias:
                self._parts.metrics.aliases.observe_request(
                    part.alias,
                    part.resolved.name,
                    part.resolved.number,
                    figures.outcome,
                    seconds=figures.e2e_s,
                )


def _owned(request: Request, tenant: Tenant) -> Request:
    return replace(request, tenant=tenant.name, tenant_weight=tenant.weight)


def check_members(plans: Sequence[Plan], num_members: int) -> None:
    """Raise InvalidParameter unless the members of an ensemble answer with the same labels, of whole texts."""
    if num_members < 2:
        return
    for first in range(0, len(plans), num_members):
        members = plans[first : first + num_members]
        for plan in members:
            if not plan.labels or (plan.head is not None and plan.head.task != "SEQ_CLS"):
                raise InvalidParameter(
                    f"ensemble: {plan.served.name} does not answer with one label for a text; name adapters with "
                    "choices or with a head for sequence classification",
                    param="ensemble",
                )
            if set(plan.labels) != set(members[0].labels):
                raise InvalidParameter(
                    f"ensemble: {members[0].served.name} and {plan.served.name} have different labels "
                    f"({_listed(members[0])} and {_listed(plan)}); name adapters that answer the same question",
                    param="ensemble",
                )


def _listed(plan: Plan) -> str:
    labels = ", ".join(repr(label) for label in sorted(plan.labels)[:4])
    return labels + (", .." if len(plan.labels) > 4 else "")
