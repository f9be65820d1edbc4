"""The trial of an upload: one short prompt through the adapter and through the base, before a name stands for it.

What the gate accepts can still overflow where it computes, or turn out to change nothing. A trial asks the engine as
any caller does, side by side with everybody's requests: what it can read of the prompt with the adapter must be
finite and of the right shape, and should differ from what the base gives. A server that is too busy lets the upload
through untried. Trials are no callers' requests and are not counted as such. Knows no HTTP and no file.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from peft_serve.adapters.combined import Part, combined_id
from peft_serve.adapters.findings import Inspection, Proof
from peft_serve.adapters.records import WEIGHTS_FILE
from peft_serve.api.abilities import READINGS, generates, reads
from peft_serve.core import BASE, AdapterId, FinishEvent, Reading, ReadingEvent, Request, RequestId, ScoresEvent
from peft_serve.engine.client import EngineClient, EventStream
from peft_serve.engine.parts import BaseCard, ServerParts
from peft_serve.errors import (
    AdapterInvalid,
    AdapterUnavailable,
    Internal,
    InvalidParameter,
    PromptTooLong,
    Refusal,
    ServeError,
    Unavailable,
)

TRIAL_S: Final = 20.0
NUM_IDS: Final = 8
_NUM_ATTEMPTS: Final = 2  # of a pass that fails: rows of others are in it, and one of them may be at fault
_GRACE_S: Final = 10.0  # beyond the limit, for an event loop that is late
_BLAMED: Final = (AdapterInvalid, AdapterUnavailable, InvalidParameter, PromptTooLong, Internal)
"""With these a request ends that can never be answered with this adapter; others say how the server fares."""

_FLAT: Final = (
    "gives one and the same value everywhere on the trial prompt: its edits are too large to compute with; check "
    "lora_alpha, or whatever scales them"
)

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """One thing to read of the prompt: a `Reading`, or without one the scores of its own ids as the next token."""

    reading: Reading | None
    shape: tuple[int, int] | None = None  # of a head's answer: rows, numbers in a row; None: the base's
    is_of_base: bool = True  # the base has this too, so that the two can be compared


class Trial:
    """Tries adapters out; see the module's docstring. Made on `loop`'s thread."""

    def __init__(
        self,
        parts: ServerParts,
        client: EngineClient,
        loop: asyncio.AbstractEventLoop,
        *,
        new_id: Callable[[str], str],
        learn: Callable[[AdapterId, str], None],
        limit_s: float = TRIAL_S,
    ) -> None:
        """`new_id(prefix)` gives ids of requests; `learn` is told by which name an adapter is known."""
        self._parts = parts
        self._client = client
        self._loop = loop
        self._new_id = new_id
        self._learn = learn
        self._limit_s = limit_s

    def prove(self, name: str, found: Inspection) -> Proof:
        """Try out what is uploaded as `name`; raises AdapterInvalid. Blocks: for every thread but the loop's own."""
        running = asyncio.run_coroutine_threadsafe(self.run(name, found), self._loop)
        try:
            return running.result(self._limit_s + _GRACE_S)
        except (TimeoutError, concurrent.futures.CancelledError):
            running.cancel()
            return _untried("the server is stopping or overloaded")

    async def run(self, name: str, found: Inspection) -> Proof:
        """The same on the loop, which it never blocks."""
        adapter = _adapter_of(found)
        prompt = _prompt(found, self._parts.base)
        if not prompt:
            return _untried("its virtual tokens leave no room for a prompt")
        self._learn(adapter, name)
        try:
            async with asyncio.timeout(self._limit_s):
                return await self._tried(adapter, found, prompt)
        except TimeoutError:
            return _untried(f"the server did not get to it within {self._limit_s:g} seconds")
        except AdapterInvalid:
            self._parts.engine.unload(adapter)
            raise
        except ServeError as error:
            return _untried(error.message)

    async def _tried(self, adapter: AdapterId, found: Inspection, prompt: tuple[int, ...]) -> Proof:
        probes = _probes(found, self._parts.base, len(prompt))
        shared = [probe for probe in probes if probe.is_of_base]
        requests = [self._request(BASE, probe, prompt) for probe in shared]
        requests += [self._request(adapter, probe, prompt) for probe in probes]
        for _ in range(_NUM_ATTEMPTS):
            answers = await self._answers(requests)
            if not any(isinstance(answer, Internal) for answer in answers):
                break
        own = dict(zip(probes, answers[len(shared) :], strict=True))
        for answer in own.values():
            if isinstance(answer, Exception):
                raise self._blamed(answer)
        of_base = dict(zip(shared, answers[: len(shared)], strict=True))
        failure = next((answer for answer in of_base.values() if isinstance(answer, Exception)), None)
        if failure is not None:
            raise Unavailable(f"the base itself does not answer the trial prompt ({type(failure).__name__})")
        return _judge(_rows_of(own), _rows_of(of_base))

    def _request(self, adapter: AdapterId, probe: _Probe, prompt: tuple[int, ...]) -> Request:
        base = self._parts.base
        return Request(
            id=RequestId(self._new_id("trial-")),
            adapter=adapter,
            prompt=prompt,
            decoder_prompt=base.decoder_start if base.is_encoder_decoder else (),
            choices=tuple((id_,) for id_ in dict.fromkeys(prompt[:NUM_IDS])) if probe.reading is None else (),
            reading=probe.reading,
            arrival_s=self._parts.clock(),
            is_trial=True,
        )

    async def _answers(self, requests: Sequence[Request]) -> list[Rows | Exception]:
        """What each came to, all submitted at once. Raises QueueFull and Unavailable."""
        with ExitStack() as closing:
            streams = []
            for request in requests:
                stream = self._client.submit(request)
                closing.callback(stream.close)
                streams.append(stream)
            return [await _answer(stream) for stream in streams]

    def _blamed(self, error: Exception) -> ServeError:
        """Why the adapter's request ended: the adapter's fault, or how the server fares."""
        if not isinstance(error, ServeError):
            return Unavailable(f"the trial was broken off ({type(error).__name__})")
        if not isinstance(error, _BLAMED) or error.retry_after_s is not None:
            return error
        return AdapterInvalid([Refusal(WEIGHTS_FILE, f"does not run on the trial prompt: {error.message}")])


def _adapter_of(found: Inspection) -> AdapterId:
    """The checkpoint as it is, or the first of its tasks."""
    return combined_id([Part(id=found.id, task=0 if found.summary.num_tasks > 1 else None)])


def _prompt(found: Inspection, base: BaseCard) -> tuple[int, ...]:
    """Ids spread over the vocabulary, then those that the adapter acts on; as many, from the end, as there is room."""
    spread = [base.vocab_size * (2 * i + 1) // (2 * NUM_IDS) for i in range(NUM_IDS)]
    cues = [id_ for id_ in found.cues if 0 <= id_ < base.vocab_size]
    num_virtual = 0 if base.is_encoder_decoder else found.summary.num_virtual_tokens
    room = max(0, base.max_context - num_virtual - 1)
    return tuple([*spread, *cues][-room:] if room else ())


def _probes(found: Inspection, base: BaseCard, num_ids: int) -> list[_Probe]:
    probes = []
    if generates(base):
        probes.append(_Probe(reading=None))
    if not reads(base):
        return probes
    probes.append(_Probe(reading=Reading.MEAN if base.is_encoder else Reading.LAST))
    head = found.summary.head or base.head
    if head is not None:
        reading = READINGS[head.task]
        num_rows = 1 if reading is Reading.SEQUENCE else num_ids
        probes.append(_Probe(reading=reading, shape=(num_rows, head.num_labels), is_of_base=head == base.head))
    return probes


async def _answer(stream: EventStream) -> Rows | Exception:
    rows: Rows | None = None
    async for event in stream:
        if isinstance(event, ReadingEvent):
            rows = event.rows
        elif isinstance(event, ScoresEvent):
            rows = (event.logprobs,)
        elif isinstance(event, FinishEvent) and event.error is not None:
            return event.error
    return rows if rows is not None else Unavailable("the trial was broken off")


def _judge(own: dict[_Probe, Rows], of_base: dict[_Probe, Rows]) -> Proof:
    """Raises AdapterInvalid for what is not finite where the base is, or not of its shape."""
    for probe, rows in own.items():
        beside = of_base.get(probe)
        if not _is_finite(rows) and (beside is None or _is_finite(beside)):
            reason = (
                "gives NaN or Infinity on the trial prompt; train it with a smaller learning rate or scale, or ask the "
                "operator for a base of a wider --dtype"
            )
            raise AdapterInvalid([Refusal(WEIGHTS_FILE, reason)])
        wanted = probe.shape or _shape(beside or ())
        if _shape(rows) != wanted:
            reason = f"gives {_shape(rows)} numbers on the trial prompt, not {wanted}; save the checkpoint again"
            raise AdapterInvalid([Refusal(WEIGHTS_FILE, reason)])
    if any(_is_flat(own[probe]) and not _is_flat(rows) for probe, rows in of_base.items()):
        return Proof(is_tried=True, warnings=(_FLAT,))
    if any(own[probe] != rows for probe, rows in of_base.items()):
        return Proof(is_tried=True)
    return Proof(is_tried=True, warnings=(_unchanged(has_own_head=len(own) > len(of_base)),))


def _unchanged(*, has_own_head: bool) -> str:
    if has_own_head:
        return "changes nothing below its head on the trial prompt: the hidden states are the base's to the last bit"
    return (
        "changes nothing on the trial prompt: the answers are the base's to the last bit, as before training; check "
        "that the trained weights were saved"
    )


def _rows_of(answers: dict[_Probe, Rows | Exception]) -> dict[_Probe, Rows]:
    return {probe: rows for probe, rows in answers.items() if not isinstance(rows, Exception)}


def _is_finite(rows: Rows) -> bool:
    return all(math.isfinite(value) for row in rows for value in row)


def _is_flat(rows: Rows) -> bool:
    """Whether there is one value only: what a norm makes of states whose squares overflow."""
    return len({value for row in rows for value in row}) == 1


def _shape(rows: Rows) -> tuple[int, int]:
    return len(rows), len(rows[0]) if rows else 0


def _untried(reason: str) -> Proof:
    return Proof(warnings=(f"was not tried out: {reason}",))
