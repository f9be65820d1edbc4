"""Uploads: the files of a checkpoint out of an archive or a form, with nothing ever extracted to a disk.

An archive is recognised by its first bytes and read member by member. A few exact file names are taken, at the
top or in one folder at the top; every byte that comes out is counted. Whatever is wrong with an upload is
MalformedUpload or PayloadTooLarge, never another exception. What the files say is the gate's business.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Final

from peft_serve.adapters.members import WANTED, Member, UploadLimits, printable, split_member
from peft_serve.adapters.records import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    HUB_WEIGHTS_FILE,
    PROFILE_FILE,
    WEIGHTS_FILE,
    CheckpointFiles,
)
from peft_serve.adapters.tar_reader import is_gzip, is_tar, read_tar
from peft_serve.adapters.vocabulary import vocabulary_files
from peft_serve.adapters.zip_reader import is_zip, read_zip
from peft_serve.errors import MalformedUpload, PayloadTooLarge, UnsupportedMediaType

MEDIA_TYPES: Final = frozenset(
    {
        "",
        "application/gzip",
        "application/octet-stream",
        "application/tar",
        "application/tar+gzip",
        "application/x-compressed-tar",
        "application/x-gtar",
        "application/x-gzip",
        "application/x-tar",
        "application/x-www-form-urlencoded",  # what `curl --data-binary` says when it is told nothing
        "application/x-zip-compressed",
        "application/zip",
    }
)
"""Declared types under which an archive is looked for; the first bytes decide which."""

_PICKLE_ENDINGS: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LFS_POINTER: Final = b"version https://git-lfs.github.com/"
_SAVE_AGAIN: Final = (
    "save the adapter again with peft: model.save_pretrained(folder, safe_serialization=True), "
    "the default, writes adapter_model.safetensors"
)
_HUB_PICKLE: Final = "pytorch_adapter.bin"
_SAVE_HUB_AGAIN: Final = (
    "save the adapter again with AdapterHub's adapters: model.save_adapter(folder, name, use_safetensors=True) "
    f"writes {HUB_WEIGHTS_FILE}; of prefix tuning, which it cannot write so, convert the pickle: "
    f"save_file({{k: v.clone() for k, v in torch.load({_HUB_PICKLE!r}).items() if '.prefix_tuning.pool.' not in k}}, "
    f"{HUB_WEIGHTS_FILE!r}), with save_file of safetensors.torch"
)
_OF_HUB: Final = (HUB_WEIGHTS_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE)
_FUSION_CONFIG: Final = "adapter_fusion_config.json"
_MAX_IGNORED: Final = 32


def read_upload(
    content: bytes | BinaryIO, media_type: str | None, *, limits: UploadLimits | None = None
) -> CheckpointFiles:
    """The checkpoint in a .zip, .tar or .tar.gz; a file object must be seekable.

    Raises UnsupportedMediaType for a declared type that is no archive, MalformedUpload and PayloadTooLarge.
    """
    limits = limits or UploadLimits()
    declared = (media_type or "").partition(";")[0].strip().lower()
    if declared not in MEDIA_TYPES:
        raise UnsupportedMediaType(
            "an adapter is uploaded as application/zip, application/x-tar or application/gzip, "
            "or its files as multipart/form-data"
        )
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    size = source.seek(0, io.SEEK_END)
    if size > limits.max_bytes:
        raise PayloadTooLarge(f"the upload has {size} bytes; this server accepts {limits.max_bytes}")
    source.seek(0)
    head = source.read(512)
    source.seek(0)
    if is_zip(head):
        return _gather(read_zip(source, size, limits), limits)
    if is_gzip(head) or is_tar(head):
        return _gather(read_tar(source, size, limits), limits)
    raise MalformedUpload(_not_an_archive(head, size))


def files_from_parts(parts: Mapping[str, bytes | None], *, limits: UploadLimits | None = None) -> CheckpointFiles:
    """The checkpoint in files by their names, None for one that was not read; raises MalformedUpload and
    PayloadTooLarge."""
    return _gather(((name, content) for name, content in parts.items()), limits or UploadLimits())


@dataclass(slots=True)
class _Found:
    """The wanted files seen so far, and where they were."""

    contents: dict[str, bytes] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)

    def take(self, name: str, folder: str, content: bytes) -> None:
        if name in self.contents:
            raise MalformedUpload(f"the upload holds {name} twice; send one checkpoint")
        self.contents[name] = content
        self.folders.add(folder)
        if len(self.folders) > 1:
            raise MalformedUpload(
                "the checkpoint's files lie in different folders of the upload; put them side by side"
            )


def _gather(members: Iterable[Member], limits: UploadLimits) -> CheckpointFiles:
    """Sort members into the wanted files and the rest. A member without content was not read."""
    found = _Found()
    for path, content in members:
        folder, name = split_member(path)
        if content is None or name not in WANTED:
            found.ignored.append(path)
            continue
        limits.check_file(name, len(content))
        found.take(name, folder, content)
    return _checked(found)


def _checked(found: _Found) -> CheckpointFiles:
    """The checkpoint, if it is one at all."""
    contents = found.contents
    if WEIGHTS_FILE in contents:  # peft's; what AdapterHub calls its files is then no part of the checkpoint
        found.ignored += [name for name in _OF_HUB if contents.pop(name, None) is not None]
    has_weights = WEIGHTS_FILE in contents or HUB_WEIGHTS_FILE in contents
    if CONFIG_FILE not in contents or not has_weights:
        name = WEIGHTS_FILE if CONFIG_FILE in contents else CONFIG_FILE
        raise MalformedUpload(_missing(name, found.ignored, has_weights=has_weights))
    for name, content in contents.items():
        if content.startswith(_LFS_POINTER):
            raise MalformedUpload(f"{name} is a git-lfs pointer, not the file; run `git lfs pull` and upload again")
    for name, way_out in ((WEIGHTS_FILE, _SAVE_AGAIN), (HUB_WEIGHTS_FILE, _SAVE_HUB_AGAIN)):
        if is_pickle(contents.get(name, b"")):
            raise MalformedUpload(f"{name} is a pickle, and reading a pickle can run code; {way_out}")
    return CheckpointFiles(
        config=contents[CONFIG_FILE],
        weights=contents[WEIGHTS_FILE if WEIGHTS_FILE in contents else HUB_WEIGHTS_FILE],
        profile=contents.get(PROFILE_FILE),
        head_config=contents.get(HEAD_CONFIG_FILE),
        head_weights=contents.get(HEAD_WEIGHTS_FILE),
        vocabulary=vocabulary_files(contents),
        ignored=tuple(printable(path) for path in _first(found.ignored)),
    )


def is_pickle(content: bytes) -> bool:
    """Whether the bytes begin like torch.save's zip or a bare pickle, whatever the file is called."""
    if content.startswith(b"PK\x03\x04"):
        return True
    # A safetensors file may begin like this too: with a header length, whose upper bytes are zero.
    return len(content) > 1 and content[0] == 0x80 and content[1] in range(2, 6) and any(content[3:8])


def _missing(name: str, ignored: Iterable[str], *, has_weights: bool) -> str:
    pickles = [path for path in ignored if path.endswith(_PICKLE_ENDINGS)]
    if name == CONFIG_FILE and any(path.rpartition("/")[2] == _FUSION_CONFIG for path in ignored):
        return "the upload is an AdapterFusion, which attends over several adapters at run time; upload these instead"
    if name == CONFIG_FILE and any(path.endswith("/data.pkl") for path in pickles):
        return f"the upload is a file of torch.save, and reading it can run code; {_SAVE_AGAIN}"
    if pickles and not has_weights:
        is_of_hub = pickles[0].rpartition("/")[2] == _HUB_PICKLE
        wanted, way_out = (HUB_WEIGHTS_FILE, _SAVE_HUB_AGAIN) if is_of_hub else (WEIGHTS_FILE, _SAVE_AGAIN)
        return (
            f"the upload holds {printable(pickles[0])} but no {wanted}; "
            f"reading a pickle can run code, so it is refused; {way_out}"
        )
    return (
        f"the upload holds no {name}; send the folder that peft's save_pretrained wrote, "
        "its files at the top or in one folder at the top"
    )


def _not_an_archive(head: bytes, size: int) -> str:
    if size == 0:
        return "the upload is empty"
    if head.startswith(_LFS_POINTER):
        return "the upload is a git-lfs pointer, not the file; run `git lfs pull` and upload again"
    if is_pickle(head):
        return f"the upload is a pickle, and reading a pickle can run code; {_SAVE_AGAIN}"
    return (
        "the upload is no .zip, .tar or .tar.gz; pack the checkpoint's folder, or send its files as multipart/form-data"
    )


def _first(paths: list[str]) -> Iterator[str]:
    yield from paths[:_MAX_IGNORED]
    if len(paths) > _MAX_IGNORED:
        yield f"and {len(paths) - _MAX_IGNORED} more"
