"""What a person sees while a base is loaded: lines of words, and a bar for each thing that transformers counts.

transformers and huggingface_hub tell their progress through tqdm. The first offers a hook for the maker of its bars,
and this turns what it makes (weights into the model, shards) into one of rich's; downloads from the hub keep the hub
client's own bars, a file each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

_EVERY = 0.01  # of the whole, between two changes of a bar: a model has thousands of weights


class BaseProgress:
    """A context manager; `say` is told what happens now. Where nobody watches (no terminal), there are only lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._earlier: Any = None

    def __enter__(self) -> Self:
        self._earlier = self._hook(self._make)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook(self._earlier)
        self._bars.stop()

    def _hook(self, make: Any) -> Any:
        """Give transformers the maker of its bars, and get the earlier one; without the hook it keeps its own."""
        set_hook: Callable[[Any], Any] | None = getattr(transformers_logging, "set_tqdm_hook", None)
        return None if set_hook is None else set_hook(make)

    def say(self, line: str) -> None:
        self._console.print(f"  {line}", highlight=False, markup=False)

    def _make(self, _factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bar:
        given = args[0] if args else kwargs.get("iterable")
        total = kwargs.get("total")
        if total is None and isinstance(given, Sized):
            total = len(given)
        self._bars.start()  # and not before: while it is on, the hub's own bars would not be drawn
        return _Bar(self._bars, given, total, str(kwargs.get("desc") or "loading"))


class _Bar:
    """As much of tqdm as transformers uses, drawn by rich."""

    def __init__(self, bars: Progress, given: Iterable[Any] | None, total: float | None, description: str) -> None:
        self._bars = bars
        self._given = given
        self._task: TaskID = bars.add_task(description.lower(), total=total)
        self._step = max(1, int((total or 0) * _EVERY))
        self._waiting = 0

    def __iter__(self) -> Iterator[Any]:
        for each in self._given or ():
            yield each
            self.update()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        self._waiting += int(n)
        if self._waiting >= self._step:
            self._bars.advance(self._task, self._waiting)
            self._waiting = 0

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:  # noqa: ARG002  # tqdm's way
        self._bars.update(self._task, description=(desc or "loading").lower())

    def set_postfix(self, *_: object, **__: object) -> None:
        """Tells nothing that the bar does not."""

    def close(self) -> None:
        self._bars.advance(self._task, self._waiting)
        self._waiting = 0
        self._bars.stop()
