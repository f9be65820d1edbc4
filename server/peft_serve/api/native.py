"""`POST /generate` and `/generate_stream`: the native routes, which TGI's and LoRAX' clients call as well.

Knows their bodies, answers and events; what runs is `admission`'s business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api import fields
from peft_serve.api.bodies import GenerateBody, Parameters
from peft_serve.api.ensembles import describe_members, pooled
from peft_serve.api.forms import form_of_parameters
from peft_serve.api.generation import Generation
from peft_serve.api.json_body import read_object, validated
from peft_serve.api.json_response import compact_json, json_response, json_text
from peft_serve.api.lorax import alternatives_of, plain_words
from peft_serve.api.naming import Mention, agreed_task, named_adapters, named_members
from peft_serve.api.openapi import error_responses, json_body
from peft_serve.api.plan import Answer, Ask, Call, Plan, Style, Token
from peft_serve.api.principal import principal_of
from peft_serve.api.problems import Family, body_of, problem_of
from peft_serve.api.replies import CLIENT_CLOSED, grouped, merged, stream_headers, streamed, whole, whole_headers
from peft_serve.api.service import Service
from peft_serve.api.splitting import session_of
from peft_serve.api.sse import event
from peft_serve.api.waiting import max_wait_of
from peft_serve.core import FinishReason
from peft_serve.errors import InvalidParameter, ServeError

FINISH_REASONS: Final = {
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
    FinishReason.LENGTH: "length",
}


_NAMES: Final = {"prompt_logprobs": "decoder_input_details", "num_answers": "best_of"}
_STYLE: Final = Style(names=_NAMES)
_LORAX_STYLE: Final = Style(names=_NAMES | {"top_n_tokens": "return_k_alternatives"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """A read body: the call, and how its answer is to look."""

    call: Call
    is_list: bool
    stream: bool
    details: bool
    ensemble_by: str = "mean"
    has_alternatives: bool = False


class NativeRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._settings = service.parts.settings

    def router(self) -> APIRouter:
        router = APIRouter(tags=["generate"])
        routes = (
            ("/generate", self.generate, "Generate from one input or a list of them"),
            ("/generate_stream", self.generate_stream, "Generate as a stream of tokens"),
        )
        for path, endpoint, summary in routes:
            router.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                summary=summary,
                openapi_extra=json_body("GenerateBody", _EXAMPLE, has_adapter=True),
                responses=error_responses(400, 404, 413, 415, 422, 429, 500, 503),
            )
        return router

    async def generate(self, request: Request) -> Response:
        wish = await self._read(request)
        return await (self._stream(wish, request) if wish.stream else self._whole(wish, request))

    async def generate_stream(self, request: Request) -> Response:
        return await self._stream(await self._read(request, stream=True), request)

    async def compat_generate(self, request: Request) -> Response:
        """As `/generate`, for clients that know no path; answers with a list."""
        wish = await self._read(request)
        if wish.stream:
            return await self._stream(wish, request)
        return await self._whole(wish, request, always_list=True)

    async def _read(self, request: Request, *, stream: bool = False) -> _Wish:
        body = validated(GenerateBody, await read_object(request), fields.GENERATE)
        parameters = plain_words(validated(Parameters, body.parameters, fields.PARAMETERS, path="parameters."))
        best_of = _best_of(parameters)
        inputs = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        stream = stream or body.stream
        if stream and len(inputs) > 1:
            raise InvalidParameter("inputs: a stream answers one input; send a string", param="inputs")
        if stream and best_of > 1:
            raise InvalidParameter("best_of: a stream is one answer; send 1", param="best_of")
        mentioned = (
            Mention("parameters.adapter_id", parameters.adapter_id or ""),
            Mention("adapter_id", body.adapter_id or ""),
        )
        members = named_members(request, mentioned, body.adapter, parameters.ensemble, body.ensemble)
        if stream and parameters.decoder_input_details:
            name = "decoder_input_details"
            raise InvalidParameter(f"{name}: not told in a stream; send false", param=name)
        if members and (stream or best_of > 1):
            raise InvalidParameter("ensemble: answers whole, and once; leave stream and best_of out", param="ensemble")
        if members:
            asks = [Ask(text=text, adapter=name) for text in inputs for name in members]
        else:
            base = self._service.parts.base.name
            names = named_adapters(request, mentioned, body.adapter, body.model, num_inputs=len(inputs), base_name=base)
            asks = [Ask(text=text, adapter=name) for text, name in zip(inputs, names, strict=True)]
        wants_logprobs = stream or best_of > 1 or bool(parameters.details) or bool(parameters.top_n_tokens)
        call = Call(
            asks=tuple(asks),
            explicit=parameters.model_dump(exclude_unset=True) | agreed_task(request, parameters.task_id),
            num_answers=best_of,
            num_logprobs=(parameters.top_n_tokens or 0) if wants_logprobs else None,
            num_members=max(1, len(members)),
            form=form_of_parameters(parameters),
            prompt_logprobs=0 if parameters.details and parameters.decoder_input_details else None,
            style=_STYLE if parameters.return_k_alternatives is None else _LORAX_STYLE,
            is_streamed=stream,
        )
        return _Wish(
            call=call,
            is_list=not isinstance(body.inputs, str),
            stream=stream,
            details=bool(parameters.details),
            has_alternatives=bool(parameters.return_k_alternatives),
            ensemble_by=parameters.ensemble_by or body.ensemble_by or "mean",
        )

    async def _whole(self, wish: _Wish, request: Request, *, always_list: bool = False) -> Response:
        generations = await self._service.open().admit(
            wish.call, principal_of(request), max_wait_s=max_wait_of(request), session=session_of(request)
        )
        answers = await whole(generations, request)
        if answers is None:
            return Response(status_code=CLIENT_CLOSED)
        n = wish.call.num_answers * wish.call.num_members
        tell = _ensemble if wish.call.num_members > 1 else _answer
        groups = grouped(generations, answers, n)
        content = [tell([g for g, _ in group], [a for _, a in group], wish) for group in groups]
        headers = whole_headers(generations, answers)
        return json_response(content if wish.is_list or always_list else content[0], headers=headers)

    async def _stream(self, wish: _Wish, request: Request) -> Response:
        generations = await self._service.open().admit(
            wish.call, principal_of(request), max_wait_s=max_wait_of(request), session=session_of(request)
        )
        return await streamed(
            _events(generations),
            generations,
            request,
            on_error=_error_event,
            keep_alive_s=self._settings.keep_alive_s,
            headers=lambda: stream_headers(generations),
        )


def _best_of(parameters: Parameters) -> int:
    if parameters.n and parameters.best_of and parameters.n != parameters.best_of:
        raise InvalidParameter("n: means the same as best_of here, and they differ; send one", param="n")
    return parameters.best_of or parameters.n or 1


def _answer(generations: Sequence[Generation], answers: Sequence[Answer], wish: _Wish) -> dict[str, Any]:
    """The likeliest of the answers to one input; the others are told in its details."""
    order = sorted(range(len(answers)), key=lambda i: -answers[i].merit)
    best = order[0]
    plan = generations[best].plan
    content = {"generated_text": _text(plan, answers[best]), "adapter": plan.served.describe()}
    if wish.details:
        others = [_sequence(generations[i].plan, answers[i]) for i in order[1:]]
        content["details"] = details = _details(plan, answers[best]) | {"best_of_sequences": others or None}
        if wish.has_alternatives:
            for token, others_there in zip(details["tokens"], alternatives_of(answers[best].tokens), strict=True):
                token["alternative_tokens"] = others_there
    return content


def _ensemble(generations: Sequence[Generation], answers: Sequence[Answer], wish: _Wish) -> dict[str, Any]:
    """The choice that the members make together; each member's own is told in the details."""
    scores = pooled([{s.label: s.score for s in answer.scores} for answer in answers], wish.ensemble_by)
    best, plan = next(iter(scores)), generations[0].plan
    content: dict[str, Any] = {
        "generated_text": plan.prompt_text + best if plan.full_text else best,
        "adapter": describe_members([generation.plan.served for generation in generations]),
    }
    if wish.details:
        said = next((answer for answer in answers if answer.text == best), answers[0])
        content["details"] = _details(plan, said) | {
            "choices": [{"label": label, "score": score} for label, score in scores.items()],
            "members": [_answer([g], [a], wish) for g, a in zip(generations, answers, strict=True)],
        }
    return content


def _text(plan: Plan, answer: Answer) -> str:
    return plan.prompt_text + answer.text if plan.full_text else answer.text


def _sequence(plan: Plan, answer: Answer) -> dict[str, Any]:
    """One of several answers, as TGI tells it."""
    has_top = plan.request.sampling.num_top_logprobs > 0
    return ({} if answer.score is None else {"score": answer.score}) | {
        "generated_text": _text(plan, answer),
        "finish_reason": FINISH_REASONS[answer.reason],
        "generated_tokens": len(answer.tokens),
        "seed": plan.request.sampling.seed,
        "prefill": [_prefill(token) for token in answer.prompt_tokens],
        "tokens": [_token(token) for token in answer.tokens],
        "top_tokens": [_top(token) for token in answer.tokens] if has_top else [],
    }


def _details(plan: Plan, answer: Answer) -> dict[str, Any]:
    content = _sequence(plan, answer)
    del content["generated_text"]
    content |= {
        "prompt_tokens": answer.num_prompt_tokens,
        "input_length": answer.num_prompt_tokens,
        "skipped_tokens": answer.num_cached_tokens,
    }
    if answer.scores:
        content["choices"] = [{"label": s.label, "score": s.score, "logprob": s.logprob} for s in answer.scores]
    return content


def _token(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
        "skipped": False,
    }


def _prefill(token: Token) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": token.logprob}


def _top(token: Token) -> list[dict[str, Any]]:
    return [{"id": a.id, "text": a.text, "logprob": a.logprob, "special": False} for a in token.top]


async def _events(generations: Sequence[Generation]) -> AsyncIterator[bytes]:
    """One event for each token; the last has the whole text and the details."""
    plan = generations[0].plan
    index = 0
    async for _, piece in merged(generations):
        index += 1
        token = piece.token or Token(id=0, text=piece.text, logprob=None, special=not piece.text)
        if piece.answer is None:
            yield _token_event(index, token)
        else:
            content = {
                "index": index,
                "token": _token(token),
                "top_tokens": _top(token),
                "generated_text": _text(plan, piece.answer),
                "details": _details(plan, piece.answer),
                "adapter": plan.served.describe(),
            }
            yield event(content, space=False)


def _token_event(index: int, token: Token) -> bytes:
    """The event of a token that is not the last, as `event` would write it: thousands are made a second."""
    logprob = "null" if token.logprob is None else float.__repr__(token.logprob)
    special = "true" if token.special else "false"
    top = compact_json(_top(token)) if token.top else "[]"
    return (
        f'data:{{"index":{index},"token":{{"id":{token.id},"text":{json_text(token.text)},"logprob":{logprob},'
        f'"special":{special},"skipped":false}},"top_tokens":{top},"generated_text":null,"details":null}}\n\n'
    ).encode()


def _error_event(error: ServeError) -> bytes:
    return event(body_of(problem_of(error, Family.TGI), Family.TGI), space=False)


_EXAMPLE: Final = {
    "inputs": "Where is my order? It was due on Monday.",
    "adapter": "twitter-complaints",
    "parameters": {"max_new_tokens": 20, "details": True},
}
