"""What LoRAX' clients say in words of their own, and how they are answered. Pure functions.

`ignore_eos_token` is `ignore_eos`; `return_k_alternatives` is `top_n_tokens` with another place in the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_serve.api.bodies import Parameters
from peft_serve.api.plan import Token
from peft_serve.errors import InvalidParameter


def plain_words(parameters: Parameters) -> Parameters:
    """The same in this server's words; raises InvalidParameter where both are used and differ.

    `ignore_eos_token: false` says nothing: LoRAX' client sends it with every request.
    """
    alternatives, top = parameters.return_k_alternatives, parameters.top_n_tokens
    if alternatives and top is not None and alternatives != top:
        raise InvalidParameter(
            "return_k_alternatives: means the same as top_n_tokens, and they differ; send one",
            param="return_k_alternatives",
        )
    if parameters.ignore_eos_token and parameters.ignore_eos is False:
        raise InvalidParameter(
            "ignore_eos_token: means the same as ignore_eos, and they differ; send one", param="ignore_eos_token"
        )
    said: dict[str, Any] = {"top_n_tokens": alternatives} if alternatives else {}
    if parameters.ignore_eos_token:
        said["ignore_eos"] = True
    return parameters.model_copy(update=said) if said else parameters


def alternatives_of(tokens: Sequence[Token]) -> list[list[dict[str, Any]]]:
    """The likeliest tokens at the place of each, as LoRAX tells them."""
    return [[{"id": a.id, "text": a.text, "logprob": a.logprob} for a in token.top] for token in tokens]
