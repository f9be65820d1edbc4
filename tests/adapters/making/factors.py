"""peft configs of methods that are low-rank factors, however they save them.

`METHODS` maps a method id to a function from the kind of base to the config; `ONLY` the base kinds of those that
do not fit every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import peft

METHODS: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {}
ONLY: Final[dict[str, tuple[str, ...]]] = {}
