"""Adapters in the slots of a runner that is driven by hand. Needs nothing that serves HTTP."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, Install, Step
from peft_serve.model.runner import StepRunner


@contextmanager
def holding(
    runner: StepRunner,
    known: MutableMapping[AdapterId, Adapter],
    adapters: Mapping[int, Adapter],
    fronts: Mapping[int, tuple[int, ...]] | None = None,
) -> Iterator[None]:
    """Adapters by slot, installed inside the block; `known` is where the runner finds them, `fronts` the blocks for
    what stands in front of their requests. RuntimeError where one cannot be installed."""
    known.update({adapter.id: adapter for adapter in adapters.values()})
    blocks = fronts or {}
    installs = tuple(Install(slot=s, adapter=each.id, blocks=blocks.get(s, ())) for s, each in adapters.items())
    done = runner.run(Step(id=1, rows=(), installs=installs))
    if done.failed_installs:
        raise RuntimeError(f"an adapter could not be installed: {done.failed_installs[0][1]}")
    try:
        yield
    finally:
        runner.run(Step(id=2, rows=(), removes=tuple(adapters)))
        known.clear()
