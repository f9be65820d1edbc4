"""What an adapter is verified at: generating, one of the task heads, or giving hidden states."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from peft_serve.adapters.records import CheckpointFiles, HeadFacts
from peft_serve.api.abilities import READINGS, generates, reads
from peft_serve.engine.parts import BaseCard
from peft_serve.errors import BadRequest

FEATURES = "FEATURE_EXTRACTION"
_TEXT = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """`head` answers, if there is one; else hidden states are compared, or text."""

    is_text: bool = False
    head: HeadFacts | None = None

    @property
    def is_question(self) -> bool:
        return self.head is not None and self.head.task == "QUESTION_ANS"

    @property
    def reads_tokens(self) -> bool:
        """Whether tokens are read where they stand, so that no template goes around the text."""
        return self.head is not None and self.head.task != "SEQ_CLS"


def task_of(files: CheckpointFiles, head: HeadFacts | None, base: BaseCard) -> Task:
    """What the adapter is for, by its config, else by what its base can do. `head` is the adapter's own.

    Raises `BadRequest` for a task that peft does nothing of its own for on this base.
    """
    said = json.loads(files.config).get("task_type")
    head = head or base.head
    if said in READINGS and head is not None:
        return Task(head=head)
    if said in (None, *_TEXT) and generates(base):
        return Task(is_text=True)
    if said in (None, FEATURES) and reads(base):
        return Task(head=head if said is None else None)
    raise BadRequest(f"there is nothing to compare: its task is {said}, and the base {base.name} has no head for it")


def refuse_foreign(files: CheckpointFiles) -> None:
    """Raise `BadRequest` for a checkpoint of another library than peft."""
    config: Any = json.loads(files.config)
    if isinstance(config, dict) and "peft_type" in config:
        return
    raise BadRequest(
        "this is an AdapterHub checkpoint and no peft adapter. Its own library cannot be run beside this server: "
        "adapters 1.3 needs transformers 4, and this server transformers 5. To compare by hand, make an environment "
        "of its own (pip install adapters), run model.load_adapter(folder) there in float32, and put the same texts "
        "to this server's /generate, /classify or /embed"
    )
