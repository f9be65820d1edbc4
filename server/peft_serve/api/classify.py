"""`POST /classify`: texts, pairs and questions, answered by a task head or by scored choices.

Answers have the shape of transformers' pipelines; what an ensemble's members said is told in the details.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api import fields
from peft_serve.api.ensembles import describe_members, pooled
from peft_serve.api.json_body import read_object, validated
from peft_serve.api.json_response import json_response
from peft_serve.api.labels import IGNORED, MAX_ANSWER_LEN, answers_of, checked_rows, entities_of, ranked, scores_of
from peft_serve.api.naming import Mention, agreed_task, named_adapters, named_members
from peft_serve.api.openapi import error_responses, json_body
from peft_serve.api.plan import Answer, Ask, Call, Plan, Purpose
from peft_serve.api.principal import principal_of
from peft_serve.api.reading_bodies import Classified, ClassifyBody, ClassifyParameters, Question
from peft_serve.api.replies import CLIENT_CLOSED, whole, whole_headers
from peft_serve.api.service import Service
from peft_serve.api.splitting import session_of
from peft_serve.api.waiting import max_wait_of

MANY_TOKENS: Final = 2048
"""From so many on, the logits of single tokens are turned into answers beside the event loop."""

_EXPLICIT: Final = ("choices", "template")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """A read body: the call, and how its answer is to look."""

    call: Call
    parameters: ClassifyParameters
    is_list: bool


class ClassifyRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(tags=["classify"])
        summary = "Label texts, their tokens, or the answer in a context; by a task head or by choices"
        for path, what in (("/classify", summary), ("/classify_batch", "As /classify, by LoRAX' name for a list")):
            router.add_api_route(
                path,
                self.classify,
                methods=["POST"],
                summary=what,
                openapi_extra=json_body("ClassifyBody", _EXAMPLE, has_adapter=True),
                responses=error_responses(400, 404, 413, 415, 422, 429, 500, 503),
            )
        return router

    async def classify(self, request: Request) -> Response:
        return await self.answer(await read_object(request), request)

    async def answer(self, body: dict[str, Any], request: Request) -> Response:
        """The answer to a body that has been read."""
        wish = self._read(body, request)
        generations = await self._service.open().admit(
            wish.call, principal_of(request), max_wait_s=max_wait_of(request), session=session_of(request)
        )
        answers = await whole(generations, request)
        if answers is None:
            return Response(status_code=CLIENT_CLOSED)
        plans = [generation.plan for generation in generations]
        n = wish.call.num_members
        work = [self._told(wish, plans[i : i + n], answers[i : i + n]) for i in range(0, len(answers), n)]
        num_rows = sum(len(answer.rows) for answer in answers)
        content = (
            await self._service.text_threads.run(principal_of(request).tenant.name, num_rows, _done, work)
            if num_rows > MANY_TOKENS
            else _done(work)
        )
        # Scores of a whole text stand in a list for each text, also where there is one; so do hub clients read them.
        is_flat = not wish.is_list and (bool(wish.parameters.details) or _is_spread(plans[0]))
        return json_response(content[0] if is_flat else content, headers=whole_headers(generations, answers))

    def _read(self, fields_: dict[str, Any], request: Request) -> _Wish:
        body = validated(ClassifyBody, fields_, fields.CLASSIFY)
        parameters = validated(ClassifyParameters, body.parameters, fields.CLASSIFY_PARAMETERS, path="parameters.")
        inputs = body.inputs if isinstance(body.inputs, list) else [body.inputs]
        mentioned = (
            Mention("parameters.adapter_id", parameters.adapter_id or ""),
            Mention("adapter_id", body.adapter_id or ""),
        )
        members = named_members(request, mentioned, body.adapter, parameters.ensemble, body.ensemble)
        if members:
            asks = [_ask(each, name) for each in inputs for name in members]
        else:
            base = self._service.parts.base.name
            names = named_adapters(request, mentioned, body.adapter, body.model, num_inputs=len(inputs), base_name=base)
            asks = [_ask(each, name) for each, name in zip(inputs, names, strict=True)]
        if parameters.ensemble_by is None:
            parameters = parameters.model_copy(update={"ensemble_by": body.ensemble_by})
        said = {name: getattr(parameters, name) for name in _EXPLICIT if name in parameters.model_fields_set}
        call = Call(
            asks=tuple(asks),
            explicit=said | agreed_task(request, parameters.task_id),
            purpose=Purpose.CLASSIFY,
            cuts=bool(parameters.truncate),
            num_members=max(1, len(members)),
        )
        return _Wish(call=call, parameters=parameters, is_list=isinstance(body.inputs, list))

    def _told(self, wish: _Wish, plans: Sequence[Plan], answers: Sequence[Answer]) -> Callable[[], Any]:
        """What tells the answer to one input: rows of logits become words when it is called."""
        parameters = wish.parameters
        if len(plans) > 1:
            return lambda: _ensemble(plans, answers, parameters)
        return lambda: _single(plans[0], answers[0], parameters)


def _done(work: Sequence[Callable[[], Any]]) -> list[Any]:
    return [each() for each in work]


def _ask(text: Classified, adapter: str) -> Ask:
    if isinstance(text, str):
        return Ask(text=text, adapter=adapter)
    if isinstance(text, Question):
        return Ask(text=text.question, pair=text.context, is_question=True, adapter=adapter)
    return Ask(text=text.text, pair=text.text_pair, adapter=adapter)


def _is_spread(plan: Plan) -> bool:
    """Whether the answer to one text is a list of things in the text."""
    return plan.head is not None and plan.head.task != "SEQ_CLS"


def _scores(plan: Plan, answer: Answer, parameters: ClassifyParameters) -> list[tuple[str, float]]:
    """Each label of a whole text with its score."""
    if plan.head is None:
        return [(score.label, score.score) for score in answer.scores]
    (row,) = checked_rows(answer.rows, 1)
    return list(zip(plan.labels, scores_of(row, parameters.function_to_apply), strict=True))


def _single(plan: Plan, answer: Answer, parameters: ClassifyParameters) -> Any:
    content: list[dict[str, Any]]
    if not _is_spread(plan):
        content = ranked(_scores(plan, answer, parameters), parameters.top_k)
    else:
        content = _spread(plan, answer, parameters)
    if not parameters.details:
        return content
    task = "choices" if plan.head is None else plan.head.task
    return {
        "task": task,
        "answer": content,
        "adapter": plan.served.describe(),
        "prompt_tokens": answer.num_prompt_tokens,
        "members": None,
    }


def _spread(plan: Plan, answer: Answer, parameters: ClassifyParameters) -> list[dict[str, Any]]:
    encoded = plan.encoded
    assert plan.head is not None, "nothing is spread without a head"
    assert encoded is not None, "a reading knows its tokens"
    rows = checked_rows(answer.rows, len(encoded.ids))
    if plan.head.task == "TOKEN_CLS":
        return entities_of(
            rows,
            plan.labels,
            encoded,
            plan.prompt_text,
            plan.codec,
            ignored=IGNORED if parameters.ignore_labels is None else parameters.ignore_labels,
            is_grouped=parameters.aggregation_strategy == "simple",
        )
    return answers_of(
        rows,
        encoded,
        plan.pair_text,
        plan.codec,
        top_k=parameters.top_k or 1,
        max_answer_len=parameters.max_answer_len or MAX_ANSWER_LEN,
        with_none=bool(parameters.handle_impossible_answer),
        align_to_words=parameters.align_to_words is not False,
    )


def _ensemble(plans: Sequence[Plan], answers: Sequence[Answer], parameters: ClassifyParameters) -> Any:
    members = [_scores(plan, answer, parameters) for plan, answer in zip(plans, answers, strict=True)]
    whole_scores = pooled([dict(scores) for scores in members], parameters.ensemble_by or "mean")
    content = [{"label": label, "score": score} for label, score in whole_scores.items()][: parameters.top_k]
    if not parameters.details:
        return content
    return {
        "task": "choices" if plans[0].head is None else plans[0].head.task,
        "answer": content,
        "adapter": describe_members([plan.served for plan in plans]),
        "prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
        "members": [
            {"adapter": plan.served.describe(), "answer": ranked(scores, None)}
            for plan, scores in zip(plans, members, strict=True)
        ],
    }


_EXAMPLE: Final = {
    "inputs": "Where is my order? It was due on Monday.",
    "adapter": "twitter-complaints",
    "parameters": {"choices": ["complaint", "no complaint"]},
}
