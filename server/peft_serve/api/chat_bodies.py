"""The messages and tools of a chat, as OpenAI writes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from peft_serve.api.fail_fast import FAIL_FAST


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class ContentPart(_Part):
    """A piece of a message. Only text is understood."""

    type: str
    text: str | None = None

    @field_validator("type")
    @classmethod
    def _is_text(cls, value: str) -> str:
        if value != "text":
            raise ValueError("only parts of type text are served")
        return value


class CalledFunction(_Part):
    """What the model called: the arguments are JSON text, or an object."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str | dict[str, Any] = "{}"


class MessageCall(_Part):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Part):
    """One message of a chat."""

    role: Annotated[str, Field(min_length=1)]
    content: str | Annotated[list[ContentPart], FAIL_FAST] | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageCall], FAIL_FAST] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The message's words."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


class Function(_Part):
    """A function that may be called; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Part):
    """A tool that the model is told of."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Part):
    """The name of a function."""

    name: Annotated[str, Field(min_length=1)]


class NamedChoice(_Part):
    """A tool that has to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice
