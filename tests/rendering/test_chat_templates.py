"""Templates of strangers: rendered as transformers renders them, and harmless whatever they do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from peft_serve.errors import QueueFull, Unavailable
from peft_serve.rendering.templates import ChatTemplates, TemplateError

CHATML = (
    "{% for message in messages %}<{{ message.role }}>{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hé \u2028 <b>"}]
WORDS = {"eos_token": "</s>", "bos_token": "<s>"}


@pytest.fixture(scope="module")
def templates() -> Iterator[ChatTemplates]:
    made = ChatTemplates(time_limit_s=1.0)
    yield made
    made.close()


def test_a_template_is_rendered_as_transformers_renders_it(templates: ChatTemplates, tiny_tokenizer: Any) -> None:
    expected = tiny_tokenizer.apply_chat_template(
        MESSAGES, chat_template=CHATML, tokenize=False, add_generation_prompt=True
    )
    assert templates.render(CHATML, MESSAGES, tiny_tokenizer.special_tokens_map) == expected
    assert expected.endswith("<assistant>")
    assert templates.render("{{ messages[0].name is defined }}", [{"role": "user", "name": None}], {}) == "False"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
        ("{{ 10**(10**9) }}", "more than 1 s"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ 'a' * (2 * 10**6) }}", "of at most 1048576"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ '\\ud800' }}", "surrogates"),
    ],
)
def test_a_hostile_template_costs_its_own_request_only(templates: ChatTemplates, template: str, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError, match=reason) as refused:
        templates.render(template, MESSAGES, WORDS)
    assert not refused.value.is_syntax
    assert time.monotonic() - began < 30
    assert templates.render("{{ bos_token }}", MESSAGES, WORDS) == "<s>", "the next one is served"


def test_what_is_no_template_is_told_apart(templates: ChatTemplates) -> None:
    with pytest.raises(TemplateError, match="unexpected") as refused:
        templates.render("{% for", MESSAGES, WORDS)
    assert refused.value.is_syntax


def test_no_more_wait_than_may() -> None:
    templates = ChatTemplates(max_waiting=1)

    async def two() -> list[Any]:
        calls = [templates.rendered("ok", MESSAGES, WORDS) for _ in range(2)]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second = asyncio.run(two())
    templates.close()
    assert first == "ok"
    assert isinstance(second, QueueFull)


def test_a_child_that_does_not_start_is_told() -> None:
    templates = ChatTemplates(start_limit_s=0.0)
    with pytest.raises(Unavailable, match="does not start"):
        templates.render("ok", MESSAGES, WORDS)
    templates.close()
    templates.close()


def test_tools_are_rendered_as_transformers_renders_them(templates: ChatTemplates, tiny_tokenizer: Any) -> None:
    template = "{% for tool in tools or [] %}{{ tool.function | tojson }}{% endfor %}{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    expected = tiny_tokenizer.apply_chat_template(MESSAGES, chat_template=template, tools=tools, tokenize=False)
    assert templates.render(template, MESSAGES, WORDS, tools) == expected
    assert templates.render(template, MESSAGES, WORDS) == MESSAGES[0]["content"]
