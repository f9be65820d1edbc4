"""Where a server listens: whether it can, and whether others can reach it there without a key."""

from __future__ import annotations

import errno
import logging
import socket

from peft_serve.api.keyring import Keyring
from peft_serve.api.origins import is_loopback
from peft_serve.config import Settings

_log = logging.getLogger(__name__)


def check_port(settings: Settings) -> None:
    """Find out about a port in use before a base is loaded for it: an OSError, and ValueError for a place that is none
    of this machine or not this user's."""
    if settings.port == 0:
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            message = f"--host {settings.host} --port {settings.port}: cannot listen there ({error.strerror})"
            if error.errno == errno.EADDRINUSE:
                raise OSError(f"{message}; name another port") from error
            raise ValueError(f"{message}; name another port, or an address of this machine") from error


def warn_of_openness(settings: Settings, keyring: Keyring) -> None:
    """Say it where a server that asks for no key can be reached from elsewhere."""
    if keyring.is_open and not is_loopback(settings.host):
        _log.warning(
            "this server asks for no key, and %s can be reached from other machines: whoever reaches it can use and "
            "change it. --api-keys-file or PEFT_SERVE_API_KEY makes it ask (docs/how-to/keys-and-tenants.md); "
            "--host 127.0.0.1 keeps it to this machine",
            settings.host,
        )
