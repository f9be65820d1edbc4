"""The sources of a server: what is allowed, and the module that opens each kind."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_serve.adapters.sources.allowing import AllowedSources
from peft_serve.adapters.sources.folder import SourceFolder
from peft_serve.adapters.sources.hub import Hub, HubFolder, HuggingFaceHub
from peft_serve.adapters.sources.local import LocalFolder
from peft_serve.adapters.sources.locator import OBJECT_KINDS, Kind, Locator, parse_locator
from peft_serve.adapters.sources.objects import EXTRA, ObjectFolder, open_store
from peft_serve.errors import Forbidden

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class Sources:
    """What `patterns` allow, opened. Raises ValueError for a bad pattern, and for a kind that is not installed."""

    def __init__(
        self,
        patterns: Sequence[str] = (),
        *,
        hub: Hub | None = None,
        make_store: Callable[[Locator], ObjectStore] = open_store,
    ) -> None:
        self._allowed = AllowedSources(patterns)
        self._hub = hub or HuggingFaceHub()
        self._make_store = make_store
        missing = sorted(kind for kind in self._allowed.kinds & OBJECT_KINDS)
        if missing and importlib.util.find_spec("obstore") is None:
            raise ValueError(f"--allow-source {missing[0]}://..: object stores need an extra: {EXTRA}")

    def locate(self, text: str) -> Locator:
        """The source that `text` names; raises InvalidParameter, and Forbidden where the operator does not allow it."""
        if not self._allowed.kinds:
            raise Forbidden(
                "source: this server fetches no adapters; send the files themselves, or ask the operator to start it "
                "with --allow-source"
            )
        locator = parse_locator(text)
        if not self._allowed.allows(locator):
            raise Forbidden(f"source {locator}: is not among what the operator allows with --allow-source")
        return locator

    def open(self, locator: Locator) -> SourceFolder:
        """The folder of an allowed source, not yet looked at."""
        assert self._allowed.allows(locator), "a locator comes from locate()"
        if locator.kind is Kind.FILE:
            return LocalFolder(self._allowed.root_of(locator), Path("/", *locator.steps))
        if locator.kind is Kind.HF:
            return HubFolder(locator, self._hub)
        return ObjectFolder(locator, self._make_store)
