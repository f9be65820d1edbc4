"""Starts the deployments, on the cluster that is there or on one of its own, and ends what it started.

Owns the command's side of a cluster: whether it may listen where it is told to, and when it is ready.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any, Final

import ray
from ray import serve

from peft_serve.api.origins import is_loopback
from peft_serve.cluster.counting import counted
from peft_serve.cluster.deployments import application
from peft_serve.cluster.failures import failure_of
from peft_serve.cluster.plan import APP, ENGINE, FRONT, Layout
from peft_serve.cluster.room import Node, Progress, Telling, require_room, waited_for
from peft_serve.config import Settings

AUTH: Final = "RAY_AUTH_MODE"

_log = logging.getLogger(__name__)

_ON_TOKENS: Final = "ray._private.authentication.authentication_token_setup"
"""Its warning is advice to do without a token, which this command would refuse."""

_ASKED_S: Final = 5.0
_LOOK_S: Final = 0.2
_LAST_WORDS_S: Final = 0.5  # for the ends of answers to leave the machine


def require_authentication(address: str | None, environ: Mapping[str, str]) -> None:
    """Raise ValueError for a cluster that would take orders from anybody.

    Ray's own ports listen on every address of a machine, wherever HTTP does, and who reaches one without a token runs
    what he likes. A cluster of our own asks for a token unless told not to; one that is there is as it was started, and
    says so in the environment alone.
    """
    mode = environ.get(AUTH, "").lower()
    if mode == "token" or (address is None and not mode):
        return
    where = "a cluster here" if address is None else f"--address {address}"
    told = f"{AUTH}={mode}" if mode else f"{AUTH} is not set"
    raise ValueError(
        f"{where}: other machines can reach ray's ports, and {told}: whoever does could run programs here; start ray "
        f"with {AUTH}=token (`ray get-auth-token --generate` makes a token), and set it for this command too"
    )


@contextmanager
def cluster(settings: Settings, layout: Layout, address: str | None) -> Iterator[None]:
    """A cluster with Serve listening, of our own unless there is an `address`; a cluster of our own ends with it, and
    so do its processes at once where the start is interrupted. Who calls has called `require_authentication`.

    Raises ValueError where a cluster of our own has no room for the replicas."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(_ON_TOKENS).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # ray tells its makers how it is used, unless told not to
    is_listening = is_cut = False
    try:
        _join(settings, layout, address)
        if address is None:
            require_room(_nodes()[0], layout)
        serve.start(
            http_options={"host": settings.host, "port": settings.port, "keep_alive_timeout_s": 75},
            logging_config=_logging(settings),
        )
        is_listening = True
        yield
    except (KeyboardInterrupt, SystemExit):
        is_cut = True
        raise
    finally:
        with redirect_stdout(StringIO()):  # ray tells there of a controller that was lost: that is what it was told to
            if is_listening and address is not None:
                serve.delete(APP, _blocking=not is_cut)
            elif is_listening and not is_cut:
                serve.shutdown()
            ray.shutdown()


def _join(settings: Settings, layout: Layout, address: str | None) -> None:
    if address is None:
        needed = layout.most_replicas * layout.replica_cpus + layout.fronts * layout.front_cpus
        ray.init(
            address="local",
            num_cpus=max(1, round(needed + 0.5)),  # what is counted, not what there is
            include_dashboard=False,
            _node_ip_address="127.0.0.1" if is_loopback(settings.host) else None,
            log_to_driver=False,
            configure_logging=False,
        )
    else:
        ray.init(address=address, log_to_driver=False, configure_logging=False)


def deploy(settings: Settings, layout: Layout, say: Callable[[str], None]) -> None:
    """Start both deployments, and wait until they answer; again with another layout, it changes what runs. Raises
    RuntimeError with the reason where replicas do not start."""
    say(f"starting {counted(layout.least_replicas, 'replica')} of {settings.model}")
    with Telling(lambda past_s: _log.warning(waited_for(layout, _progress(), _nodes(), past_s)), time.monotonic):
        try:
            serve.run(application(settings, layout), name=APP, route_prefix="/", logging_config=_logging(settings))
        except RuntimeError as error:
            raise RuntimeError(failure_of(str(error), _messages())) from error


def drain(settings: Settings, least_s: float, *, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
    """Have the fronts take no more requests, and give those that are open `drain_s` to end. They say that they are not
    ready for `least_s` at least, so that whoever sends requests hears of it."""
    fronts = serve.get_deployment_handle(FRONT, APP)
    began_s = clock()
    while True:
        try:
            told = fronts.broadcast("drain").results(timeout_s=_ASKED_S, return_exceptions=True)
        except Exception as error:  # noqa: BLE001  # ending is what matters
            _log.warning("the fronts do not answer: %s", error)
            return
        num_open, past_s = sum(each for each in told if isinstance(each, int)), clock() - began_s
        if (num_open == 0 and past_s >= least_s) or past_s >= settings.drain_s:
            sleep(_LAST_WORDS_S)
            return
        sleep(_LOOK_S)


def _nodes() -> list[Node]:
    """The machines of the cluster, as ray counts them."""
    counted_with = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    return [Node(cpus=each.get("CPU", 0.0), gpus=each.get("GPU", 0.0)) for each in counted_with]


def _messages() -> dict[str, str]:
    """What Serve tells of each deployment."""
    told = serve.status().applications.get(APP)
    return {} if told is None else {name: each.message for name, each in told.deployments.items()}


def _progress() -> Progress:
    told = serve.status().applications.get(APP)
    states = {} if told is None else {name: each.replica_states for name, each in told.deployments.items()}
    replicas, fronts = (states.get(name, {}).get("RUNNING", 0) for name in (ENGINE, FRONT))
    return Progress(num_replicas=replicas, num_fronts=fronts)


def _logging(settings: Settings) -> dict[str, Any]:
    return {"log_level": settings.log_level.upper(), "enable_access_log": False}
