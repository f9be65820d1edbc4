"""Whether an adapter's files are a checkpoint that can be served: on a base when one is named, else by themselves.

The checks are those of the gate that an upload passes. With a base they run against a model without weights, so that
what hangs on a weight's values is left to the server: whether a saved copy of one is the base's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from peft_serve.adapters.archive import files_from_parts, read_upload
from peft_serve.adapters.base import NoValues
from peft_serve.adapters.gate import glance, inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.members import WANTED, UploadLimits
from peft_serve.adapters.names import check_name
from peft_serve.adapters.records import CONFIG_FILE, CheckpointFiles
from peft_serve.commands.adapter_tables import size
from peft_serve.commands.checkup.finding import Finding, State, fine, odd, told, wrong
from peft_serve.config import Settings
from peft_serve.engine.assembly import gate_limits
from peft_serve.errors import AdapterInvalid, InvalidParameter, MalformedUpload, PayloadTooLarge
from peft_serve.model.base import ResidentBase
from peft_serve.model.loader import NotServable, outline


def look_at_adapter(path: Path, settings: Settings, *, base: str | None = None) -> Iterator[Finding]:
    """Everything that is wrong with a checkpoint's folder or archive."""
    yield from _name(path, settings)
    try:
        files = read_checkpoint(path, UploadLimits(max_bytes=settings.max_adapter_bytes))
    except (MalformedUpload, PayloadTooLarge) as error:
        yield told(path.name, error.message.replace("the upload", str(path)))
        return
    except OSError as error:
        yield wrong(str(path), f"cannot be read: {error.strerror}", "check the path, and who may read it")
        return
    try:
        yield from _alone(files, settings) if base is None else _on_base(files, base, settings)
    except AdapterInvalid as error:
        for refusal in error.errors:
            yield told(refusal.path, refusal.reason)
    except MalformedUpload as error:
        yield told(path.name, error.message)


def read_checkpoint(path: Path, limits: UploadLimits) -> CheckpointFiles:
    """The files at a path, as an upload of them would be read."""
    if not path.is_dir():
        with path.open("rb") as file:
            return read_upload(file, None, limits=limits)
    if not (path / CONFIG_FILE).is_file():
        inside = sorted(each.parent.name for each in path.glob(f"*/{CONFIG_FILE}"))
        if inside:
            raise MalformedUpload(f"{path} holds no {CONFIG_FILE}; did you mean {path / inside[0]}?")
    names = [each.name for each in path.iterdir() if each.is_file()]
    parts = {name: (path / name).read_bytes() if name in WANTED else b"" for name in names}
    return files_from_parts(parts, limits=limits)


def _name(path: Path, settings: Settings) -> Iterator[Finding]:
    name = path.resolve().name if path.is_dir() else path.name.partition(".")[0]
    try:
        check_name(name, base_name=settings.served_model_name or settings.model)
    except InvalidParameter as error:
        yield told("name", f"{error.message}; push it with a name of its own", State.ODD)


def _alone(files: CheckpointFiles, settings: Settings) -> Iterator[Finding]:
    peft_type, trained_on = glance(files, GateLimits(max_rank=settings.max_rank))
    trained = f", trained on {trained_on}" if trained_on else ""
    yield fine("adapter", f"{peft_type}{trained}, {size(files.num_bytes)}; --base tells whether it fits one")


def _on_base(files: CheckpointFiles, source: str, settings: Settings) -> Iterator[Finding]:
    try:
        model = outline(source, revision=settings.revision)
        base = ResidentBase(model, name=Path(source).name if Path(source).is_dir() else source)
        limits = gate_limits(settings, base.shape.max_positions)
    except (NotServable, ValueError, TypeError, AttributeError, RuntimeError) as error:
        yield told("base", f"{source} cannot be looked at ({error}); `peft-serve doctor --base {source}` says more")
        return
    try:
        found = inspect(files, base, limits)
    except NoValues:
        with suppress(AdapterInvalid):
            glance(files, limits)
        way = "`peft-serve adapters validate` asks a server that has them"
        yield odd("adapter", "brings copies of weights, which only the base's own values can judge", way)
        return
    facts = found.summary
    yield fine(
        "adapter", f"{facts.peft_type} of rank {facts.rank}: {facts.num_tensors} tensors in {facts.num_sites} places"
    )
    for warning in facts.warnings:
        yield told("adapter", f"{warning}; right if you know why, else check the files", State.ODD)
