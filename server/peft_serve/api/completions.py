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
from peft_serve.api.forms import form_of_openai
from peft_serve.api.generation import Generation
from peft_serve.api.json_body import read_object, validated
from peft_serve.api.openai_call import DEFAULTS, NAMES, OpenAICall, explicit_parameters
from peft_serve.api.openapi import json_body, openai_error_responses
from peft_serve.api.plan import Answer, Ask, Call, Piece, Style, Token
from peft_serve.api.principal import principal_of
from peft_serve.api.replies import CLIENT_CLOSED, grouped, whole
from peft_serve.api.service import Service
from peft_serve.api.splitting import session_of
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
            form=form_of_openai(body),
            style=Style(
                defaults=DEFAULTS,
                max_new_tokens=DEFAULT_MAX_TOKENS,
                keep_stop=False,
                names=NAMES
                | {"inputs": "prompt", "top_n_tokens": "logprobs"}
                | ({"num_answers": "best_of"} if best_of > body.n else {}),
                add_special_tokens=body.add_special_tokens,
            ),
            num_answers=best_of,
            # Choosing the best needs the log-probabilities even if nobody asked to see them.
            num_logprobs=0 if body.logprobs is None and best_of > body.n else body.logprobs,
            prompt_logprobs=_of_prompt(body, has_encoder=self._service.parts.base.is_encoder_decoder),
            is_streamed=body.stream,
        )
        generations = await self._service.open().admit(
            admitted, principal_of(request), max_wait_s=max_wait_of(request), session=session_of(request)
        )
        if body.stream:
            return await call.stream(generations, _Chunks(body, generations))
        answers = await whole(generations, request)
        if answers is None:
            return Response(status_code=CLIENT_CLOSED)
        told = [each for group in grouped(generations, answers, best_of) for each in _best(group, body.n)]
        choices = [_choice(i, generation, answer, body) for i, (generation, answer) in enumerate(told)]
        return call.whole(choices, generations, answers)


class _Chunks:
    """Choices of chunks, each beginning where the text before it ended; the first with the prompt if it is echoed."""

    def __init__(self, body: CompletionBody, generations: Sequence[Generation]) -> None:
        self._has_logprobs = body.logprobs is not None
        self._echoes = body.echo
        self._generations = generations
        self._offsets: dict[int, int] = {}

    def __call__(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        begins = index not in self._offsets
        offset, text = self._offsets.setdefault(index, 0), piece.text
        tokens: list[Token] | None = None
        if self._has_logprobs:
            tokens = [] if piece.token is None else [piece.token]
            if begins:
                tokens = [*self._generations[index].prompt_tokens, *tokens]
            self._offsets[index] = offset + sum(len(t.text) for t in tokens if not t.special)
        if begins and self._echoes:
            text = self._generations[index].plan.prompt_text + text
        reason = None if piece.answer is None else piece.answer.reason
        return [words.completion_choice(index, text, tokens, reason, offset=offset, has_prompt=self._echoes)]


def _choice(index: int, generation: Generation, answer: Answer, body: CompletionBody) -> dict[str, Any]:
    """One answer, behind its prompt if that is echoed."""
    text, tokens = answer.text, answer.tokens
    if body.echo:
        text, tokens = generation.plan.prompt_text + text, (*answer.prompt_tokens, *tokens)
    choice = words.completion_choice(
        index, text, None if body.logprobs is None else tokens, answer.reason, has_prompt=body.echo
    )
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = words.prompt_logprobs(answer.prompt_tokens)
    return choice


def _of_prompt(body: CompletionBody, *, has_encoder: bool) -> int | None:
    """How many alternatives are wanted to each token of the prompt; None: nothing is wanted of them."""
    if body.max_tokens == 0 and not body.echo:
        raise InvalidParameter("max_tokens: 0 generates nothing; send echo: true, or at least 1", param="max_tokens")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidParameter("prompt_logprobs: not told in a stream; use echo and logprobs", param="prompt_logprobs")
    echoed = body.logprobs if body.echo else None
    if has_encoder and echoed is not None:
        raise InvalidParameter("echo: an encoder gives its text no log-probabilities; leave logprobs out", param="echo")
    wanted = [number for number in (echoed, body.prompt_logprobs) if number is not None]
    return max(wanted, default=0 if body.max_tokens == 0 else None)


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


def _best(answers: Sequence[tuple[Generation, Answer]], n: int) -> list[tuple[Generation, Answer]]:
    """Of the answers to one prompt the `n` likeliest, likeliest first; all as they are if `n` is all."""
    if len(answers) <= n:
        return list(answers)
    return sorted(answers, key=lambda each: -each[1].merit)[:n]


_EXAMPLE: Final = {
    "model": "twitter-complaints",
    "prompt": "Where is my order? It was due on Monday.",
    "max_tokens": 16,
    "temperature": 0,
}
