"""The peft types that are not served, each with its reason and a way out.

Served are adapters whose terms are fixed once they are loaded, so that a row is computed the same in any company.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "XLORA": "a router mixes other adapters by a pass of the whole base before each pass, and the file names those "
        "adapters by their paths; upload the adapters that it mixes, or one LORA trained on the same data",
        "LILY": "its router averages over all rows of a batch, so that the answer to one request depends on the "
        "others; train LORA, or POLY for several tasks",
        "SHADOW": "it is a second network that runs beside the base and exchanges states with it in each layer; "
        "serve that network as a base of its own, or train LORA",
        "BONE": "peft has it no more; train MISS, which took its place",
    }
)
