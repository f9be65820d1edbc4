"""Whether the words that an adapter brings along can be spoken here: its added tokens and its chat template."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from peft_serve.adapters.gate import Inspected
from peft_serve.adapters.verdict import quoted
from peft_serve.adapters.vocabulary import TEMPLATE_FILE, Vocabulary
from peft_serve.errors import AdapterInvalid, Refusal
from peft_serve.rendering.templates import ChatTemplates, TemplateError
from peft_serve.text import TextCodec

NOT_USED: Final = (
    f"{TEMPLATE_FILE} is not used: a template is a program, and this server was started without "
    "--allow-chat-templates; chats are put in the base's own way"
)
_MAX_SHOWN: Final = 5
_TRIAL: Final = ({"role": "user", "content": "Hello"},)


def with_speech_checked(
    inspected: Inspected, codec: TextCodec, *, vocab_size: int, templates: ChatTemplates | None
) -> Inspected:
    """What the gate found, with what is to be told of its words; of words that the base has too, nothing is kept.

    Raises AdapterInvalid. A template may refuse the message it is tried with; one that cannot be read is refused.
    """
    inspected = _with_rows(inspected, vocab_size)
    own = codec.speaking(inspected.vocabulary, vocab_size=vocab_size, with_template=templates is not None)
    inspected = replace(inspected, vocabulary=replace(inspected.vocabulary, foundation=None))  # it holds
    if templates is None and codec.has_news_in_template(inspected.vocabulary):
        inspected = _warned(inspected, NOT_USED)
    if templates is not None and own.own_template is not None:
        try:
            templates.render(own.own_template, _TRIAL, own.template_words)
        except TemplateError as error:
            if error.is_syntax:
                reason = f"is no template: {error.message}; save the tokenizer again"
                raise AdapterInvalid([Refusal(TEMPLATE_FILE, reason)]) from error
    return replace(inspected, vocabulary=Vocabulary()) if own is codec else inspected


def _with_rows(inspected: Inspected, vocab_size: int) -> Inspected:
    """Without tokens that the base has no row for.

    Many adapters were saved beside a tokenizer with a padding token that nothing ever used; one that was used came
    with a resized embedding, which the gate does not let in.
    """
    kept = inspected.vocabulary.within(vocab_size)
    beyond = sorted(inspected.vocabulary.added.keys() - kept.added.keys())
    if not beyond:
        return inspected
    shown = ", ".join(quoted(text) for text in beyond[:_MAX_SHOWN])
    told = f"{len(beyond)} added tokens are not used, their ids are beyond the base's {vocab_size} rows: {shown}"
    return _warned(replace(inspected, vocabulary=kept), told)


def _warned(inspected: Inspected, text: str) -> Inspected:
    summary = inspected.summary
    return replace(inspected, summary=replace(summary, warnings=(*summary.warnings, text)))
