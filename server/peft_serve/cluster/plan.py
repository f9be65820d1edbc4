"""How a server of many replicas is laid out: a few figures, and what of them each process is given. Knows no ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from peft_serve.config import Settings

APP: Final = "peft-serve"
ENGINE: Final = "Engine"
FRONT: Final = "Front"

RESERVED: Final = 16
"""Calls that a replica takes beyond its requests: to stop one, to tell how it is, to check an upload."""


class Layout(BaseModel):
    """What `serve-ray` has beyond the settings of `serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(default=2, ge=1, description="replicas of the engine, where they are not scaled")
    min_replicas: int | None = Field(default=None, ge=1, description="scale by load, with so many at least")
    max_replicas: int | None = Field(default=None, ge=1, description="scale by load, with so many at most")
    upscale_s: float = Field(default=30.0, ge=0, description="load must last so long before a replica is added")
    downscale_s: float = Field(default=600.0, ge=0, description="and so long be less before one is taken away")
    max_ongoing: int | None = Field(
        default=None, ge=1, description="requests at a replica, beyond which others are asked; default 2 x max_rows"
    )
    placement: Literal["residency", "rendezvous", "least-loaded", "random"] = Field(
        default="residency", description="which replica a request for an adapter goes to"
    )
    replica_cpus: float = Field(default=1.0, gt=0, description="CPUs that a replica is counted with")
    replica_gpus: float = Field(default=0.0, ge=0, description="GPUs of a replica")
    fronts: int = Field(default=1, ge=1, description="processes with HTTP; several need a shared store")
    front_cpus: float = Field(default=0.5, gt=0, description="CPUs that the front is counted with")

    @model_validator(mode="after")
    def _is_possible(self) -> Layout:
        if (self.min_replicas is None) != (self.max_replicas is None):
            raise ValueError("--min-replicas and --max-replicas: give both, or neither and --replicas")
        if self.min_replicas is not None and "replicas" in self.model_fields_set:
            raise ValueError("--replicas: is for a number that stays; leave it out with --min-replicas")
        if self.min_replicas is not None and self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"--min-replicas {self.min_replicas} is above --max-replicas {self.max_replicas}")
        if self.replica_gpus > 1 and self.replica_gpus != int(self.replica_gpus):
            raise ValueError(f"--replica-gpus {self.replica_gpus:g}: give a part of one GPU, or whole ones")
        return self

    @property
    def least_replicas(self) -> int:
        """As many as there are at the start."""
        return self.min_replicas or self.replicas

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.replicas

    def require_possible(self, settings: Settings) -> None:
        """Raise ValueError where these settings do not go with the layout."""
        is_shared = settings.store_shared or (settings.store or "").startswith("s3://")
        if self.fronts > 1 and not is_shared:
            raise ValueError(
                f"--fronts {self.fronts}: several fronts write to one store; start with --store-shared, or with "
                "--store s3://bucket/prefix"
            )

    def ongoing(self, settings: Settings) -> int:
        """Requests at a replica at most."""
        return self.max_ongoing or 2 * settings.max_rows


def engine_settings(settings: Settings, layout: Layout) -> dict[str, Any]:
    """What a replica is started with. It has no HTTP, and its queue is never what refuses: the front counts."""
    most = layout.ongoing(settings) + RESERVED
    return plain(settings.model_copy(update={"api_key": None, "max_queue": most}))


def front_settings(settings: Settings, layout: Layout) -> dict[str, Any]:
    """What the front is started with: as many requests may wait as all replicas take, and its queue."""
    most = layout.most_replicas * layout.ongoing(settings) + settings.max_queue
    return plain(settings.model_copy(update={"max_queue": most}))


def absolute(settings: Settings) -> Settings:
    """The settings with every path as another process, in another folder, finds it."""
    home = Path(os.getcwd())
    found: dict[str, Any] = {}
    for name, value in settings:
        if isinstance(value, Path):
            found[name] = home / value
        elif isinstance(value, list) and value and isinstance(value[0], Path):
            found[name] = [home / each for each in value]
    if settings.store is not None and "://" not in settings.store:
        found["store"] = str(home / settings.store)
    if (home / settings.model).is_dir():
        found["model"] = str(home / settings.model)
    return settings.model_copy(update=found)


def plain(settings: Settings) -> dict[str, Any]:
    """Values that travel in any form: no paths, no hidden ones."""
    found: dict[str, Any] = {}
    for name, value in settings:
        if isinstance(value, SecretStr):
            found[name] = value.get_secret_value()
        elif isinstance(value, Path):
            found[name] = str(value)
        elif isinstance(value, list):
            found[name] = [str(each) for each in value]
        else:
            found[name] = value
    return found
