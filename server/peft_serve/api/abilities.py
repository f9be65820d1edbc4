"""What a base can be asked, and what an adapter adds to it: text, a task head's labels, hidden states.

Pure functions over the base's card; every refusal names what works instead.
"""

from __future__ import annotations

from typing import Final

from peft_serve.adapters.records import HeadFacts, Profile
from peft_serve.api.served import Served
from peft_serve.core import Reading
from peft_serve.engine.parts import BaseCard
from peft_serve.errors import InvalidParameter

READINGS: Final = {
    "SEQ_CLS": Reading.SEQUENCE,
    "TOKEN_CLS": Reading.TOKENS,
    "QUESTION_ANS": Reading.SPANS,
}
"""What is read for a head's task."""

_PIPELINES: Final = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}


def generates(base: BaseCard) -> bool:
    """Whether the base generates text. A base that was made with a task head of its own does not."""
    return not base.is_encoder and base.head is None


def reads(base: BaseCard) -> bool:
    """Whether its hidden states can be read."""
    return not base.is_encoder_decoder


def tasks_of(base: BaseCard, head: HeadFacts | None, *, has_choices: bool = False) -> list[str]:
    """What can be asked of the base or of an adapter: generate, classify, embed."""
    can_classify = (reads(base) and (head or base.head) is not None) or (generates(base) and has_choices)
    able = (("generate", generates(base)), ("classify", can_classify), ("embed", reads(base)))
    return [task for task, can in able if can]


def pipeline_tag(base: BaseCard) -> str:
    """The hub's word for what the base does."""
    if base.head is not None:
        return _PIPELINES[base.head.task]
    if base.is_encoder:
        return "feature-extraction"
    return "text2text-generation" if base.is_encoder_decoder else "text-generation"


def labels_of(base: BaseCard, head: HeadFacts, profile: Profile) -> tuple[str, ...]:
    """What a head's outputs are called: by the adapter, by the base's own head of this kind, or by number."""
    own = base.labels if base.head == head else ()
    for labels in (profile.labels or (), own):
        if len(labels) == head.num_labels:
            return labels
    return tuple(f"LABEL_{i}" for i in range(head.num_labels))


def check_generates(base: BaseCard) -> None:
    """Raise InvalidParameter for a base that generates no text."""
    if not generates(base):
        raise InvalidParameter(
            f"the base {base.name} is a {base.class_name} and generates no text; "
            "POST /classify (with an adapter or a base that has a task head), /embed or /v1/embeddings"
        )


def check_reads(base: BaseCard) -> None:
    """Raise InvalidParameter for a base whose hidden states are not read."""
    if not reads(base):
        raise InvalidParameter(
            f"the base {base.name} is a {base.class_name}, an encoder-decoder: heads and embeddings are served on "
            "encoders and on decoder-only bases; POST /generate, or /classify with choices"
        )


class NothingToClassify(InvalidParameter):  # the tree of errors names refusals
    """Neither a task head nor choices: no labels to answer with."""

    def __init__(self, base: BaseCard, served: Served) -> None:
        who = f"the base {base.name}" if not served.parts else f"adapter {served.name}"
        offers = ", ".join(f"/{task}" for task in tasks_of(base, None))
        way_out = (
            "send parameters.choices, or name an adapter that brings either"
            if generates(base)
            else ("name an adapter that brings a head")
        )
        super().__init__(
            f"adapter: {who} has neither a task head nor choices in its peft_serve.json; it offers {offers}; {way_out}",
            param="adapter",
        )
