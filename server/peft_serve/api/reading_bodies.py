"""The bodies of the routes that read and do not generate: their fields, types and ranges; as strict as `bodies`."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator

from peft_serve.api.bodies import (
    ENSEMBLE,
    ENSEMBLE_BY,
    MAX_COUNT,
    TASK,
    Body,
    Choices,
    EnsembleBy,
    Members,
    TaskId,
    TokenIds,
    checked_choices,
    checked_inputs,
    checked_prompt,
    checked_template,
    checked_words,
)
from peft_serve.api.fail_fast import FAIL_FAST

MAX_ANSWER_LEN: Final = 512
Pooling = Literal["first", "last", "mean"]
AdapterName = str | Annotated[list[str | None], FAIL_FAST]
_ADAPTER = "an adapter, or one for each input (null or base: the base)"
_CUTS = "cut what is too long instead of refusing it"


class TextPair(Body):
    """Two texts that belong together, or one."""

    text: str
    text_pair: str | None = None


class Question(Body):
    """A question, and the text that holds the answer."""

    question: str = Field(min_length=1)
    context: str = Field(min_length=1)


Classified = str | TextPair | Question


def checked_texts(value: Any) -> Any:
    """Strings, pairs and questions, or a list of them; one sentence about anything else."""
    if isinstance(value, list):
        if not value:
            raise ValueError("the list is empty")
        return [_checked_text(each) for each in value]
    return _checked_text(value)


def _checked_text(value: Any) -> Classified:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        fields = {name: text for name, text in value.items() if text is not None}
        if fields and all(isinstance(text, str) and text for text in fields.values()):
            if fields.keys() == {"question", "context"}:
                return Question(**fields)
            if fields.keys() <= {"text", "text_pair"} and "text" in fields:
                return TextPair(**fields)
        empty = [name for name, text in fields.items() if text == ""]
        if empty:
            raise ValueError(f"{empty[0]} is empty")
    raise ValueError(
        'Input should be a string, {"text", "text_pair"}, {"question", "context"}, or a list of one of them'
    )


class ClassifyParameters(Body):
    """How to answer. What concerns another kind of head than the one that answers is without effect."""

    top_k: int | None = Field(
        default=None, ge=1, le=MAX_COUNT, description="the likeliest only; default all, answers 1"
    )
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        default=None, description="from logits to scores; default softmax, and sigmoid for one label"
    )
    aggregation_strategy: Literal["none", "simple"] | None = Field(
        default=None, description="simple: neighbouring tokens of one entity are one"
    )
    ignore_labels: list[str] | None = Field(default=None, description='of tokens; default ["O"]')
    max_answer_len: int | None = Field(default=None, ge=1, le=MAX_ANSWER_LEN, description="in tokens; default 15")
    handle_impossible_answer: bool | None = Field(default=None, description="an empty answer is one of them")
    align_to_words: bool | None = Field(default=None, description="answers begin and end with a word; default true")
    choices: Choices | None = Field(default=None, description="labels, where no head has any")
    template: str | None = Field(default=None, description="holds {text} once; null switches the adapter's off")
    truncate: bool | None = Field(default=None, description=_CUTS)
    details: bool | None = Field(default=None, description="an object for each input, with the adapter and the members")
    adapter_id: str | None = None
    task_id: TaskId | None = Field(default=None, description=TASK)
    ensemble: Members | None = Field(default=None, description=ENSEMBLE)
    ensemble_by: EnsembleBy | None = Field(default=None, description=ENSEMBLE_BY)

    _template = field_validator("template")(checked_template)
    _words = field_validator("choices", mode="before")(checked_words)
    _choices = field_validator("choices")(checked_choices)


class ClassifyBody(Body):
    """`POST /classify`. `parameters` are `ClassifyParameters`."""

    inputs: Classified | Annotated[list[Classified], FAIL_FAST, Field(min_length=1)]
    parameters: dict[str, Any] = Field(default_factory=dict)
    adapter: AdapterName | None = Field(default=None, description=_ADAPTER)
    adapter_id: str | None = None
    model: str | None = None
    ensemble: Members | None = Field(default=None, description=ENSEMBLE)
    ensemble_by: EnsembleBy | None = Field(default=None, description=ENSEMBLE_BY)

    _inputs = field_validator("inputs", mode="before")(checked_texts)


class EmbedParameters(Body):
    """How to read an embedding."""

    pooling: Pooling | None = Field(default=None, description="of the last hidden states; default mean")
    normalize: bool | None = Field(default=None, description="to length 1; default false")
    truncate: bool | None = Field(default=None, description=_CUTS)
    template: str | None = Field(default=None, description="holds {text} once; null switches the adapter's off")
    adapter_id: str | None = None
    task_id: TaskId | None = Field(default=None, description=TASK)

    _template = field_validator("template")(checked_template)


class EmbedBody(EmbedParameters):
    """`POST /embed`. `parameters` are `EmbedParameters`, which may also stand beside `inputs`."""

    inputs: str | Annotated[list[str], FAIL_FAST, Field(min_length=1)]
    parameters: dict[str, Any] = Field(default_factory=dict)
    adapter: AdapterName | None = Field(default=None, description=_ADAPTER)
    model: str | None = None

    _inputs = field_validator("inputs", mode="before")(checked_inputs)


class EmbeddingsBody(Body):
    """`POST /v1/embeddings`. The second group are this server's own additions."""

    input: str | Annotated[list[str], FAIL_FAST, Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], FAIL_FAST]
    model: str = "base"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, le=MAX_COUNT, description="the base's own number or nothing")

    adapter_id: str | None = None
    task_id: TaskId | None = Field(default=None, description=TASK)
    pooling: Pooling | None = Field(default=None, description="of the last hidden states; default mean")
    normalize: bool | None = Field(default=None, description="to length 1; default false")
    truncate: bool | None = Field(default=None, description=_CUTS)
    template: str | None = Field(default=None, description="holds {text} once; null switches the adapter's off")

    _input = field_validator("input", mode="before")(checked_prompt)
    _template = field_validator("template")(checked_template)
