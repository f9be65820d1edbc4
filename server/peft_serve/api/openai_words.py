"""Answers, chunks and model cards in OpenAI's words. Pure functions; knows no request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from peft_serve.api.plan import Answer, Token
from peft_serve.core import FinishReason

FINISH_REASONS: Final = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


def usage(num_prompt: int, num_completion: int, num_cached: int) -> dict[str, Any]:
    """`num_cached` prompt tokens were found in the prefix cache."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def model_card(name: str, *, created: int, max_model_len: int, parent: str | None = None) -> dict[str, Any]:
    """A model of the list; an adapter names the base as its parent."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "peft-serve",
        "root": name,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [],
    }


def completion_logprobs(tokens: Sequence[Token], *, offset: int = 0, has_prompt: bool = False) -> dict[str, list[Any]]:
    """Four parallel lists; `offset` is where the text begins.

    Special tokens are no text and are left out, but not behind a prompt: whoever asks for its log-probabilities
    counts on one entry for each token id.
    """
    shown = [token for token in tokens if has_prompt or not token.special]
    offsets = []
    for token in shown:
        offsets.append(offset)
        offset += 0 if token.special else len(token.text)
    return {
        "text_offset": offsets,
        "token_logprobs": [token.logprob for token in shown],
        "tokens": [token.text for token in shown],
        "top_logprobs": [_tops(token) for token in shown],
    }


def _tops(token: Token) -> dict[str, float] | None:
    """The alternatives, and the token itself where there are any; None where nothing is known."""
    if token.logprob is None:
        return None
    own = {token.text: token.logprob} if token.top else {}
    return own | {each.text: each.logprob for each in token.top}


def prompt_logprobs(tokens: Sequence[Token]) -> list[dict[str, Any] | None]:
    """As vLLM tells them: for each token of the prompt, by id, its own log-probability and those of others."""
    told: list[dict[str, Any] | None] = []
    for token in tokens:
        if token.logprob is None:
            told.append(None)
            continue
        ranked = {str(each.id): (rank, each.text, each.logprob) for rank, each in enumerate(token.top, start=1)}
        entries = {str(token.id): (None, token.text, token.logprob)} | ranked
        told.append({i: {"logprob": p, "rank": rank, "decoded_token": text} for i, (rank, text, p) in entries.items()})
    return told


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """One entry for each token that is text."""
    content = [
        _entry(token.text, token.logprob)
        | {"top_logprobs": [_entry(alternative.text, alternative.logprob) for alternative in token.top]}
        for token in tokens
        if not token.special
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


def completion_choice(
    index: int,
    text: str,
    tokens: Sequence[Token] | None,
    reason: FinishReason | None,
    *,
    offset: int = 0,
    has_prompt: bool = False,
) -> dict[str, Any]:
    """A choice of a text completion, whole or a chunk; `tokens` is None when no log-probabilities are asked for."""
    return {
        "index": index,
        "text": text,
        "logprobs": None if tokens is None else completion_logprobs(tokens, offset=offset, has_prompt=has_prompt),
        "finish_reason": None if reason is None else FINISH_REASONS[reason],
    }


def chat_choice(index: int, answer: Answer, *, has_logprobs: bool) -> dict[str, Any]:
    """A choice of a whole chat completion."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": chat_logprobs(answer.tokens) if has_logprobs else None,
        "finish_reason": FINISH_REASONS[answer.reason],
    }


def chat_delta(
    index: int, delta: dict[str, str], tokens: Sequence[Token] | None = None, reason: FinishReason | None = None
) -> dict[str, Any]:
    """A choice of a chunk of a chat completion."""
    return {
        "index": index,
        "delta": delta,
        "logprobs": None if tokens is None else chat_logprobs(tokens),
        "finish_reason": None if reason is None else FINISH_REASONS[reason],
    }
