"""`POST /v1/chat/completions`: the messages of a chat, answered by the base or an adapter.

An adapter with a template is asked with what the user said last: it was trained on single texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api import fields
from peft_serve.api import openai_words as words
from peft_serve.api.bodies import ChatBody
from peft_serve.api.chat_answers import ArgumentsReader, CallsReader, ChatChunks, Reader, WordsReader, chat_choice
from peft_serve.api.forms import Form, field_of, form_of_openai
from peft_serve.api.generation import Generation
from peft_serve.api.json_body import read_object, validated
from peft_serve.api.openai_call import DEFAULTS, NAMES, OpenAICall, explicit_parameters
from peft_serve.api.openapi import json_body, openai_error_responses
from peft_serve.api.plan import Ask, Call, Style
from peft_serve.api.principal import principal_of
from peft_serve.api.replies import CLIENT_CLOSED, grouped, whole
from peft_serve.api.service import Service
from peft_serve.api.splitting import session_of
from peft_serve.api.tool_syntax import ToolSyntax, syntax_of
from peft_serve.api.tools import ToolUse, rendered_message, tool_use_of
from peft_serve.api.waiting import max_wait_of
from peft_serve.errors import InvalidParameter

_CALL_ID_CHARS: Final = 29  # of `call_` and a random part, as OpenAI's are
_MISTRAL_ID_CHARS: Final = 9  # letters and digits; its templates refuse every other id when the call comes back


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
        messages = tuple(rendered_message(message) for message in body.messages)
        use = tool_use_of(body.tools, body.tool_choice, is_parallel=body.parallel_tool_calls)
        admitted = Call(
            asks=(Ask(messages=messages, tools=use, adapter=call.adapter),),
            form=_form(body, use),
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
            prompt_logprobs=body.prompt_logprobs if _wants_prompt(body) else None,
            is_streamed=body.stream,
        )
        generations = await self._service.open().admit(
            admitted, principal_of(request), max_wait_s=max_wait_of(request), session=session_of(request)
        )
        if body.stream:
            chunks = ChatChunks(has_logprobs=body.logprobs, make_reader=lambda: self._reader(use, generations))
            return await call.stream(generations, chunks)
        answers = await whole(generations, request)
        if answers is None:
            return Response(status_code=CLIENT_CLOSED)
        told = [answer for group in grouped(generations, answers, body.n) for _, answer in group]
        choices = [
            chat_choice(i, a, self._reader(use, generations), has_logprobs=body.logprobs) for i, a in enumerate(told)
        ]
        extra = {"prompt_logprobs": words.prompt_logprobs(told[0].prompt_tokens)} if _wants_prompt(body) else {}
        return call.whole(choices, generations, answers, extra)

    def _reader(self, use: ToolUse | None, generations: Sequence[Generation]) -> Reader:
        """What reads an answer, in the syntax of the chat template it was asked by."""
        if use is None:
            return WordsReader()
        template = generations[0].plan.codec.chat_template or ""
        setting = self._service.parts.settings.tool_call_parser
        is_mistral = (setting or syntax_of(template)) == ToolSyntax.MISTRAL
        new_id = self._new_mistral_id if is_mistral else self._new_call_id
        if use.named is not None:
            return ArgumentsReader(use.named, new_id)
        syntax = use.syntax(template, setting)
        assert syntax is not None, "admission refuses tools without a syntax"
        return CallsReader(syntax, use.is_single, new_id)

    def _new_call_id(self) -> str:
        return self._service.new_id("call_")[:_CALL_ID_CHARS]

    def _new_mistral_id(self) -> str:
        return self._service.new_id()[-_MISTRAL_ID_CHARS:]


def _form(body: ChatBody, use: ToolUse | None) -> Form | None:
    """What the answer is to look like, by itself or because a tool has to be called; raises InvalidParameter."""
    form = form_of_openai(body)
    if use is None or use.form is None:
        return form
    if form is not None:
        raise InvalidParameter(
            f"{form.place}: tool_choice says already that the answer is a call; send one of them",
            param=field_of(form.place),
        )
    return use.form


def _wants_prompt(body: ChatBody) -> bool:
    """Whether log-probabilities of the prompt are asked for; raises InvalidParameter in a stream."""
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidParameter("prompt_logprobs: not told in a stream; leave it out", param="prompt_logprobs")
    return body.prompt_logprobs is not None


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
