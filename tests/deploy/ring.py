"""A port of how nginx chooses a server by `hash KEY consistent`: a ring of 160 points for each server, as memcached's
clients have it. Every point is the CRC of host, port and the point before it; a key goes to the next point."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterable
from zlib import crc32

POINTS_OF_A_SERVER = 160


class Ring:
    """Servers of weight 1 by `host:port`."""

    def __init__(self, servers: Iterable[str]) -> None:
        points: dict[int, str] = {}
        for server in servers:
            host, _, port = server.rpartition(":")
            before = 0
            for _ in range(POINTS_OF_A_SERVER):
                before = crc32(f"{host}\0{port}".encode() + struct.pack("<I", before))
                points.setdefault(before, server)
        self._hashes = sorted(points)
        self._servers = [points[each] for each in self._hashes]

    def server_of(self, key: str) -> str:
        at = bisect.bisect_left(self._hashes, crc32(key.encode()))
        return self._servers[at % len(self._servers)]
