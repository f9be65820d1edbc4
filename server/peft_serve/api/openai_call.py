"""What `/v1/completions` and `/v1/chat/completions` share: reading fields, the envelope, usage, streams.

Fields are translated into the native vocabulary; refusals use the names that were sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api import openai_words as words
from peft_serve.api.bodies import OpenAIBody
from peft_serve.api.generation import Generation
from peft_serve.api.json_response import compact_json, json_response
from peft_serve.api.naming import BASE_NAME, Mention, agreed_name, agreed_task, mentions_of, model_mention
from peft_serve.api.plan import Answer, Piece
from peft_serve.api.problems import Family, body_of, problem_of
from peft_serve.api.replies import grouped, merged, stream_headers, streamed, whole_headers
from peft_serve.api.service import Service
from peft_serve.api.sse import DONE, event
from peft_serve.errors import ServeError

DEFAULTS: Final = {"do_sample": True}
"""OpenAI samples at temperature 1 unless told otherwise."""

NAMES: Final = {
    "max_new_tokens": "max_tokens",
    "num_answers": "n",
    "min_new_tokens": "min_tokens",
    "truncate": "truncate_prompt_tokens",
}

_SAME: Final = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "ignore_eos",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "logit_bias",
)

ChoicesOf = Callable[[int, Piece], list[dict[str, Any]]]
"""The chunks' choices that a piece of the answer at an index makes."""


def explicit_parameters(body: OpenAIBody) -> dict[str, Any]:
    """What the body says, as `bodies.Parameters` would; nulls only where they switch something off."""
    said = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    renamed = {
        "max_new_tokens": body.max_tokens,
        "min_new_tokens": body.min_tokens,
        "truncate": body.truncate_prompt_tokens,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
    }
    said |= {name: value for name, value in renamed.items() if value is not None}
    said |= {name: getattr(body, name) for name in ("template", "choices") if name in body.model_fields_set}
    return said


class OpenAICall:
    """One call: who is asked, and the envelope of the answer."""

    def __init__(
        self, service: Service, request: Request, body: OpenAIBody, *, prefix: str, kind: str, answers_per_prompt: int
    ) -> None:
        base = service.parts.base.name
        mentions = (
            *mentions_of(request),
            Mention("adapter_id", body.adapter_id or ""),
            *model_mention(body.model, base),
        )
        self.adapter = agreed_name(mentions, base)
        self.task = agreed_task(request, body.task_id)
        self._settings = service.parts.settings
        self._request = request
        self._has_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._answers_per_prompt = answers_per_prompt
        self._head = {
            "id": service.new_id(prefix),
            "object": kind,
            "created": int(service.now()),
            "model": base if self.adapter == BASE_NAME else self.adapter,
            "system_fingerprint": service.system_fingerprint,
        }

    def whole(
        self,
        choices: list[dict[str, Any]],
        generations: Sequence[Generation],
        answers: Sequence[Answer],
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> Response:
        """A whole answer. A prompt that is answered several times counts once."""
        content = self._head | {"choices": choices, "usage": self._usage_of(generations, answers)} | dict(extra)
        return json_response(content, headers=whole_headers(generations, answers))

    async def stream(self, generations: Sequence[Generation], choices_of: ChoicesOf) -> Response:
        return await streamed(
            self._events(generations, choices_of),
            generations,
            self._request,
            on_error=_error_events,
            keep_alive_s=self._settings.keep_alive_s,
            headers=lambda: stream_headers(generations),
        )

    async def _events(self, generations: Sequence[Generation], choices_of: ChoicesOf) -> AsyncIterator[bytes]:
        head = self._head | ({"usage": None} if self._has_usage else {})
        same = f"data: {compact_json(head)[:-1]}"  # of every chunk, written once
        answers: dict[int, Answer] = {}
        async for index, piece in merged(generations):
            for choice in choices_of(index, piece):
                yield f'{same},"choices":[{compact_json(choice)}]}}\n\n'.encode()
            if piece.answer is not None:
                answers[index] = piece.answer
        if self._has_usage:
            yield event(head | {"choices": [], "usage": self._usage(answers)})
        yield DONE

    def _usage_of(self, generations: Sequence[Generation], answers: Sequence[Answer]) -> dict[str, Any]:
        groups = grouped(generations, answers, self._answers_per_prompt)
        firsts = [group[0][1] for group in groups]
        return words.usage(
            sum(answer.num_prompt_tokens for answer in firsts),
            sum(len(answer.tokens) for group in groups for _, answer in group),
            sum(answer.num_cached_tokens for answer in firsts),
        )

    def _usage(self, answers: dict[int, Answer]) -> dict[str, Any]:
        firsts = [answer for i, answer in answers.items() if i % self._answers_per_prompt == 0]
        return words.usage(
            sum(answer.num_prompt_tokens for answer in firsts),
            sum(len(answer.tokens) for answer in answers.values()),
            sum(answer.num_cached_tokens for answer in firsts),
        )


def _error_events(error: ServeError) -> bytes:
    return event(body_of(problem_of(error, Family.OPENAI), Family.OPENAI)) + DONE
