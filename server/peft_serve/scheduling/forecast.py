"""The forecast: when a request that comes now would get its first token.

From the fitted time of a step, the tokens that wait to be computed, and the pace at which requests have been ending.
A forecast is a guess: it refuses only those who asked to be refused rather than wait (`Request.deadline_s`).
"""

from __future__ import annotations

import heapq

from peft_serve.core import RequestState
from peft_serve.errors import DeadlineMissed
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.queue import WaitingQueue
from peft_serve.scheduling.step_time import StepLoad, StepTimeModel
from peft_serve.scheduling.tracked import Tracked

_MIN_RETRY_S = 1.0


class Forecast:
    """Knows the deadlines of those that wait; see the module."""

    def __init__(self, limits: Limits, steps: StepTimeModel) -> None:
        self._limits = limits
        self._steps = steps
        self._deadlines: list[tuple[float, int, Tracked]] = []

    def first_token_s(
        self, num_own: int, queue: WaitingQueue, *, num_running: int, now_s: float, rank: int = 0
    ) -> float:
        """Seconds from now until a request of `num_own` tokens, put behind all others, would have its first token."""
        num_tokens = queue.num_tokens + num_own
        num_steps = -(-num_tokens // self._tokens_of_a_step())
        load = StepLoad(num_tokens=num_tokens, sum_rank=rank * num_steps, num_positions=num_tokens)
        whole = self._steps.predict(load)
        first = self._steps.coefficients["step"]
        num_before = len(queue) + 1 - max(0, self._limits.max_rows - num_running)
        return whole + max(0.0, first) * max(0, num_steps - 1) + max(0, num_before) * queue.gap_s(now_s)

    def _tokens_of_a_step(self) -> int:
        limit, limit_s, known = self._limits.max_step_tokens, self._limits.max_step_s, self._steps.coefficients
        if limit_s is None or known["token"] <= 0:
            return limit
        return max(1, min(limit, int((limit_s - known["step"]) / known["token"])))

    def require_in_time(self, tracked: Tracked, queue: WaitingQueue, *, num_running: int, now_s: float) -> None:
        """Raise `DeadlineMissed` for a request that is not going to make it."""
        deadline_s = tracked.request.deadline_s
        if deadline_s is None:
            return
        num_own, rank = len(tracked.tokens), tracked.rank
        expected_s = self.first_token_s(num_own, queue, num_running=num_running, now_s=now_s, rank=rank)
        require_time(expected_s, deadline_s - now_s)
        heapq.heappush(self._deadlines, (deadline_s, tracked.seq, tracked))

    def expired(self, now_s: float) -> list[Tracked]:
        """Requests that nothing has been computed for, and whose time is up. Each is named once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            tracked = heapq.heappop(self._deadlines)[2]
            if tracked.state is not RequestState.FINISHED and tracked.first_step_s is None:  # it may have a seat
                late.append(tracked)
        return late


def require_time(expected_s: float, left_s: float) -> None:
    """Raise `DeadlineMissed` where the first token is expected later than a request is to wait."""
    if expected_s > left_s:
        raise DeadlineMissed(
            f"the first token is expected in {expected_s:.3g} s, and the request is to wait {max(0.0, left_s):.3g} s "
            "at most: allow it more time, or try again later",
            retry_after_s=max(_MIN_RETRY_S, expected_s),
        )


def too_late(tracked: Tracked) -> DeadlineMissed:
    """Why a request that has waited in vain ends."""
    return DeadlineMissed(
        f"request {tracked.id} was not begun in the time it was to wait: allow it more, or try again later",
        retry_after_s=_MIN_RETRY_S,
    )
