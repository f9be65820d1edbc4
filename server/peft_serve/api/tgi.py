"""`POST /tokenize` and `GET /info`: what TGI's clients ask a server about itself."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve import __version__
from peft_serve.api import fields
from peft_serve.api.abilities import generates, pipeline_tag, tasks_of
from peft_serve.api.adapter_views import head_view
from peft_serve.api.bodies import TokenizeBody
from peft_serve.api.json_body import read_object, validated
from peft_serve.api.json_response import json_response
from peft_serve.api.naming import BASE_NAME, Mention, agreed_name, mentions_of
from peft_serve.api.openapi import error_responses, json_body
from peft_serve.api.principal import principal_of
from peft_serve.api.prompts import LONG_TEXT_CHARS
from peft_serve.api.service import Service
from peft_serve.api.splitting import session_of
from peft_serve.errors import InvalidParameter
from peft_serve.text import TextCodec

CONTEXTS_TO_TOKENIZE: Final = 4
LEAST_TO_TOKENIZE: Final = 8192
"""The longest answer of `/tokenize` in tokens: so many contexts of the base, and never less than this."""

TOKENIZE_COST: Final = 8
"""So many times as long as tokenising takes it to tell each token's text as well."""


class TGIRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(tags=["generate"])
        router.add_api_route(
            "/tokenize",
            self.tokenize,
            methods=["POST"],
            summary="The tokens of a text, with their places in the decoded text",
            openapi_extra=json_body("TokenizeBody", _EXAMPLE, has_adapter=True),
            responses=error_responses(400, 404, 413, 415, 422, 429, 503),
        )
        router.add_api_route(
            "/info", self.info, methods=["GET"], summary="The base model and the limits of this server"
        )
        return router

    async def tokenize(self, request: Request) -> Response:
        body = validated(TokenizeBody, await read_object(request), fields.TOKENIZE)
        parts = self._service.parts
        most = max(CONTEXTS_TO_TOKENIZE * parts.base.max_context, LEAST_TO_TOKENIZE)
        mentions = (*mentions_of(request), Mention("adapter_id", body.adapter_id or ""))
        name = agreed_name(mentions, parts.base.name)
        codec = (
            parts.codec
            if name == BASE_NAME
            else await self._service.open().codec_of(name, principal_of(request), session=session_of(request))
        )
        if len(body.inputs) <= LONG_TEXT_CHARS // TOKENIZE_COST:
            return json_response(tokens_of(codec, body, most))
        tenant, cost = principal_of(request).tenant.name, len(body.inputs) * TOKENIZE_COST
        return json_response(await self._service.text_threads.run(tenant, cost, tokens_of, codec, body, most))

    async def info(self) -> Response:
        parts = self._service.parts
        settings, base = parts.settings, parts.base
        return json_response(
            {
                "model_id": base.name,
                "model_sha": None,
                "model_dtype": base.dtype,
                "model_device_type": base.device,
                "model_pipeline_tag": pipeline_tag(base),
                "max_concurrent_requests": settings.max_rows + settings.max_queue,
                "max_best_of": settings.max_inputs,
                "max_stop_sequences": settings.max_stop_sequences,
                "max_input_tokens": base.max_context - (1 if generates(base) and not base.is_encoder_decoder else 0),
                "max_total_tokens": base.max_context,
                "max_new_tokens": settings.max_new_tokens,
                "max_client_batch_size": settings.max_inputs,
                "max_top_n_tokens": settings.max_top_logprobs,
                "max_choices": settings.max_choices,
                "max_num_beams": settings.max_num_beams,
                "max_adapter_bytes": settings.max_adapter_bytes,
                "max_rank": settings.max_rank,
                "validation_workers": 1,
                "router": "peft-serve",
                "version": __version__,
                "sha": None,
                "docker_label": None,
                "base": {
                    "family": base.family,
                    "class": base.class_name,
                    "num_parameters": base.num_parameters,
                    "quantisation": base.quantisation,
                    "is_encoder_decoder": base.is_encoder_decoder,
                    "is_encoder": base.is_encoder,
                    "tasks": tasks_of(base, None),
                    "head": head_view(base.head),
                    "labels": list(base.labels) or None,
                },
            }
        )


def tokens_of(codec: TextCodec, body: TokenizeBody, most: int) -> list[dict[str, Any]]:
    """Each token with its place in the text that the tokens decode to; a special token is no text.

    Raises InvalidParameter for more than `most` tokens: each is decoded by itself, which running requests notice.
    """
    fewest = codec.fewest_tokens(body.inputs)
    if fewest > most:
        raise InvalidParameter(
            f"inputs: at least {fewest} tokens; this route tells at most {most} of one text; send it in parts",
            param="inputs",
        )
    ids = codec.encode(body.inputs, add_special_tokens=body.add_special_tokens)
    if len(ids) > most:
        raise InvalidParameter(
            f"inputs: {len(ids)} tokens; this route tells at most {most} of one text; send it in parts", param="inputs"
        )
    decoder = codec.detokenizer(())
    tokens, at = [], 0
    for i, id_ in enumerate(ids):
        piece = decoder.push(id_)
        if i + 1 == len(ids):
            piece += decoder.flush()
        start, at = at, at + len(piece)
        tokens.append({"id": id_, "text": codec.token_text(id_), "start": start, "stop": at})
    return tokens


_EXAMPLE: Final = {"inputs": "Where is my order?"}
