"""Whole answers and streams over running generations, the same for every family.

Owns nothing: it waits, watches whether the client is still there, and closes what it was given.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api.generation import Generation
from peft_serve.api.plan import Answer, Piece
from peft_serve.api.sse import EventStreamResponse, next_or_none, until_gone
from peft_serve.errors import Internal, ServeError

CLIENT_CLOSED = 499
"""nginx' status for a client that went away; nobody reads it."""


def close_all(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.close()


async def whole(generations: Sequence[Generation], request: Request) -> list[Answer] | None:
    """Every answer, in order; None if the client went away. One that fails cancels the others."""
    request.state.generations = generations  # whoever keeps a record of the exchange reads them at its end
    try:
        return await until_gone(_all(generations), request.receive)
    finally:
        close_all(generations)


def grouped(
    generations: Sequence[Generation], answers: Sequence[Answer], size: int
) -> list[list[tuple[Generation, Answer]]]:
    """The answers by what was asked, `size` to each: a beam search gives several, the others one (or fewer) each."""
    groups: list[list[tuple[Generation, Answer]]] = []
    num_left = 0
    for generation, answer in zip(generations, answers, strict=True):
        if num_left == 0:
            groups.append([])
            num_left = size
        groups[-1] += [(generation, one) for one in (answer, *answer.others)]
        num_left -= generation.plan.num_answers
    return groups


async def _all(generations: Sequence[Generation]) -> list[Answer]:
    if len(generations) == 1:
        return [await generations[0].answer()]
    tasks = [asyncio.ensure_future(generation.answer()) for generation in generations]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several generations as they come, with the place of the generation."""
    if len(generations) == 1:
        async for piece in generations[0].pieces():
            yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def forward(index: int, generation: Generation) -> None:
        try:
            async for piece in generation.pieces():
                arrived.put_nowait((index, piece))
            arrived.put_nowait((index, None))
        except Exception as error:  # noqa: BLE001  # raised again where it is read
            arrived.put_nowait((index, error))

    tasks = [asyncio.ensure_future(forward(i, each)) for i, each in enumerate(generations)]
    try:
        num_open = len(tasks)
        while num_open:
            index, news = await arrived.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                num_open -= 1
            else:
                yield index, news
    finally:
        for task in tasks:
            task.cancel()


async def streamed(
    events: AsyncIterator[bytes],
    generations: Sequence[Generation],
    request: Request,
    *,
    on_error: Callable[[ServeError], bytes],
    keep_alive_s: float,
    headers: Callable[[], Mapping[str, str]],
) -> Response:
    """A stream of `events`, begun when the first of them is there: what fails before that has a status.

    If the first is long in coming, the stream begins without it, so that the connection is kept alive.
    """
    request.state.generations = generations
    first = asyncio.ensure_future(next_or_none(events))
    try:
        waited = await until_gone(asyncio.wait({first}, timeout=keep_alive_s), request.receive)
        if waited is not None and first.done():
            first.result()
    except BaseException:
        first.cancel()
        close_all(generations)
        raise
    if waited is None:
        first.cancel()
        with suppress(asyncio.CancelledError, ServeError):
            await first
        close_all(generations)
        return Response(status_code=CLIENT_CLOSED)
    return EventStreamResponse(
        _continued(first, events, on_error),
        on_close=lambda: close_all(generations),
        keep_alive_s=keep_alive_s,
        headers=headers(),
    )


async def _continued(
    first: asyncio.Future[bytes | None], events: AsyncIterator[bytes], on_error: Callable[[ServeError], bytes]
) -> AsyncIterator[bytes]:
    """The first event and the rest; what fails now becomes the last event."""
    try:
        chunk = await first
        if chunk is not None:
            yield chunk
            async for chunk in events:
                yield chunk
    except ServeError as error:
        yield on_error(error)
    except Exception:
        logging.getLogger("peft_serve.api").exception("a stream failed")
        yield on_error(Internal("an error on the server's side"))
    finally:
        first.cancel()


def served_headers(generations: Sequence[Generation]) -> dict[str, str]:
    """What is known of a call as soon as it runs."""
    served = [generation.plan.served for generation in generations]
    names = dict.fromkeys(one.name for one in served)
    headers = {
        "x-adapter": ",".join(names),
        "x-prompt-tokens": str(sum(len(generation.plan.request.prompt) for generation in generations)),
    }
    versions = dict.fromkeys(one.versions for one in served if one.versions is not None)
    if versions:
        headers["x-adapter-version"] = ",".join(versions)
    aliases = dict.fromkeys(one.aliases for one in served if one.aliases is not None)
    if aliases:
        headers["x-adapter-alias"] = ",".join(aliases)
    return headers


def stream_headers(generations: Sequence[Generation]) -> dict[str, str]:
    """What is known when a stream begins; times are in milliseconds."""
    headers = served_headers(generations)
    firsts = [generation.ttft_s for generation in generations if generation.ttft_s is not None]
    if firsts:
        headers["x-time-to-first-token"] = _ms(min(firsts))
    return headers


def whole_headers(generations: Sequence[Generation], answers: Sequence[Answer]) -> dict[str, str]:
    """What is known of a whole answer; of several, the longest time and the sum of the tokens."""
    headers = served_headers(generations)
    headers["x-prompt-tokens"] = str(sum(answer.num_prompt_tokens for answer in answers))
    every = [one for answer in answers for one in (answer, *answer.others)]
    headers["x-generated-tokens"] = str(sum(len(answer.tokens) for answer in every))
    headers["x-queue-time"] = _ms(max(answer.queue_s for answer in answers))
    headers["x-total-time"] = _ms(max(answer.total_s for answer in answers))
    firsts = [answer.ttft_s for answer in answers if answer.ttft_s is not None]
    if firsts:
        headers["x-time-to-first-token"] = _ms(max(firsts))
    return headers


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3f}"
