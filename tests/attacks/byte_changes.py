"""Every single byte of a config or of a tensor file's header, changed."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

from peft_serve.adapters.records import CheckpointFiles
from tests.attacks.hostile import with_weights

TELLING = b"\x00 \"',-.0129:AEF[]_elr{}\xff"


def header_end(weights: bytes) -> int:
    (length,) = struct.unpack("<Q", weights[:8])
    return 8 + int(length)


def places(files: CheckpointFiles) -> Iterator[tuple[str, int]]:
    """Each byte that may be changed: the file it is in, and where."""
    yield from (("config", place) for place in range(len(files.config)))
    yield from (("header", place) for place in range(header_end(files.weights)))


def changed(files: CheckpointFiles, where: tuple[str, int], rng: random.Random) -> CheckpointFiles:
    """The checkpoint with one byte changed: to one that means something in JSON, by one bit, or to any."""
    file, place = where
    content = files.config if file == "config" else files.weights
    old = content[place]
    candidates = (rng.choice(TELLING), old ^ (1 << rng.randrange(8)), rng.randrange(256))
    new = rng.choice([byte for byte in candidates if byte != old] or [old ^ 1])
    content = content[:place] + bytes([new]) + content[place + 1 :]
    if file == "config":
        return CheckpointFiles(config=content, weights=files.weights)
    return with_weights(files, content)
