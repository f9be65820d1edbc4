"""An outcome: what became of one request of a trace, as its client saw it.

All times are in seconds from the start of the run, on the client's clock.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

UNFINISHED = "unfinished"
"""The error of a request that the end of the run cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request's fate. `due_s` is when it should have been sent, `sent_s` when it was; latencies count from
    `due_s`, so that a client that falls behind cannot make the server look fast. `error` is None on success."""

    index: int
    adapter: str
    due_s: float
    sent_s: float
    end_s: float
    token_times_s: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    max_new_tokens: int = 0
    status: int = 0
    error: str | None = None
    text: str = ""

    @property
    def ok(self) -> bool:
        """Answered in full."""
        return self.error is None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None when none came."""
        return self.token_times_s[0] - self.due_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None for answers of fewer than two tokens."""
        if len(self.token_times_s) < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (len(self.token_times_s) - 1)

    @property
    def e2e_s(self) -> float:
        """Time to the end of the answer."""
        return self.end_s - self.due_s


def save_outcomes(outcomes: Iterable[Outcome], path: Path) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        for outcome in outcomes:
            lines.write(json.dumps(asdict(outcome)) + "\n")


def load_outcomes(path: Path) -> list[Outcome]:
    """Read what `save_outcomes` wrote."""
    read = []
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        fields["token_times_s"] = tuple(fields["token_times_s"])
        read.append(Outcome(**fields))
    return read
