"""The tools of a chat: what the caller offers, whether a call is wanted, and the grammar of one that must come.

Knows the chat template's text and no tokenizer; how calls are written is `tool_syntax`' business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from peft_serve.api.chat_bodies import Message, MessageCall, NamedChoice, Tool
from peft_serve.api.forms import Form, formed
from peft_serve.api.tool_syntax import ToolSyntax, syntax_of
from peft_serve.errors import InvalidParameter
from peft_serve.grammars.grammar import of_json_schema

MAX_TOOLS: Final = 128

_ANY_ARGUMENTS: Final = {"type": "object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What is offered, and what has to come of it."""

    offered: tuple[Mapping[str, Any], ...]  # in OpenAI's words, as chat templates want them
    form: Form | None = None  # of an answer that must be a call
    named: str | None = None  # the answer is the arguments of this function
    is_single: bool = False  # one call at most

    @property
    def is_free(self) -> bool:
        """Whether the model decides, in its own syntax."""
        return self.form is None

    def syntax(self, template: str, setting: str | None) -> ToolSyntax | None:
        """How the answer's calls are written; None where no syntax is known."""
        if not self.is_free:
            return ToolSyntax.LIST
        return ToolSyntax(setting) if setting else syntax_of(template)

    def check(self, template: str | None, setting: str | None) -> None:
        """Raise InvalidParameter for a chat template (None: there is none) that does not know tools."""
        if template is None or "tools" not in template:
            reason = "the base has no chat template" if template is None else "the chat template does not know tools"
            raise InvalidParameter(f"tools: {reason}; describe them in a message, or leave them out", param="tools")
        if self.syntax(template, setting) is None:
            raise InvalidParameter(
                "tools: how this base writes tool calls is not known; the operator can say it (--tool-call-parser), "
                "or send tool_choice required",
                param="tools",
            )


def tool_use_of(tools: Sequence[Tool] | None, choice: str | NamedChoice | None, *, is_parallel: bool) -> ToolUse | None:
    """What a chat says about tools; None: nothing. Raises InvalidParameter."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidParameter("tool_choice: there are no tools to choose from; send tools", param="tool_choice")
        return None
    _check(tools)
    offered = tuple(tool.model_dump(exclude_unset=True) for tool in tools)
    if choice == "none":
        return None
    if choice in (None, "auto"):
        return ToolUse(offered=offered, is_single=not is_parallel)
    if choice == "required":
        schema = _list_of_calls(tools, is_parallel=is_parallel)
        return ToolUse(offered=offered, form=formed("tools", lambda: of_json_schema(schema)), is_single=not is_parallel)
    assert isinstance(choice, NamedChoice), "the body's schema leaves nothing else"
    name = choice.function.name
    named = next((tool for tool in tools if tool.function.name == name), None)
    if named is None:
        raise InvalidParameter(f"tool_choice: no tool is called {name!r}; name one of the tools", param="tool_choice")
    parameters = named.function.parameters or _ANY_ARGUMENTS
    return ToolUse(offered=offered, form=formed("tools", lambda: of_json_schema(parameters)), named=name)


def rendered_message(message: Message) -> dict[str, Any]:
    """A message as chat templates want it: the arguments of calls are objects there, not text."""
    said: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        said["tool_calls"] = [_rendered_call(call) for call in message.tool_calls]
    if message.role == "tool":
        said |= {k: v for k, v in (("tool_call_id", message.tool_call_id), ("name", message.name)) if v is not None}
    return said


def _rendered_call(call: MessageCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):  # a model wrote it, and a template shows it as it is
            arguments = call.function.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _check(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise InvalidParameter(f"tools: {len(tools)}; at most {MAX_TOOLS} are taken", param="tools")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidParameter("tools: two of them have the same name; names tell them apart", param="tools")


def _list_of_calls(tools: Sequence[Tool], *, is_parallel: bool) -> dict[str, Any]:
    """The schema of a list of calls. Definitions of the tools' schemas move to its top, where references look."""
    definitions: dict[str, dict[str, Any]] = {}
    items = []
    for tool in tools:
        parameters = dict(tool.function.parameters or _ANY_ARGUMENTS)
        for key in ("$defs", "definitions"):
            for name, definition in (parameters.pop(key, None) or {}).items():
                if definitions.setdefault(key, {}).setdefault(name, definition) != definition:
                    raise InvalidParameter(
                        f"tools: two tools define {name!r} differently in {key}; give one of them another name",
                        param="tools",
                    )
        items.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": items}, **definitions}
    return schema if is_parallel else schema | {"maxItems": 1}
