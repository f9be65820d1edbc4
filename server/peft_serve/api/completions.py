"""`POST /v1/completions`: text, a list of texts, token ids, or a list of lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api import fields
from peft_serve.api import openai_words as words
from peft_serve.api.bodies import CompletionBody
from peft_serve.api.json_body import read_object, validated
from peft_serve.api.openai_call import DEFAULTS, NAMES, OpenAICall, explicit_parameters
from peft_serve.api.openapi import json_body, openai_error_responses
from peft_serve.api.plan import Answer, Ask, Call, Piece, Style
from peft_serve.api.replies import CLIENT_CLOSED, whole
from peft_serve.api.service import Service
from peft_serve.api.waiting import max_wait_of
from peft_serve.errors import InvalidParameter

DEFAULT_MAX_TOKENS: Final = 16  # OpenAI's


class CompletionRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(tags=["openai"])
        router.add_api_route(
            "/v1/completions",
            self.completions,
            methods=["POST"],
            summary="Complete a text, a list of texts, or token ids",
            openapi_extra=json_body("CompletionBody", _EXAMPLE, has_adapter=True),
            responses=openai_error_responses(400, 404, 413, 415, 429, 500, 503),
        )
        return router

    async def completions(self, request: Request) -> Response:
        body = validated(CompletionBody, await read_object(request), fields.COMPLETIONS)
        best_of = _best_of(body)
        call = OpenAICall(
            self._service, request, body, prefix="cmpl-", kind="text_completion", answers_per_prompt=best_of
        )
        admitted = Call(
            asks=tuple(_asks(body, call.adapter)),
            explicit=explicit_parameters(body) | call.task,
            style=Style(
                defaults=DEFAULTS,
                max_new_tokens=DEFAULT_MAX_TOKENS,
                keep_stop=False,
                names=NAMES | {"inputs": "prompt", "top_n_tokens": "logprobs"},
                add_special_tokens=body.add_special_tokens,
            ),
            num_answers=best_of,
            # Choosing the best needs the log-probabilities even if nobody asked to see them.
            num_logprobs=0 if body.logprobs is None and best_of > body.n else body.logprobs,
        )
        generations = await self._service.open().admit(admitted, max_wait_s=max_wait_of(request))
        has_logprobs = body.logprobs is not None
        if body.stream:
            return await call.stream(generations, _Chunks(has_logprobs=has_logprobs))
        answers = await whole(generations, request)
        if answers is None:
            return Response(status_code=CLIENT_CLOSED)
        choices = [
            words.completion_choice(i, a.text, a.tokens if has_logprobs else None, a.reason)
            for i, a in enumerate(_best(answers, best_of, body.n))
        ]
        return call.whole(choices, generations, answers)


class _Chunks:
    """Choices of chunks, each beginning where the text before it ended."""

    def __init__(self, *, has_logprobs: bool) -> None:
        self._has_logprobs = has_logprobs
        self._offsets: dict[int, int] = {}

    def __call__(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        tokens = None
        offset = self._offsets.get(index, 0)
        if self._has_logprobs:
            tokens = [] if piece.token is None else [piece.token]
            self._offsets[index] = offset + sum(len(t.text) for t in tokens if not t.special)
        reason = None if piece.answer is None else piece.answer.reason
        return [words.completion_choice(index, piece.text, tokens, reason, offset=offset)]


def _best_of(body: CompletionBody) -> int:
    best_of = body.best_of or body.n
    if best_of < body.n:
        raise InvalidParameter(f"best_of: {best_of} is less than n ({body.n})", param="best_of")
    if body.stream and best_of > body.n:
        raise InvalidParameter("best_of: a stream cannot choose; send n alone", param="best_of")
    return best_of


def _asks(body: CompletionBody, adapter: str) -> list[Ask]:
    prompts: Sequence[object] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if isinstance(prompts[0], int):
        prompts = [prompts]
    return [
        Ask(text=prompt, adapter=adapter) if isinstance(prompt, str) else Ask(ids=_ids(prompt), adapter=adapter)
        for prompt in prompts
    ]


def _ids(prompt: object) -> tuple[int, ...]:
    assert isinstance(prompt, list), "the body's schema leaves nothing else"
    return tuple(prompt)


def _best(answers: Sequence[Answer], best_of: int, n: int) -> list[Answer]:
    """Of the `best_of` answers to each prompt the `n` likeliest, likeliest first; all as they are if n is all."""
    if best_of == n:
        return list(answers)
    kept: list[Answer] = []
    for i in range(0, len(answers), best_of):
        kept += sorted(answers[i : i + best_of], key=lambda a: -a.mean_logprob)[:n]
    return kept


_EXAMPLE: Final = {
    "model": "twitter-complaints",
    "prompt": "Where is my order? It was due on Monday.",
    "max_tokens": 16,
    "temperature": 0,
}
