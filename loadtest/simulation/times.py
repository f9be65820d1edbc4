"""What things take: a step by what it computes, and bringing an adapter from where it is. Seconds throughout.

By default the figures of `loadtest/LOG.md` for the 0.1 B shape on two cores:

- a step and a token of it: least squares through the steps of `bound` (2026-11-21 17:56, 1 to 32 rows);
- a rank: 0.625 MB (an adapter of rank 8 is 5 MB) at that entry's 33.6 GB/s, so that sixteen different adapters cost 8 %
  of a step of 16 rows, as `w4` found (2026-11-21 18:01); a KV position: its 12,288 bytes at the same rate;
- loads: what the first token waits longer than for a resident adapter, in `w6` (2026-11-21 22:12), and the median time
  between tokens there beside the compiles of adapters never seen, over that beside none.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any

STEP_SERIES = 'peft_serve_step_time_model_seconds{{per="{0}"}}'
LOAD_SERIES = 'peft_serve_adapter_load_seconds_{0}{{tier="{1}"}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """The fitted model of a step, step + token * tokens + rank * sum of ranks + position * KV positions, and of loads
    from the host's memory, from the disk where it lies compiled, and of one that this replica has never seen."""

    step: float = 13.2e-3
    token: float = 1.04e-3
    rank: float = 18.6e-6
    position: float = 0.37e-6
    from_host: float = 3e-3
    from_disk: float = 54e-3
    never_seen: float = 346e-3
    slowdown: float = 2.0  # of steps while an adapter that was never seen is compiled

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}: seconds are finite and not below zero")
        if self.step + self.token == 0:
            raise ValueError("step and token are both 0: a step takes some time")
        if self.slowdown < 1:
            raise ValueError(f"slowdown is {self.slowdown}: it is a factor, 1 where a compile slows nobody down")

    def predict(self, num_tokens: int, sum_rank: int, num_positions: int) -> float:
        """Seconds of a step."""
        return self.step + self.token * num_tokens + self.rank * sum_rank + self.position * num_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Sourced:
    """Times, and where they come from in words."""

    times: Times
    source: str


LOGGED = Sourced(
    times=Times(), source="the 0.1 B shape on two cores, from loadtest/LOG.md (loadtest/simulation/times.py)"
)


def read_times(path: Path) -> Sourced:
    """From JSON: an object with any of the fields of `Times`; what it lacks is as logged. ValueError if it is none."""
    try:
        told = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise ValueError(f"{path} is no JSON ({problem})") from None
    known = [field.name for field in fields(Times)]
    if not isinstance(told, dict) or any(not _is_number(value) for value in told.values()):
        raise ValueError(f"{path} is no object of numbers; write for instance {json.dumps(asdict(Times()))}")
    for name in told:
        if name not in known:
            raise ValueError(f"{path} has {name!r}; there are {', '.join(known)}")
    left = [name for name in known if name not in told]
    as_logged = f"; as logged: {', '.join(left)}" if left else ""
    return Sourced(times=Times(**told), source=f"{path}{as_logged}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def scraped(samples: Mapping[str, float], url: str) -> Sourced:
    """From a server's `/metrics`: the step as it has fitted it, and its mean loads where there were any.

    The server tells loads by the tier they fill: what fills the host comes from the disk or was never seen, and it does
    not say which; so that of an adapter never seen stays as logged.
    """
    steps = {name: samples.get(STEP_SERIES.format(name), nan) for name in ("step", "token", "rank", "position")}
    if not all(isfinite(value) for value in steps.values()) or not steps["step"] + steps["token"] > 0:
        raise ValueError(
            f"{url}/metrics tells no {STEP_SERIES.format('step')}: it is no server of ours, or has run no step"
        )
    found = {}
    for name, tier in (("from_host", "device"), ("from_disk", "host")):
        count = samples.get(LOAD_SERIES.format("count", tier), 0.0)
        if count:
            found[name] = samples[LOAD_SERIES.format("sum", tier)] / count
    told = f"{url}/metrics ({', '.join([*steps, *found])}; the rest as logged)"
    return Sourced(times=replace(Times(), **steps, **found), source=told)
