"""`POST /v1/chat/completions`: the messages of a chat, answered by the base or an adapter.

An adapter with a template is asked with what the user said last: it was trained on single texts.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api import fields
from peft_serve.api import openai_words as words
from peft_serve.api.bodies import ChatBody
from peft_serve.api.json_body import read_object, validated
from peft_serve.api.openai_call import DEFAULTS, NAMES, OpenAICall, explicit_parameters
from peft_serve.api.openapi import json_body, openai_error_responses
from peft_serve.api.plan import Ask, Call, Piece, Style
from peft_serve.api.replies import CLIENT_CLOSED, whole
from peft_serve.api.service import Service
from peft_serve.api.waiting import max_wait_of
from peft_serve.errors import InvalidParameter


class ChatRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(tags=["openai"])
        router.add_api_route(
            "/v1/chat/completions",
            self.chat_completions,
            methods=["POST"],
            summary="Answer the last message of a chat",
            openapi_extra=json_body("ChatBody", _EXAMPLE, has_adapter=True),
            responses=openai_error_responses(400, 404, 413, 415, 429, 500, 503),
        )
        return router

    async def chat_completions(self, request: Request) -> Response:
        body = validated(ChatBody, await read_object(request), fields.CHAT)
        if body.top_logprobs and not body.logprobs:
            raise InvalidParameter("top_logprobs: needs logprobs to be true", param="top_logprobs")
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        call = OpenAICall(self._service, request, body, prefix="chatcmpl-", kind=kind, answers_per_prompt=body.n)
        messages = tuple({"role": message.role, "content": message.text} for message in body.messages)
        admitted = Call(
            asks=(Ask(messages=messages, adapter=call.adapter),),
            explicit=explicit_parameters(body) | _longest(body) | call.task,
            style=Style(
                defaults=DEFAULTS,
                max_new_tokens=None,
                keep_stop=False,
                names=NAMES
                | {"inputs": "messages", "top_n_tokens": "top_logprobs"}
                | ({"max_new_tokens": "max_completion_tokens"} if _longest(body) else {}),
            ),
            num_answers=body.n,
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        generations = await self._service.open().admit(admitted, max_wait_s=max_wait_of(request))
        if body.stream:
            return await call.stream(generations, _Chunks(has_logprobs=body.logprobs))
        answers = await whole(generations, request)
        if answers is None:
            return Response(status_code=CLIENT_CLOSED)
        choices = [words.chat_choice(i, a, has_logprobs=body.logprobs) for i, a in enumerate(answers)]
        return call.whole(choices, generations, answers)


class _Chunks:
    """Choices of chunks: the role once, the words as they come, and the reason of the end by itself."""

    def __init__(self, *, has_logprobs: bool) -> None:
        self._has_logprobs = has_logprobs
        self._begun: set[int] = set()

    def __call__(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        choices = []
        if index not in self._begun:
            self._begun.add(index)
            choices.append(words.chat_delta(index, {"role": "assistant", "content": ""}))
        has_tokens = self._has_logprobs and piece.token is not None and not piece.token.special
        if piece.text or has_tokens:
            tokens = [piece.token] if has_tokens and piece.token is not None else None
            choices.append(words.chat_delta(index, {"content": piece.text}, tokens))
        if piece.answer is not None:
            choices.append(words.chat_delta(index, {}, reason=piece.answer.reason))
        return choices


def _longest(body: ChatBody) -> dict[str, int]:
    """OpenAI's newer name for max_tokens, if it was used."""
    if body.max_completion_tokens is None:
        return {}
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidParameter("max_tokens: differs from max_completion_tokens; send one", param="max_tokens")
    return {"max_new_tokens": body.max_completion_tokens}


_EXAMPLE: Final = {
    "model": "base",
    "messages": [{"role": "user", "content": "Say hello."}],
    "max_tokens": 16,
    "temperature": 0,
}
