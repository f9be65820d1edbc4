"""The fields by which clients ask for an answer of a given form: OpenAI's, vLLM's, TGI's and LoRAX'.

These models are part of the bodies in `bodies`; what they mean is `forms`' business.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Schema = dict[str, Any]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)


class NamedSchema(_Part):
    """OpenAI's `json_schema`: a schema with a name. `strict` or not, the answer follows it."""

    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    """OpenAI's `response_format`; LoRAX puts the schema of a `json_object` beside the type, TGI calls it `value`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Schema | str | None = Field(default=None, alias="schema")
    value: Schema | None = None


class GrammarField(_Part):
    """TGI's `grammar`: `value` is a schema (`json`), a pattern (`regex`), or a schema with a name (`json_schema`)."""

    type: Literal["json", "regex", "json_schema"]
    value: Schema | str


class StructuredOutputs(_Part):
    """vLLM's `structured_outputs`: one of the first five."""

    json_: Schema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Words | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_fallback: bool | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None
    structural_tag: None = None
