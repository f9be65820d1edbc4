"""Generated configs and header entries: let in or refused with a reason, and never anything else."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods import METHODS
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.registry import SequenceMethod
from peft_serve.errors import AdapterInvalid, MalformedUpload
from tests.attacks.hostile import base_of, honest, join, split, with_weights
from tests.attacks.subjects import METHOD_OF

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(width=32) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def judged(files: CheckpointFiles) -> bool:
    try:
        inspect(files, base_of("llama"), GateLimits())
    except (AdapterInvalid, MalformedUpload):
        return False
    return True


@pytest.mark.parametrize("peft_type", sorted(METHODS))
@settings(max_examples=120 if os.environ.get("PEFT_SERVE_ATTACKS") == "all" else 40, deadline=None)
@given(data=st.data())
def test_config(peft_type: str, data: st.DataObject) -> None:
    files = honest(METHOD_OF[peft_type])
    config: dict[str, Any] = json.loads(files.config)
    schema = METHODS[peft_type].schema
    known = sorted({*config, *schema.required, *schema.optional, *schema.inert, *schema.refused})
    changes = data.draw(st.dictionaries(st.sampled_from(known) | st.text(max_size=6), VALUES, max_size=3))
    try:
        changed = json.dumps({**config, **changes}, allow_nan=True).encode()
    except UnicodeEncodeError:
        return
    judged(CheckpointFiles(config=changed, weights=files.weights))


@settings(max_examples=150, deadline=None)
@given(place=st.sampled_from(["dtype", "shape", "data_offsets", "more"]), value=VALUES)
def test_header_entry(place: str, value: object) -> None:
    files = honest()
    header, body = split(files.weights)
    name = next(key for key in header if key != "__metadata__")
    if header[name].get(place) == value:
        return
    header[name] = {**header[name], place: value}
    assert not judged(with_weights(files, join(header, body)))


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200), begin=st.sampled_from([b"", b"{", b'{"a":', b"\x02\0\0\0\0\0\0\0{}"]))
def test_bytes(content: bytes, begin: bytes) -> None:
    files = honest()
    assert not judged(with_weights(files, begin + content))
    assert not judged(CheckpointFiles(config=begin + content, weights=files.weights))


def test_every_served_type_is_attacked() -> None:
    assert METHOD_OF.keys() == METHODS.keys()
    assert {m.peft_type for m in METHODS.values() if isinstance(m, SequenceMethod)} == {
        "CARTRIDGE",
        "CPT",
        "MULTITASK_PROMPT_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
    }


@pytest.mark.parametrize("method", ["lora_blocks", "lora_kasa", "lora_activated", "lora_tokens_by_module"])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_config_of_a_variant(method: str, data: st.DataObject) -> None:
    """The fields of LoRA's variants hold lists and objects of their own."""
    files = honest(method)
    config: dict[str, Any] = json.loads(files.config)
    given_fields = sorted(name for name, value in config.items() if isinstance(value, dict | list))
    field = data.draw(st.sampled_from(given_fields))
    inside = sorted(config[field]) if isinstance(config[field], dict) else []
    if inside:
        changed: object = {**config[field], data.draw(st.sampled_from(inside) | st.text(max_size=6)): data.draw(VALUES)}
    else:
        changed = data.draw(st.lists(VALUES, max_size=4))
    try:
        text = json.dumps({**config, field: changed}, allow_nan=True).encode()
    except UnicodeEncodeError:
        return
    judged(CheckpointFiles(config=text, weights=files.weights))
