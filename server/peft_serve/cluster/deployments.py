"""The two deployments of Ray Serve: `Front` has HTTP and no model, `Engine` the model and no HTTP.

Serve starts, watches, scales and ends them; what they do is `replica`'s and the application's. Imported by the command
and by Serve's own processes too, so what takes seconds is imported where it is used.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from peft_serve.cluster.plan import ENGINE, FRONT, RESERVED, Layout, engine_settings, front_settings
from peft_serve.config import Settings
from peft_serve.core import AdapterId, FinishReason, RequestId
from peft_serve.logs import configure_logs

if TYPE_CHECKING:
    from fastapi import FastAPI

    from peft_serve.adapters.records import CheckpointFiles
    from peft_serve.cluster.replicas import Homes
    from peft_serve.cluster.wire import Ask, BaseFacts, Found, Item, Report, Told

_log = logging.getLogger(__name__)

ROUTER: Final = "peft_serve.cluster.router.AdapterRouter"
STATS_S: Final = 1.0
"""Between two times that a replica tells routers how it is."""

_HEALTH_S: Final = 2.0
_HEALTH_TIMEOUT_S: Final = 30.0
_STORE_S: Final = 5.0  # beyond the requests, for what ends with a replica
_SCALE_LOOK_S: Final = 2.0
_MAX_BACKOFF_S: Final = 0.1  # between two looks for a replica with room


class Engine:
    """A replica, as Serve calls it. Methods answer calls of the front, and none blocks."""

    async def __init__(self, values: dict[str, Any], max_ongoing: int) -> None:  # type: ignore[misc]  # Serve awaits it
        from peft_serve.cluster.replica import Replica
        from peft_serve.engine.adapter_places import open_store_to_read
        from peft_serve.engine.assembly import build

        settings = Settings(**values)
        configure_logs(settings.log_level, settings.log_format)
        parts, engine = await asyncio.to_thread(build, settings, _log.info, opens=open_store_to_read)
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(parts, engine, name=name, max_ongoing=max_ongoing)
        self._replica.start()

    async def generate(self, ask: Ask) -> AsyncIterator[Item]:
        async for item in self._replica.generate(ask):
            yield item

    async def stop(self, request: RequestId, reason: FinishReason) -> None:
        self._replica.stop(request, reason)

    async def load(self, adapter: AdapterId, homes: Homes) -> None:
        self._replica.load(adapter, homes)

    async def unload(self, adapter: AdapterId) -> None:
        self._replica.unload(adapter)

    async def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        self._replica.set_pinned(adapter, pinned=pinned)

    async def inspect(self, files: CheckpointFiles) -> Found | Told:
        return await self._replica.inspect(files)

    async def facts(self) -> BaseFacts:
        return self._replica.facts()

    async def report(self, front: str, sent_s: float) -> Report:
        return self._replica.report(front, sent_s)

    async def check_health(self) -> None:
        """Serve's: whatever it raises has the replica replaced."""
        self._replica.check_health()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Serve's: what routers are told."""
        return self._replica.routing_stats()

    async def __del__(self) -> None:
        if hasattr(self, "_replica"):
            await asyncio.to_thread(self._replica.close)


class Front:
    """The HTTP application, as Serve calls it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engine: DeploymentHandle[Any], values: dict[str, Any], max_ongoing: int, max_queue: int
    ) -> None:
        from prometheus_client import CollectorRegistry

        from peft_serve.cluster.board import Board
        from peft_serve.cluster.figures import PlacingFigures
        from peft_serve.cluster.fitting import fitting_facts, mark_of
        from peft_serve.cluster.front_parts import front_parts
        from peft_serve.cluster.handles import ServeFronts, ServeReplicas, put
        from peft_serve.cluster.remote_engine import Bounds, RemoteEngine
        from peft_serve.cluster.remote_gate import RemoteGate
        from peft_serve.cluster.specs import SpecWriter

        settings = Settings(**values)
        configure_logs(settings.log_level, settings.log_format)
        registry = CollectorRegistry()
        loop, replicas = asyncio.get_running_loop(), ServeReplicas(engine)
        facts = await fitting_facts(replicas, mark_of(settings), clock=time.monotonic, sleep=asyncio.sleep)
        self._engine = RemoteEngine(
            replicas,
            Board(facts.checked_for),
            SpecWriter(put),
            front=uuid.uuid4().hex,
            bounds=Bounds(max_ongoing=max_ongoing, max_queue=max_queue),
            clock=time.monotonic,
            loop=loop,
            draw_seed=partial(random.SystemRandom().getrandbits, 32),
            figures=PlacingFigures(registry),
        )
        await self._engine.look()
        gate = RemoteGate(replicas, loop)
        fronts = ServeFronts(serve.get_deployment_handle(FRONT, serve.get_replica_context().app_name), loop)
        self._parts = await asyncio.to_thread(
            front_parts, settings, facts, self._engine, gate, registry, _log.info, fronts.poke
        )
        self._watching = loop.create_task(self._engine.watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        from peft_serve.api.app import create_app
        from peft_serve.cluster.request_ids import OneRequestId

        app = create_app(self._parts)
        app.add_middleware(OneRequestId)
        return app

    async def drain(self) -> int:
        """Take no more requests; gives how many are open."""
        self._engine.close_admission()
        return self._engine.num_open

    async def poke(self) -> None:
        """Another front changed the store that they share."""
        if self._parts.follower is not None:
            self._parts.follower.poke()

    async def check_health(self) -> None:
        """Serve's: a front that knows another base than all replicas have is started again."""
        if self._engine.has_only_strangers:
            raise RuntimeError("the replicas serve another base, version or limits than this front was started with")


def application(settings: Settings, layout: Layout) -> Application:
    """Both deployments, bound; paths in the settings are absolute."""
    layout.require_possible(settings)
    max_ongoing = layout.ongoing(settings)
    lasting = {
        "graceful_shutdown_timeout_s": settings.drain_s + _STORE_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": _HEALTH_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "max_constructor_retry_count": 3,
    }
    engine = serve.deployment(
        Engine,
        name=ENGINE,
        max_ongoing_requests=max_ongoing + RESERVED,
        max_queued_requests=layout.most_replicas * (max_ongoing + RESERVED) + settings.max_queue,
        ray_actor_options={"num_cpus": layout.replica_cpus, "num_gpus": layout.replica_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            request_router_kwargs={"max_ongoing": max_ongoing, "placement": layout.placement},
            request_routing_stats_period_s=STATS_S,
            max_backoff_s=_MAX_BACKOFF_S,
        ),
        **lasting,
        **_number(layout, max_ongoing),
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name=FRONT,
        num_replicas=layout.fronts,
        max_ongoing_requests=settings.max_connections,
        ray_actor_options={"num_cpus": layout.front_cpus},
        **lasting,
    )
    bound = engine.bind(engine_settings(settings, layout), max_ongoing)
    return front.bind(bound, front_settings(settings, layout), max_ongoing, settings.max_queue)


def app(args: dict[str, Any]) -> Application:
    """For a config file of Serve: `args` are settings of `serve` and options of `serve-ray`, by their names."""
    layout = {name: args[name] for name in Layout.model_fields if name in args}
    settings = {name: value for name, value in args.items() if name not in layout}
    return application(Settings(**settings), Layout(**layout))


def _number(layout: Layout, max_ongoing: int) -> dict[str, Any]:
    if layout.min_replicas is None:
        return {"num_replicas": layout.replicas}
    scaling = AutoscalingConfig(
        min_replicas=layout.min_replicas,
        max_replicas=layout.most_replicas,
        initial_replicas=layout.min_replicas,
        target_ongoing_requests=max(1.0, max_ongoing / 4),
        upscale_delay_s=layout.upscale_s,
        downscale_delay_s=layout.downscale_s,
        metrics_interval_s=_SCALE_LOOK_S,
        look_back_period_s=2 * _SCALE_LOOK_S,
    )
    return {"autoscaling_config": scaling}
