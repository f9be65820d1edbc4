"""Which requests peft's loops of W5 run together: three ways to serve many adapters without a server like ours.

- ``single``: one adapter at a time. Requests are grouped by adapter; each batch holds one adapter's requests.
- ``mixed``: batches in the order of arrival, adapters mixed by peft's ``adapter_names``.
- ``sorted``: batches with ``adapter_names`` too, cut from requests sorted by adapter: few adapters in each.

`plan_batches` cuts a backlog that is all there from the start; `next_batch` takes the next batch from what waits now.
`window` is how many waiting requests the loop may look at when it groups or sorts; 0 is all of them, which is
more than a real queue would hold and so the most that can be said for peft.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from loadtest.trace import TraceRequest

Mode = Literal["single", "mixed", "sorted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftBatch:
    """Requests for one call of ``generate``; `by_names` says whether rows name their adapters."""

    requests: tuple[TraceRequest, ...]
    by_names: bool

    @property
    def answer_tokens(self) -> int:
        """The longest answer asked for: all rows run that far."""
        return max(request.max_new_tokens for request in self.requests)


def plan_batches(requests: Sequence[TraceRequest], mode: Mode, *, batch_size: int, window: int = 0) -> list[PeftBatch]:
    """Every request in exactly one batch of at most `batch_size`."""
    seen = list(_cut(requests, window or max(1, len(requests))))
    if mode == "mixed":
        groups = [list(requests)]
    elif mode == "sorted":
        groups = [_by_adapter(waiting) for waiting in seen]
    else:
        groups = [
            list(group)
            for waiting in seen
            for _, group in groupby(_by_adapter(waiting), key=lambda request: request.adapter)
        ]
    return [
        PeftBatch(requests=tuple(batch), by_names=mode != "single")
        for group in groups
        for batch in _cut(group, batch_size)
    ]


def next_batch(waiting: Sequence[TraceRequest], mode: Mode, *, batch_size: int, window: int = 0) -> PeftBatch:
    """The batch to run now, of requests that have come (at least one, oldest first). The oldest is always in it:
    batches of one adapter, or sorted by adapter, begin with the adapter that has waited longest."""
    seen, first = waiting[: window or len(waiting)], waiting[0]
    if mode == "single":
        seen = [request for request in seen if request.adapter == first.adapter]
    elif mode == "sorted":
        seen = sorted(seen, key=lambda request: (request.adapter != first.adapter, request.adapter))
    return PeftBatch(requests=tuple(seen[:batch_size]), by_names=mode != "single")


def _cut(requests: Sequence[TraceRequest], size: int) -> list[Sequence[TraceRequest]]:
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def _by_adapter(requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    return sorted(requests, key=lambda request: request.adapter)
