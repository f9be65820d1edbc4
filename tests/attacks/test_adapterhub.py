"""Checkpoints of AdapterHub's library, spoilt: refused with a reason, let in as something else, and nothing worse."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from typing import Any

import pytest

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.strict_json import parse_object
from peft_serve.errors import AdapterInvalid, MalformedUpload
from peft_serve.model.base import ResidentBase
from tests.adapters.adapterhub.served import files_of, forms_of, resident
from tests.adapters.same_bits import assert_same_bits
from tests.attacks import byte_changes
from tests.attacks.config_maker import any_value, near_value

LIMITS = GateLimits()
FAMILIES = ("llama", "bert")
NUM_EACH = 400 if os.environ.get("PEFT_SERVE_ATTACKS") == "all" else 3
CASES = [(family, form) for family in FAMILIES for form in forms_of(family)]


def admitted(base: ResidentBase, files: CheckpointFiles) -> Adapter | None:
    """None for what is refused with a reason; whatever else is raised comes through."""
    refusals: list[tuple[str, str]] = []
    try:
        return compile_adapter(inspect(files, base, LIMITS), base, LIMITS)
    except MalformedUpload as refusal:
        refusals.append(("the file", refusal.message))
    except AdapterInvalid as refusal:
        refusals += [(each.path, each.reason) for each in refusal.errors]
    assert refusals
    assert all(place and reason for place, reason in refusals)
    return None


def remade(files: CheckpointFiles, rng: random.Random) -> CheckpointFiles:
    """One to three fields of the config, of its method or beside it, with other values."""
    config: dict[str, Any] = json.loads(files.config)
    inside: dict[str, Any] = config["config"]
    members = [member for member in inside.get("configs", [inside]) if isinstance(member, dict)]
    for _ in range(rng.randint(1, 3)):
        fields = rng.choice([config, inside, *members, *members])
        name = rng.choice([*fields, "never_heard_of"])
        fields[name] = near_value(fields.get(name), rng) if rng.random() < 0.6 else any_value(rng)
        if rng.random() < 0.1:
            del fields[name]
        if not isinstance(config.get("config"), dict):
            break
    return replace(files, config=json.dumps(config).encode())


@pytest.mark.parametrize(("family", "form"), CASES)
def test_spoilt_checkpoint(family: str, form: str) -> None:
    base, files = resident(family), files_of(family, form)
    honest, fingerprint = admitted(base, files), base.fingerprint()
    assert honest is not None
    rng = random.Random(f"{family} {form}")
    for where in rng.sample(list(byte_changes.places(files)), NUM_EACH):
        spoilt = byte_changes.changed(files, where, rng)
        spoilt = replace(files, config=spoilt.config, weights=spoilt.weights)
        adapter = admitted(base, spoilt)
        if adapter is not None and _fields(spoilt) == _fields(files):
            assert_same_bits(replace(adapter, id=honest.id), honest)
    for _ in range(NUM_EACH):
        admitted(base, remade(files, rng))
    assert base.fingerprint() == fingerprint


def _fields(files: CheckpointFiles) -> dict[str, Any]:
    return parse_object(files.config, name="config", max_bytes=LIMITS.max_config_bytes)


def test_a_name_of_a_megabyte() -> None:
    files = files_of("llama", forms_of("llama")[0])
    for name in ("model_name", "model_class", "model_type", "name"):
        config = {**json.loads(files.config), name: "x" * 400_000}
        with pytest.raises(AdapterInvalid, match="at most 1024 characters"):
            inspect(replace(files, config=json.dumps(config).encode()), resident("llama"), LIMITS)
