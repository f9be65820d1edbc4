"""The bodies of inference routes: their fields, types and ranges.

Values are strict: `"5"` is no number and `true` is no count. Ranges that depend on the server's settings
(the longest answer, the number of stop strings) are checked where the settings are known, in `admission`.
These models are the schemas of the OpenAPI page.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from peft_serve.api.chat_bodies import Message, Tool, ToolChoice
from peft_serve.api.fail_fast import FAIL_FAST
from peft_serve.api.form_bodies import GrammarField, ResponseFormat, Schema, StructuredOutputs, Words

MAX_COUNT: Final = 2**31 - 1
MAX_SEED: Final = 2**63 - 1
MIN_TEMPERATURE: Final = 1e-3
MAX_MEMBERS: Final = 16
TASK: Final = "which task is meant, of an adapter that holds several"
ENSEMBLE: Final = "adapters that all answer each input; their scores are averaged"
ENSEMBLE_BY: Final = "mean: of the scores (default); vote: each member has one"


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[str], FAIL_FAST, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_COUNT)]], FAIL_FAST, Field(min_length=1)]
Stops = Annotated[list[Text], FAIL_FAST]
Choices = list[str] | dict[str, str]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
TaskId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Members = Annotated[list[Text], FAIL_FAST, Field(min_length=2, max_length=MAX_MEMBERS)]
EnsembleBy = Literal["mean", "vote"]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
LogitBias = Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Bias], Field(max_length=1024)]
LengthPenalty = Annotated[float, Field(ge=-10.0, le=10.0)]
EarlyStopping = bool | Literal["never"]
BIAS: Final = 'added to the logits of token ids, e.g. {"50256": -100}, before everything else'
BEAMS: Final = "beam search over so many continuations, as in transformers; nothing is sampled or streamed"
LENGTH_PENALTY: Final = "beams are compared by their log-probability divided by length ** length_penalty; default 1"
EARLY_STOPPING: Final = "the search ends: false (default), by a heuristic; true, with enough beams; never, for sure"


def checked_temperature(value: float | None) -> float | None:
    """0 means greedy; between 0 and the smallest temperature the division would overflow."""
    if value is not None and 0.0 < value < MIN_TEMPERATURE:
        raise ValueError(f"Input should be 0 or at least {MIN_TEMPERATURE}")
    return value


def checked_template(value: str | None) -> str | None:
    """A template has one place for the text, and no other formatting."""
    if value is not None and value.count("{text}") != 1:
        raise ValueError("Input should hold {text} exactly once")
    return value


def checked_inputs(value: Any) -> Any:
    """One sentence about inputs of the wrong type, instead of one for each type they could have had."""
    if isinstance(value, list):
        if not value:
            raise ValueError("the list is empty")
        if all(isinstance(text, str) for text in value):
            return value
    elif isinstance(value, str):
        return value
    raise ValueError("Input should be a string, or a list of strings")


def checked_prompt(value: Any) -> Any:
    """As `checked_inputs`, with token ids allowed."""
    if not isinstance(value, list) or all(isinstance(text, str) for text in value):
        if isinstance(value, list | str) and value != []:
            return value
    elif all(type(i) is int for i in value):
        return _checked_ids(value)
    elif all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in value):
        return [_checked_ids(ids) for ids in value]
    if value == []:
        raise ValueError("the list is empty")
    raise ValueError("Input should be a string, a list of strings, token ids, or a list of lists of token ids")


def _checked_ids(ids: list[int]) -> list[int]:
    if not ids:
        raise ValueError("a list of token ids is empty")
    if min(ids) < 0 or max(ids) > MAX_COUNT:
        raise ValueError("a token id is a number from 0 to the size of the vocabulary")
    return ids


def checked_words(value: Any) -> Any:
    """One error for choices of the wrong type, however many there are."""
    if value is None:
        return None
    if not isinstance(value, list | dict):
        raise ValueError("Input should be a list of strings, or an object from labels to words")
    words = value if isinstance(value, list) else [*value.keys(), *value.values()]
    if not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError("Input should hold strings that are not empty, at least one")
    return value


def checked_choices(value: list[str] | dict[str, str] | None) -> list[str] | dict[str, str] | None:
    """Labels tell the choices apart."""
    if isinstance(value, list) and len(set(value)) < len(value):
        raise ValueError("Input should not hold a choice twice")
    return value


class Body(BaseModel):
    """What every body has in common: strict types, finite numbers, no other fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Parameters(Body):
    """How to answer. Whatever is absent (or null) is the adapter's own default, else the server's."""

    max_new_tokens: int | None = Field(default=None, ge=1, le=MAX_COUNT, description="default 20")
    min_new_tokens: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    do_sample: bool | None = Field(
        default=None, description="default false, or true if temperature, top_k, top_p, min_p or typical_p is given"
    )
    temperature: float | None = Field(default=None, ge=0.0, le=100.0, description="0 = greedy")
    top_k: int | None = Field(default=None, ge=0, le=MAX_COUNT, description="0 = off")
    top_p: Share | None = None
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    typical_p: Share | None = None
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100.0)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stop: Stops | None = Field(default=None, description="the answer ends after the first of these strings")
    ignore_eos: bool | None = None
    ignore_eos_token: bool | None = Field(default=None, description="LoRAX' name of ignore_eos")
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="sample so many, answer with the likeliest; with num_beams: tell so many of the beams",
    )
    n: int | None = Field(default=None, ge=1, le=MAX_COUNT, description="the same as best_of")
    num_beams: int | None = Field(default=None, ge=1, le=MAX_COUNT, description=BEAMS)
    length_penalty: LengthPenalty | None = Field(default=None, description=LENGTH_PENALTY)
    early_stopping: EarlyStopping | None = Field(default=None, description=EARLY_STOPPING)
    logit_bias: LogitBias | None = Field(default=None, description=BIAS)
    max_time: float | None = Field(
        default=None,
        gt=0.0,
        le=86_400.0,
        description="seconds from the first step; the token of then is the last",
    )
    return_full_text: bool | None = None
    truncate: int | None = Field(default=None, ge=1, le=MAX_COUNT, description="keep the prompt's last tokens only")
    details: bool | None = None
    decoder_input_details: bool | None = Field(
        default=None, description="the prompt's tokens and their log-probabilities, as details.prefill; needs details"
    )
    top_n_tokens: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    return_k_alternatives: int | None = Field(
        default=None, ge=0, le=MAX_COUNT, description="as top_n_tokens; they stand in each token's alternative_tokens"
    )
    template: str | None = Field(default=None, description="holds {text} once; null switches the adapter's off")
    choices: Choices | None = Field(
        default=None, description="answer with one of these; null switches the adapter's off"
    )
    adapter_id: str | None = None
    task_id: TaskId | None = Field(default=None, description=TASK)
    ensemble: Members | None = Field(default=None, description=ENSEMBLE)
    ensemble_by: EnsembleBy | None = Field(default=None, description=ENSEMBLE_BY)
    json_schema: Schema | None = Field(default=None, description="the answer is JSON that the schema allows")
    regex: Text | None = Field(default=None, description="the answer matches as a whole")
    grammar: GrammarField | None = Field(default=None, description="TGI's way of saying either")
    response_format: ResponseFormat | None = Field(default=None, description="OpenAI's and LoRAX' way")

    _temperature = field_validator("temperature")(checked_temperature)
    _template = field_validator("template")(checked_template)
    _words = field_validator("choices", mode="before")(checked_words)
    _choices = field_validator("choices")(checked_choices)


class GenerateBody(Body):
    """`POST /generate`, `/generate_stream` and `/`. `parameters` are `Parameters`."""

    inputs: str | Texts
    parameters: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False
    adapter: str | Annotated[list[str | None], FAIL_FAST] | None = Field(
        default=None, description="an adapter, or one for each input (null or base: the base)"
    )
    adapter_id: str | None = None
    model: str | None = None
    ensemble: Members | None = Field(default=None, description=ENSEMBLE)
    ensemble_by: EnsembleBy | None = Field(default=None, description=ENSEMBLE_BY)

    _inputs = field_validator("inputs", mode="before")(checked_inputs)


class TokenizeBody(Body):
    """`POST /tokenize`."""

    inputs: str
    add_special_tokens: bool = True
    adapter_id: str | None = None


class StreamOptions(BaseModel):
    """OpenAI's stream options."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class OpenAIBody(Body):
    """What completions and chats have in common. The second group are this server's own additions."""

    model: str = "base"
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    n: int = Field(default=1, ge=1, le=MAX_COUNT)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0, description="default 1; 0 = greedy")
    top_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stop: Text | Stops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    adapter_id: str | None = None
    task_id: TaskId | None = Field(default=None, description=TASK)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_COUNT, description="0 or -1 = off")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    typical_p: Share | None = None
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100.0)
    num_beams: int | None = Field(default=None, ge=1, le=MAX_COUNT, description=BEAMS)
    length_penalty: LengthPenalty | None = Field(default=None, description=LENGTH_PENALTY)
    early_stopping: EarlyStopping | None = Field(default=None, description=EARLY_STOPPING)
    logit_bias: LogitBias | None = Field(default=None, description=BIAS)
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_COUNT, description="log-probabilities of the prompt's tokens, and of so many others"
    )
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    template: str | None = None
    choices: Choices | None = None

    response_format: ResponseFormat | None = None
    guided_json: Schema | str | None = None
    guided_regex: Text | None = None
    guided_choice: Words | None = None
    guided_grammar: Text | None = None
    structured_outputs: StructuredOutputs | None = None

    _temperature = field_validator("temperature")(checked_temperature)
    _template = field_validator("template")(checked_template)
    _words = field_validator("choices", mode="before")(checked_words)
    _choices = field_validator("choices")(checked_choices)


class CompletionBody(OpenAIBody):
    """`POST /v1/completions`."""

    max_tokens: int | None = Field(default=None, ge=0, le=MAX_COUNT, description="0 = only the prompt; needs echo")
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], FAIL_FAST, Field(min_length=1)]
    best_of: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    echo: bool = Field(default=False, description="the answer begins with the prompt, and so do its log-probabilities")
    add_special_tokens: bool = True

    _prompt = field_validator("prompt", mode="before")(checked_prompt)


class ChatBody(OpenAIBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], FAIL_FAST, Field(min_length=1)]
    tools: Annotated[list[Tool], FAIL_FAST] | None = None
    tool_choice: ToolChoice | None = Field(default=None, description="default auto")
    parallel_tool_calls: bool = True
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_COUNT)
