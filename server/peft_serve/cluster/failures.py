"""Why a start failed, out of what Serve tells of its deployments: whole tracebacks, of which one line is for people.

Knows no ray.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_ERROR: Final = re.compile(r"[A-Za-z_][\w.]*(?:\(\w+\))?: (.+)")  # the last line of a traceback


def failure_of(told: str, messages: Mapping[str, str]) -> str:
    """What became of a start, in one line: `told` by the call that failed, `messages` by each deployment."""
    reasons = [f"{name}: {reason}" for name, message in messages.items() if (reason := reason_in(message))]
    return "; ".join(reasons) or told.strip().splitlines()[0]


def reason_in(message: str) -> str:
    """The words of the error that a message ends with; nothing where it has none."""
    found = [match[1] for line in message.splitlines() if (match := _ERROR.fullmatch(line.rstrip()))]
    return found[-1] if found else ""
