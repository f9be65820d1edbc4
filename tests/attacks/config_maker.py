"""Configs out of a seeded generator: an honest one with a few fields set to what no trainer ever wrote."""

from __future__ import annotations

import json
import random
from typing import Any, Final

from peft_serve.adapters.config_schema import INERT, OPTIONAL, REFUSED
from peft_serve.adapters.methods import METHODS
from peft_serve.adapters.records import CheckpointFiles

NUMBERS: Final = (
    *(-1, 0, 1, 2, 3, 7, 64, 255, 256, 257, 1 << 16, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 32, 1 << 40),
    *((1 << 63) - 1, 1 << 63, 1 << 64, 1 << 70, 10**300, -(1 << 31), -(1 << 63), 0.0, -0.0, 0.5, 1.0, 1.5, -1.5),
    *(1e-320, 1e-30, 1e6, 1.1e6, 3.4e38, 1e300, 1.7e308, -1e300),
)
WORDS: Final = (
    *("", "x", "none", "all", "lora_only", "q_proj", "model", "model.layers.0.self_attn.q_proj", "lm_head", "linear"),
    *("pissa", "olora", "corda", "eva", "bat", "mini", "full", "qr", "relu", "vector", "constant", "road_1", "db4"),
    *(
        "([a-z]+)+$",
        ".*",
        "(a|a)*b",
        "../../etc/passwd",
        "\x00",
        "\u202e",
        "é",
        "0",
        "true",
        "NaN",
        "SEQ_CLS",
        "\ufeff",
    ),
    *("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "x" * 2000, "a." * 500),
)


def made(peft_type: str, files: CheckpointFiles, rng: random.Random) -> CheckpointFiles:
    """The checkpoint with one to four fields of its config changed."""
    config: dict[str, Any] = json.loads(files.config)
    schema = METHODS[peft_type].schema
    read = [*schema.required, *schema.optional]
    others = [*config, *schema.inert, *schema.refused, *OPTIONAL, *INERT, *REFUSED, "never_heard_of"]
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(read if rng.random() < 0.7 else others)
        if rng.random() < 0.1:
            config.pop(name, None)
        else:
            config[name] = _value(config.get(name), rng)
    return CheckpointFiles(config=json.dumps(config).encode(), weights=files.weights)


def _value(honest: object, rng: random.Random) -> object:
    """Half of the time something close to the honest value, for what is far off is soon refused."""
    if rng.random() < 0.5:
        return near_value(honest, rng)
    return any_value(rng, depth=0)


def near_value(honest: object, rng: random.Random) -> object:
    """A value beside the honest one, of its type or nearly so."""
    if isinstance(honest, bool):
        return not honest
    if isinstance(honest, int):
        return rng.choice((honest + 1, honest - 1, 2 * honest, honest // 2, -honest, float(honest), str(honest)))
    if isinstance(honest, float):
        return rng.choice((2 * honest, -honest, honest / 3, int(honest), 1e30 * honest))
    if isinstance(honest, list) and honest:
        return rng.choice((honest[1:], honest * 2, [*honest, any_value(rng, depth=1)], honest[:1], [honest]))
    if isinstance(honest, dict) and honest:
        key = rng.choice(list(honest))
        return {**honest, rng.choice((key, f"{key}$", f"^{key}", f".*{key}", "q_proj")): any_value(rng, depth=1)}
    return any_value(rng, depth=0)


def any_value(rng: random.Random, *, depth: int = 0) -> object:
    """Any JSON at all, of few members."""
    kind = rng.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(WORDS)
    if kind == 4:
        return [any_value(rng, depth=depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(WORDS): any_value(rng, depth=depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(([], {}, [[]], [0] * 300, ["q_proj"] * 300, {"q_proj": {}}, [True, False], [2**63], [-1]))
