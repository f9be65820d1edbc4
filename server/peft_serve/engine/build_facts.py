"""What runs here, for people who look at many servers at once: versions, and the base as it is computed."""

from __future__ import annotations

import platform

import torch
import transformers

import peft_serve
from peft_serve.engine.parts import BaseCard
from peft_serve.metrics import BuildFacts


def build_facts(card: BaseCard) -> BuildFacts:
    """The facts of this process, with `card`'s base."""
    return BuildFacts(
        version=peft_serve.__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        base=card.class_name,
        dtype=card.dtype,
        device=card.device,
    )
