"""From parameters to `SamplingParams`: layers of defaults, and the bounds that settings and context set.

The layers, from below: the family of routes, the adapter's profile, the call. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from peft_serve.adapters.records import Profile
from peft_serve.api import fields
from peft_serve.api.bodies import Parameters
from peft_serve.api.json_body import validated
from peft_serve.api.plan import Call, Style
from peft_serve.config import Settings
from peft_serve.core import SamplingParams
from peft_serve.errors import InvalidParameter

MAX_STOP_CHARS: Final = 1024

_SAMPLING_FIELDS: Final = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_PLAIN_FIELDS: Final = (
    *_SAMPLING_FIELDS,
    "min_new_tokens",
    "do_sample",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "ignore_eos",
    "num_beams",
    "length_penalty",
    "early_stopping",
)


def layered(call: Call, profile: Profile) -> dict[str, Any]:
    """The parameters of a call with everything below them filled in; raises InvalidParameter."""
    own: Mapping[str, Any] = {}
    if profile.parameters:
        # What the gate let in was good for the server of that day; this one may serve less.
        read = validated(Parameters, profile.parameters, fields.PARAMETERS, path="peft_serve.json parameters.")
        own = read.model_dump(exclude_unset=True)
    said = _with_sampling(own, call.style) | _with_sampling(call.explicit, call.style)
    if said.get("num_beams", 1) > 1:
        if said.get("do_sample"):
            name = call.style.name("num_beams")
            raise InvalidParameter(
                f"{name}: a search finds the likeliest answer, and do_sample (or a temperature) draws one; "
                f"send a temperature of 0, or {name} 1",
                param=name,
            )
        said["do_sample"] = False
    return _with_sampling(call.style.defaults, call.style) | said


def _with_sampling(layer: Mapping[str, Any], style: Style) -> dict[str, Any]:
    """The layer's values, with what they say about sampling said outright: temperature 0 is greedy, and a
    temperature (or a cut of the distribution) without a word on `do_sample` asks for sampling, as in TGI."""
    said = {name: value for name, value in layer.items() if value is not None or name in fields.PARAMETERS.nullable}
    if said.get("temperature") == 0:
        if said.get("do_sample"):
            name = style.name("temperature")
            raise InvalidParameter(f"{name}: 0 means greedy, and do_sample is true; leave one out", param=name)
        del said["temperature"]
        said["do_sample"] = False
    elif "do_sample" not in said and any(name in said for name in _SAMPLING_FIELDS):
        said["do_sample"] = True
    return said


def sampling_params(merged: Mapping[str, Any], call: Call, *, max_new_tokens: int) -> SamplingParams:
    """What the sampler is told; the seed is filled in at admission."""
    num_logprobs, bias = call.num_logprobs, merged.get("logit_bias") or {}
    given = {name: merged[name] for name in _PLAIN_FIELDS if name in merged}
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        logprobs=num_logprobs is not None,
        num_top_logprobs=num_logprobs or 0,
        logit_bias=tuple(sorted((int(id_), float(value)) for id_, value in bias.items())),
        num_sequences=call.num_answers if merged.get("num_beams", 1) > 1 else 1,
        **given,
    )


def stops_of(merged: Mapping[str, Any], settings: Settings, style: Style) -> tuple[str, ...]:
    """The stop strings; raises InvalidParameter when there are too many, or one is too long."""
    stops = tuple(merged.get("stop") or ())
    name = style.name("stop")
    if len(stops) > settings.max_stop_sequences:
        raise InvalidParameter(
            f"{name}: {len(stops)} strings; this server takes {settings.max_stop_sequences}", param=name
        )
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise InvalidParameter(f"{name}: a string has at most {MAX_STOP_CHARS} characters", param=name)
    return stops


def check_bounds(merged: Mapping[str, Any], max_new_tokens: int, call: Call, settings: Settings) -> None:
    """Raise InvalidParameter for what is in range by itself and beyond this server or its neighbours."""
    longest, least = call.style.name("max_new_tokens"), call.style.name("min_new_tokens")
    if max_new_tokens > settings.max_new_tokens:
        raise InvalidParameter(
            f"{longest}: {max_new_tokens}; this server generates at most {settings.max_new_tokens} tokens",
            param=longest,
        )
    if merged.get("min_new_tokens", 0) > max_new_tokens:
        raise InvalidParameter(
            f"{least}: {merged['min_new_tokens']} is more than {longest} ({max_new_tokens})", param=least
        )
    for number, parameter in ((call.num_logprobs, "top_n_tokens"), (call.prompt_logprobs, "prompt_logprobs")):
        if (number or 0) > settings.max_top_logprobs:
            name = call.style.name(parameter)
            raise InvalidParameter(
                f"{name}: {number}; this server reports at most {settings.max_top_logprobs}", param=name
            )
    if merged.get("num_beams", 1) > 1:
        _check_beams(merged["num_beams"], call, settings)


def _check_beams(num_beams: int, call: Call, settings: Settings) -> None:
    most, name, number = min(settings.max_num_beams, settings.max_rows), call.style.name("num_beams"), call.num_answers
    if num_beams > most:
        raise InvalidParameter(f"{name}: {num_beams}; this server follows at most {most}", param=name)
    if number > num_beams:
        raise InvalidParameter(f"n: {number} answers of {num_beams} beams; ask for more {name}", param="n")
    if call.is_streamed:
        raise InvalidParameter(
            f"stream: the first word of a beam search is known at its end; send false, or {name} 1", param="stream"
        )


def check_bias(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidParameter for an id that the base cannot say."""
    largest = max((id_ for id_, _ in sampling.logit_bias), default=0)
    if largest >= vocab_size:
        raise InvalidParameter(
            f"logit_bias: token id {largest} is not in the vocabulary of {vocab_size} entries; see POST /tokenize",
            param="logit_bias",
        )
