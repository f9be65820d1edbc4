"""Fields that clients send and that are no field of ours: which are harmless, and which are refused and why.

A refused field is let pass when its value asks for nothing (`num_beams: 1`). A field in neither table is
unknown, and refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Refused:
    """Something this server does not do, said with the way out, and the values that do not ask for it."""

    reason: str
    inert: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRules:
    """How the fields of one body are sorted. A field of the body's model is in neither table."""

    refused: Mapping[str, Refused] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    nullable: frozenset[str] = frozenset()  # null says something here: it switches the adapter's own value off


_NULLABLE: Final = frozenset({"template", "choices"})
_GROUPS: Final = Refused("diverse beam search is not served; leave it out, or send 1", (1,))
_BEAMS: Final = Refused("send num_beams", (False,))
_AUDIO: Final = Refused("only text is served; leave it out", (["text"],))

PARAMETERS: Final = FieldRules(
    refused={
        "num_beam_groups": _GROUPS,
        "diversity_penalty": Refused("diverse beam search is not served; leave it out, or send 0.0", (0, 0.0)),
        "no_repeat_ngram_size": Refused("not served; use repetition_penalty", (0,)),
        "penalty_alpha": Refused("contrastive search is not served; leave it out"),
        "watermark": Refused("watermarks are not served; send false", (False,)),
        "schema": Refused("send it as json_schema"),
        "bad_words_ids": Refused("not served; use logit_bias", ([],)),
        "merged_adapters": Refused("say it in adapter_id: a:0.7+b:0.3"),
        "adapter_source": Refused("adapters are uploaded, by PUT /adapters/{name}; send local", ("local", "")),
        "apply_chat_template": Refused("use POST /v1/chat/completions", (False,)),
    },
    ignored=frozenset({"api_token", "use_cache", "cache_salt", "return_tensors", "clean_up_tokenization_spaces"}),
    nullable=_NULLABLE,
)

GENERATE: Final = FieldRules(
    refused={"adapter_source": PARAMETERS.refused["adapter_source"]},
    ignored=frozenset({"options", "user", "metadata", "priority", "api_token"}),
)

_STREAM: Final = Refused("is answered whole; send false", (False,))  # LoRAX' client sends false

CLASSIFY: Final = FieldRules(refused={"stream": _STREAM}, ignored=GENERATE.ignored)

_WHOLE: Final = Refused("a text is read in one pass; send it in parts, or set truncate")

CLASSIFY_PARAMETERS: Final = FieldRules(
    refused={
        "stride": _WHOLE,
        "doc_stride": _WHOLE,
        "max_seq_len": _WHOLE,
        "max_question_len": _WHOLE,
        "is_split_into_words": Refused("texts are split by the base's tokenizer; send them whole", (False,)),
        "return_all_scores": Refused("all scores are given unless top_k says otherwise; use top_k", (True,)),
    },
    ignored=frozenset({"api_token"}),
    nullable=_NULLABLE,
)

EMBED: Final = FieldRules(
    refused={
        "stream": _STREAM,
        "prompt_name": Refused("named prompts are not served; send the whole text, or a template"),
        "truncation_direction": Refused("a text is cut at its end; send right", ("right", "Right")),
        "dimensions": Refused("vectors have the base's own length; leave it out"),
        "encoding_format": Refused("use POST /v1/embeddings", ("float",)),
    },
    ignored=GENERATE.ignored,
    nullable=frozenset({"template"}),
)

TOKENIZE: Final = FieldRules(ignored=frozenset({"parameters", "options", "model"}))

_OPENAI_IGNORED: Final = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "prompt_cache_options",
        "parallel_tool_calls", "reasoning_effort", "verbosity", "priority",
        "request_id", "cache_salt", "skip_special_tokens", "spaces_between_special_tokens",
        "add_generation_prompt", "tool_prompt", "guideline", "guided_decoding_backend",
    }
)  # fmt: skip

_OPENAI_REFUSED: Final = {
    "guided_whitespace_pattern": Refused("white space in JSON is the server's choice; leave it out"),
    "use_beam_search": _BEAMS,
    "bad_words": Refused("not served; use logit_bias", ([],)),
}

COMPLETIONS: Final = FieldRules(
    refused={
        **_OPENAI_REFUSED,
        "suffix": Refused("text is not filled in; leave it out", ("",)),
        "prompt_embeds": _AUDIO,
    },
    ignored=_OPENAI_IGNORED,
    nullable=_NULLABLE,
)

EMBEDDINGS: Final = FieldRules(
    ignored=frozenset({"user", "metadata", "request_id", "priority", "cache_salt"}),
    nullable=frozenset({"template"}),
)

CHAT: Final = FieldRules(
    refused={
        **_OPENAI_REFUSED,
        "functions": Refused("OpenAI's older name; use tools", ([],)),
        "function_call": Refused("OpenAI's older name; use tool_choice", ("none", "auto")),
        "modalities": _AUDIO,
        "audio": _AUDIO,
        "prediction": Refused("predicted outputs are not served; leave it out"),
        "moderation": Refused("not served; leave it out"),
        "web_search_options": Refused("not served; leave it out"),
        "echo": Refused("the messages are not sent back; send false", (False,)),
        "chat_template": Refused("the adapter's or the base's own chat template is used; leave it out"),
        "best_of": Refused("not served for chats; use n", (1,)),
    },
    ignored=_OPENAI_IGNORED,
    nullable=_NULLABLE,
)
