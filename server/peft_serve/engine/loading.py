"""Loading: from a checkpoint to what is served of it, by way of the compiled store where that has it already.

The gate and the compiler are asked about a checkpoint once for each base; what they made is kept, and the next upload,
start or load reads that. Safe from any thread. Knows neither names nor requests, nor where checkpoints are.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
import transformers

import peft_serve
from peft_serve import adapters
from peft_serve.adapters.base import Base
from peft_serve.adapters.bounded_folder import BoundedFolder
from peft_serve.adapters.combined import Part, combined_id, parts_of
from peft_serve.adapters.combining import for_task, load_combined
from peft_serve.adapters.compiled_key import code_digest, compiled_for
from peft_serve.adapters.compiled_store import CompiledStore
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.gate import Inspected, inspect
from peft_serve.adapters.layout import laid_out
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.shortage import is_short_of_memory
from peft_serve.config import Settings
from peft_serve.core import AdapterId
from peft_serve.errors import Unavailable
from peft_serve.metrics import Metrics

COMPILED_FOLDER: Final = "compiled"

_RETRY_S: Final = 1.0
_MIN_CORES: Final = 4  # from here on a second thread may load while the first compiles, and the engine keeps its cores


class Loading:
    """Compiled adapters, by id or of files. `stand_aside` is run first on whatever thread asks.

    `speech` is the rest of the gate, which knows the base's tokenizer; `files_of` finds a checkpoint by its digest and
    raises AdapterUnavailable.
    """

    def __init__(
        self,
        base: Base,
        limits: GateLimits,
        compiled: CompiledStore,
        *,
        speech: Callable[[Inspected], Inspected],
        stand_aside: Callable[[], None],
    ) -> None:
        self._base = base
        self._limits = limits
        self._compiled = compiled
        self._speech = speech
        self._stand_aside = stand_aside

    def check(self, files: CheckpointFiles, *, keeps: bool = True) -> Inspected:
        """The whole of validation: the gate, then a compile. `keeps`: its result is likely to be asked for.

        Raises AdapterInvalid and MalformedUpload, and Unavailable where memory runs out: that is not the upload's
        fault. What was compiled before under the same rules compiles again.
        """
        return self._in_memory(lambda: self._compiled_too(inspect(files, self._base, self._limits), keeps=keeps))

    def draft(self, files: CheckpointFiles) -> Inspected:
        """`check` of an upload. Nothing is written of it, and nothing that was is given up, before `settle` is told
        that a name stands for it."""
        return self._in_memory(lambda: self._drafted(inspect(files, self._base, self._limits)))

    def settle(self, adapter: AdapterId, *, is_named: bool) -> None:
        """What became of the upload that `draft` was asked about; once for each."""
        self._compiled.settle_upload(adapter, took_place=is_named)

    def _in_memory(self, make: Callable[[], Inspected]) -> Inspected:
        """What `make` gives; raises Unavailable, without its frames and what they hold, where memory runs out."""
        self._stand_aside()
        try:
            return make()
        except Exception as error:
            if not is_short_of_memory(error):
                raise
        raise Unavailable("memory ran out while the adapter was checked; try again later", retry_after_s=_RETRY_S)

    def _drafted(self, inspected: Inspected) -> Inspected:
        self._compiled.withhold(inspected.id)
        try:
            return self._compiled_too(inspected, keeps=True)
        except BaseException:
            self.settle(inspected.id, is_named=False)
            raise

    def _compiled_too(self, inspected: Inspected, *, keeps: bool) -> Inspected:
        if self._compiled.has(inspected.id):
            return self._speech(inspected)
        compiled = compile_adapter(inspected, self._base, self._limits)
        inspected = self._speech(inspected)
        if keeps and inspected.summary.num_tasks == 1:  # of several each is an adapter of its own
            self._compiled.keep(compiled)
        return inspected

    def load(self, adapter: AdapterId, files_of: Callable[[AdapterId], CheckpointFiles]) -> Adapter:
        """The adapter of an id, of a combination too; raises as the gate, the compiler and `files_of` do."""
        self._stand_aside()
        found = self._compiled.get(adapter)
        if found is not None:
            return found
        parts = parts_of(adapter)
        if len(parts) == 1 and parts[0].weight == 1.0:
            return self._compile(parts[0], files_of)

        def load_part(checkpoint: AdapterId, task: int | None) -> Adapter:
            part = Part(id=checkpoint, task=task)
            return self._compiled.get(combined_id([part])) or self._compile(part, files_of)

        combined = load_combined(adapter, load_part, self._base, self._limits)
        made = laid_out(combined, self._base.dtype)  # without views of the files of its parts
        self._compiled.keep(made)
        return made

    def _compile(self, part: Part, files_of: Callable[[AdapterId], CheckpointFiles]) -> Adapter:
        inspected = for_task(inspect(files_of(part.id), self._base, self._limits), part.task)
        made = replace(compile_adapter(inspected, self._base, self._limits), id=combined_id([part]))
        self._compiled.keep(made)
        return made


def open_compiled_store(
    settings: Settings,
    base: Base,
    limits: GateLimits,
    root: Path,
    metrics: Metrics,
    fingerprint: str,
    stand_aside: Callable[[], None],
) -> CompiledStore:
    """The compiled store in the folder of a base's uploads. `fingerprint` is that of the base's weights."""
    disk = DiskFileSystem()
    folder = BoundedFolder(
        root / COMPILED_FOLDER,
        disk,
        max_bytes=settings.compiled_cache_bytes,
        new_name=lambda: uuid.uuid4().hex,
        now_s=time.time,
        min_free_bytes=settings.store_reserve_bytes,
    )
    code = code_digest(disk, Path(adapters.__file__).parent)
    versions = (peft_serve.__version__, torch.__version__, transformers.__version__)
    facts = (*versions, settings.device, str(settings.quantisation))
    return CompiledStore(
        folder if settings.compiled_cache_bytes else None,
        compiled_for=compiled_for(base, limits, fingerprint=fingerprint, code=code, settings=facts),
        on_event=lambda event: metrics.observe_compiled(event.value),
        on_thread_start=stand_aside,
    )


def num_load_threads(settings: Settings) -> int:
    """Threads that load adapters: as set, else a second one where the machine has cores to spare."""
    return settings.load_threads or (2 if (os.cpu_count() or 1) >= _MIN_CORES else 1)
