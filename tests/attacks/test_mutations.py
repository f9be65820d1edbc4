"""Every single byte of one small adapter's config and header, changed: no other plan is let in.

A plan is which bytes of the file go where, with which shape and type. The only numbers of a LoRA config that no
tensor can contradict are its alpha and its task's spelling; a change of alpha may pass, and it changes the digest.
"""

from __future__ import annotations

import random
import re
import struct
from typing import Any

import pytest

from peft_serve.adapters.gate import Inspected, inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.errors import AdapterInvalid, MalformedUpload
from tests.attacks.hostile import base_of, honest, with_weights

SAMPLES = 1500
REPLACEMENTS = (0x00, 0x20, 0x22, 0x2C, 0x30, 0x31, 0x39, 0x41, 0x5B, 0x7B, 0x7D, 0xFF)
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


def plan_of(inspected: Inspected) -> Any:
    sites = {
        path: {
            suffix: (tensor.format.torch_dtype, tensor.shape, bytes(tensor.content))
            for kind in (site.method, site.saved, site.copies)
            for suffix, tensor in kind.items()
        }
        for path, site in inspected.binding.sites.items()
    }
    read = {name: inspected.config.raw(name) or None for name in READ}
    return inspected.summary.peft_type, sites, read


def mutants(content: bytes, seed: int, begin: int = 0) -> list[tuple[int, bytes]]:
    """A sample of the single-byte changes: telling replacements, and every bit of every byte."""
    every = [(i, byte) for i in range(begin, len(content)) for byte in REPLACEMENTS]
    every += [(i, content[i] ^ (1 << bit)) for i in range(begin, len(content)) for bit in range(8)]
    chosen = random.Random(seed).sample([m for m in every if m[1] != content[m[0]]], SAMPLES)
    return [(i, content[:i] + bytes([byte]) + content[i + 1 :]) for i, byte in chosen]


def admitted(files: CheckpointFiles) -> Inspected | None:
    try:
        return inspect(files, base_of("llama"), GateLimits())
    except (AdapterInvalid, MalformedUpload):
        return None


@pytest.mark.parametrize("seed", [1, 2])
def test_config(seed: int) -> None:
    files = honest()
    expected = plan_of(inspect(files, base_of("llama"), GateLimits()))
    before = base_of("llama").fingerprint()
    alpha = re.search(rb'"lora_alpha": (\d+)', files.config)
    assert alpha is not None
    num_refused = 0
    for place, config in mutants(files.config, seed):
        inspected = admitted(CheckpointFiles(config=config, weights=files.weights))
        if inspected is None:
            num_refused += 1
        elif place not in range(alpha.start(1) - 1, alpha.end(1)):
            assert plan_of(inspected) == expected, config
            assert inspected.id != files.digest()
    assert num_refused > SAMPLES // 4
    assert base_of("llama").fingerprint() == before


@pytest.mark.parametrize("seed", [3, 4])
def test_header(seed: int) -> None:
    files = honest()
    expected = plan_of(inspect(files, base_of("llama"), GateLimits()))
    (length,) = struct.unpack("<Q", files.weights[:8])
    head, body = files.weights[: 8 + length], files.weights[8 + length :]
    accepted = [
        weights
        for _, changed in mutants(head, seed)
        if (inspected := admitted(with_weights(files, weights := changed + body))) is not None
        and plan_of(inspected) != expected
    ]
    assert not accepted


def test_every_byte_of_the_header_length() -> None:
    files = honest()
    for place in range(8):
        for byte in range(256):
            if byte != files.weights[place]:
                changed = files.weights[:place] + bytes([byte]) + files.weights[place + 1 :]
                assert admitted(with_weights(files, changed)) is None
