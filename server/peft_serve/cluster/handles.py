"""The replicas behind a handle of Ray Serve: `Replicas`, with ray's errors turned into what the front knows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from typing import Any, Final, cast

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from peft_serve.adapters.records import CheckpointFiles
from peft_serve.cluster.replicas import Homes, ReplicaLost
from peft_serve.cluster.routes import Route, key_of
from peft_serve.cluster.wire import Ask, BaseFacts, Found, Item, Report, Told
from peft_serve.core import AdapterId, FinishReason, RequestId
from peft_serve.errors import Internal, QueueFull

_log = logging.getLogger(__name__)

REPORTS_S: Final = 5.0
"""So long a report may take: the one that takes longer is of a replica that does not answer."""

_RETRY_S: Final = 1.0


class NoReplica(ReplicaLost):
    """Not one is there."""


@contextmanager
def translated() -> Iterator[None]:
    """Ray's errors as `replicas.Replicas` names them."""
    try:
        yield
    except BackPressureError as error:
        raise QueueFull("too many requests wait for a replica; try again later", retry_after_s=_RETRY_S) from error
    except DeploymentUnavailableError as error:
        raise NoReplica("there is none") from error
    except (RayActorError, ReplicaUnavailableError) as error:
        raise ReplicaLost(type(error).__name__) from error
    except RayTaskError as error:
        if isinstance(error.cause, RayActorError):
            raise ReplicaLost(type(error.cause).__name__) from error
        _log.exception("a replica failed in a call")
        raise Internal("the request failed on the server's side; others were not affected") from error
    except TaskCancelledError as error:  # not by us: whoever cancels does not listen any more
        raise ReplicaLost("its calls were cancelled") from error
    except RayError as error:
        raise ReplicaLost(type(error).__name__) from error


class ServeCall:
    """A `replicas.Call`. `response` is Serve's generator of a streaming call."""

    def __init__(self, response: Any) -> None:
        self._response = response

    async def items(self) -> AsyncIterator[Item]:
        """See `Call`."""
        with translated():
            async for item in self._response:
                yield item

    def cancel(self) -> None:
        """See `Call`."""
        self._response.cancel()


class ServeReplicas:
    """`replicas.Replicas` over the handle of the deployment of engines."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    def generate(self, ask: Ask, avoided: str | None) -> ServeCall:
        route = Route(adapter=key_of(ask.request.adapter), avoided=avoided or "")
        streaming = self._streaming.options(multiplexed_model_id=route.text())
        return ServeCall(_apart(streaming.generate.remote, ask))

    async def stop(self, replica: str, request: RequestId, reason: FinishReason) -> None:
        await self._called(Route(only=replica), "stop", request, reason)

    async def load(self, adapter: AdapterId, homes: Homes) -> None:
        await self._called(Route(adapter=key_of(adapter)), "load", adapter, homes)

    async def unload(self, adapter: AdapterId) -> None:
        await self._told("unload", adapter)

    async def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        await self._told("set_pinned", adapter, pinned=pinned)

    async def reports(self, front: str, sent_s: float) -> Sequence[Report]:
        try:
            found = await self._told("report", front, sent_s)
        except NoReplica:
            return ()
        return [each for each in found if isinstance(each, Report)]

    async def facts(self) -> BaseFacts:
        return cast(BaseFacts, await self._called(Route(), "facts"))

    async def all_facts(self) -> Sequence[BaseFacts]:
        return [each for each in await self._told("facts") if isinstance(each, BaseFacts)]

    async def inspect(self, files: CheckpointFiles) -> Found | Told:
        return cast("Found | Told", await self._called(Route(), "inspect", files))

    async def _called(self, route: Route, method: str, *args: Any) -> Any:
        handle = self._handle.options(multiplexed_model_id=route.text())
        with translated():
            return await _apart(getattr(handle, method).remote, *args)

    async def _told(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """What every replica answers, or the error of it."""
        with translated():
            try:
                answers = _apart(self._handle.broadcast, method, *args, **kwargs)
                return list(await answers.results_async(timeout_s=REPORTS_S, return_exceptions=True))
            except TimeoutError as error:
                raise ReplicaLost("they do not answer") from error


class ServeFronts:
    """All fronts of this application, over their own deployment's handle. Made on `loop`'s thread."""

    def __init__(self, handle: DeploymentHandle[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._handle = handle
        self._loop = loop
        self._pokes: set[asyncio.Task[None]] = set()

    def poke(self) -> None:
        """Have them look at the store. Returns at once; safe from any thread."""
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        task = self._loop.create_task(self._told())
        self._pokes.add(task)
        task.add_done_callback(self._pokes.discard)

    async def _told(self) -> None:
        try:
            with translated():
                answers = _apart(self._handle.broadcast, "poke")
                await answers.results_async(timeout_s=REPORTS_S, return_exceptions=True)
        except Exception:  # noqa: BLE001  # they look by themselves, a second later
            _log.info("other fronts could not be told of a change; they see it at their next look")


def _apart(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a call of its own. Serve gives all calls that an HTTP request makes the request's own id, and its router
    finds a replica for one call of an id at a time: the others would wait for ever."""
    return Context().run(call, *args, **kwargs)


def put(tokens: tuple[bytes, ...]) -> Any:
    """A reference to a vocabulary in ray's object store, which lasts as long as somebody has it."""
    return ray.put(tokens)
