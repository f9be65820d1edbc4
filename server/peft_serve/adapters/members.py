"""What every kind of upload has in common: bounds, and what a member of an archive may be called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from peft_serve.adapters.records import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    HUB_WEIGHTS_FILE,
    PROFILE_FILE,
    WEIGHTS_FILE,
)
from peft_serve.adapters.vocabulary import MAX_BYTES
from peft_serve.errors import MalformedUpload, PayloadTooLarge

MIB: Final = 1 << 20
_OF_TENSORS: Final = frozenset({WEIGHTS_FILE, HUB_WEIGHTS_FILE, HEAD_WEIGHTS_FILE})
WANTED: Final = (CONFIG_FILE, PROFILE_FILE, HEAD_CONFIG_FILE, *MAX_BYTES, *sorted(_OF_TENSORS))

Member = tuple[str, bytes | None]
"""A member's path, and its content if it is one of the wanted files."""

_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f\\]|^/|(^|/)\.\.(/|$)")
_CONTROLS: Final = dict.fromkeys((*range(32), 127), "?")
_MAX_SHOWN: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadLimits:
    """Bounds on an upload. The defaults go with the server's default `max_adapter_bytes`."""

    max_bytes: int = 512 * MIB  # the upload as sent, the weights, and all that an archive unpacks to
    max_json_bytes: int = 1 * MIB  # each of the JSON files but a tokenizer's
    max_members: int = 1000
    max_ratio: int = 20  # unpacked to packed
    ratio_slack_bytes: int = 1 * MIB  # a small file of zeros is no bomb

    def max_file_bytes(self, name: str) -> int:
        if name in _OF_TENSORS:
            return self.max_bytes
        return min(MAX_BYTES.get(name, self.max_json_bytes), self.max_bytes)

    def check_file(self, name: str, num_bytes: int) -> None:
        """Raise PayloadTooLarge when a wanted file is larger than it may be."""
        if num_bytes > self.max_file_bytes(name):
            raise PayloadTooLarge(f"{name} has {num_bytes} bytes; this server accepts {self.max_file_bytes(name)}")

    def max_archive_bytes(self, num_bytes: int) -> int:
        """Bytes that an archive of `num_bytes` may unpack to, what is not read included: another reader would unpack
        that too, and a stream is unpacked to its end to be checked."""
        return min(self.max_bytes, num_bytes * self.max_ratio) + self.ratio_slack_bytes

    def too_much(self) -> PayloadTooLarge:
        """The refusal of an archive that unpacks to more."""
        return PayloadTooLarge(
            f"the archive unpacks to more than this server accepts, or more than {self.max_ratio} times its size; "
            "send the checkpoint's files alone"
        )

    def check_count(self, num_members: int) -> None:
        """Raise MalformedUpload when an archive has more members than a checkpoint needs."""
        if num_members > self.max_members:
            raise MalformedUpload(f"the upload has more than {self.max_members} members; send the checkpoint alone")


def split_member(path: str) -> tuple[str, str]:
    """A member's top folder and file name; ("", path) for one deeper than that. Unsafe: MalformedUpload."""
    if _UNSAFE.search(path):
        raise MalformedUpload(f"the upload has a member named '{printable(path)}'; names must be plain relative paths")
    steps = [step for step in path.split("/") if step not in ("", ".")]
    if len(steps) == 1:
        return "", steps[0]
    return (steps[0], steps[1]) if len(steps) == 2 else ("", path)


def is_wanted(path: str) -> bool:
    """Whether a reader must give the content of this member."""
    return split_member(path)[1] in WANTED


def printable(text: str) -> str:
    """A member's name, fit for a message: ASCII without controls, at most 100 characters of it."""
    shown = text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
    return shown.encode("ascii", "backslashreplace").decode().translate(_CONTROLS)
