"""A .gz read as a stream, at a cost that its size bounds.

Python's own reader walks over the name in a header byte by byte, and over any number of empty streams one after the
other: a few hundred megabytes of either keep it busy for minutes and give nothing. zlib reads both.
"""

from __future__ import annotations

import zlib
from typing import BinaryIO, Final

_CHUNK: Final = 64 * 1024
_MAX_STREAMS: Final = 10_000  # tools that pack in blocks write one for each 64 KiB
_WITH_HEADER: Final = zlib.MAX_WBITS | 16


class Gunzip:
    """What the streams of a .gz unpack to, one after the other; zeros may follow the last."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._packed = b""
        self._inflater: zlib._Decompress | None = None
        self._num_streams = 0

    def read(self, num_bytes: int) -> bytes:
        """Up to `num_bytes`; fewer at the end only. Raises OSError, EOFError and zlib.error."""
        content = bytearray()
        while len(content) < num_bytes and self._is_inside():
            content += self._unpacked(num_bytes - len(content))
        return bytes(content)

    def _is_inside(self) -> bool:
        """Whether there is a stream to go on with."""
        while self._inflater is None:
            if self._num_streams:
                self._packed = self._packed.lstrip(b"\0")
            if not self._packed:
                self._packed = self._source.read(_CHUNK)
                if not self._packed:
                    return False
                continue
            self._num_streams += 1
            if self._num_streams > _MAX_STREAMS:
                raise OSError(f"more than {_MAX_STREAMS} gzip streams")
            self._inflater = zlib.decompressobj(_WITH_HEADER)
        return True

    def _unpacked(self, num_bytes: int) -> bytes:
        """Some bytes of the stream that is being read; none may come of a part of its header."""
        assert self._inflater is not None, "asked only inside of a stream"
        is_at_end = not self._packed and not (packed := self._source.read(_CHUNK))
        if not self._packed and not is_at_end:
            self._packed = packed
        content = self._inflater.decompress(self._packed, num_bytes)
        self._packed = self._inflater.unconsumed_tail
        if self._inflater.eof:
            self._packed, self._inflater = self._inflater.unused_data, None
        elif is_at_end and not content:
            raise EOFError("the gzip stream is cut short")
        return content
