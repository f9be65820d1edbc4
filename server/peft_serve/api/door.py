"""The door: who sends a request, and whether they may send it here. Before its body is read, and before any route.

Plain ASGI, inside the envelope that turns a refusal into an answer. Puts the `Principal` into the scope's state. A
server without keys lets everybody in; what a browser was made to send is refused by every server.
"""

from __future__ import annotations

import hmac
import re
from typing import Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from peft_serve.api.keyring import Keyring
from peft_serve.api.origins import Origins
from peft_serve.api.principal import ANYONE, NOBODY, STATE, Principal
from peft_serve.api.problems import family_of, problem_of_http, response_of
from peft_serve.api.quotas import Quotas
from peft_serve.api.route_needs import Need, RouteNeeds
from peft_serve.errors import Forbidden, QuotaExceeded, Unauthorized
from peft_serve.tenant_figures import TenantFigures

MAX_TOKEN_CHARS: Final = 512
METRICS_PATHS: Final = frozenset({"/metrics", "/metrics/gateway"})
_BEARER: Final = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([!-~]+) *")


class Door:
    """Wraps the application; see the module's docstring. `metrics_is_public`: no key is asked for `/metrics`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keyring: Keyring,
        origins: Origins,
        quotas: Quotas,
        figures: TenantFigures,
        needs: RouteNeeds,
        metrics_is_public: bool,
    ) -> None:
        self._app = app
        self._keyring = keyring
        self._origins = origins
        self._quotas = quotas
        self._figures = figures
        self._needs = needs
        self._metrics_is_public = metrics_is_public

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        self._origins.check(scope, headers)
        if self._keyring.is_open:
            scope.setdefault("state", {})[STATE] = ANYONE
            await self._app(scope, receive, send)
            return
        principal = self._principal(headers)
        scope.setdefault("state", {})[STATE] = principal or NOBODY
        path = route_path(scope)
        needs = self._needs.of(scope["method"], path)
        if self._metrics_is_public and path in METRICS_PATHS and needs:
            needs = frozenset({Need.NONE})
        if needs != {Need.NONE}:
            if principal is None:
                raise self._refused(headers)
            if not needs:
                await self._answer_nowhere(scope, receive, send, path)
                return
            self._let_in(principal, needs)
        await self._app(scope, receive, send)

    def _principal(self, headers: Headers) -> Principal | None:
        """Whose key a request carries; None where it carries none that is known."""
        token = token_of(headers)
        return None if token is None else self._keyring.find(token)

    def _refused(self, headers: Headers) -> Unauthorized:
        is_missing = "authorization" not in headers and "x-api-key" not in headers
        self._figures.observe_refusal("missing" if is_missing else "unknown")
        return Unauthorized(
            "this server asks for a key; send it as 'Authorization: Bearer <key>'"
            if is_missing
            else trouble_of(headers)
        )

    def _let_in(self, principal: Principal, needs: frozenset[Need]) -> None:
        missing = sorted(need.value for need in needs if not need.is_met(principal.scopes))
        if missing:
            self._figures.observe_refusal("scope")
            own = ", ".join(sorted(principal.scopes))
            raise Forbidden(f"this key is for {own}; the route needs a key for {' and '.join(missing)}")
        try:
            self._quotas.take_request(principal.tenant)
        except QuotaExceeded as error:
            self._figures.observe_quota(principal.tenant.name, error.quota)
            raise

    async def _answer_nowhere(self, scope: ASGIScope, receive: Receive, send: Send, path: str) -> None:
        """As the router answers where it has no route, or none for the method."""
        family = family_of(scope["path"])
        methods = self._needs.methods(path)
        problem = problem_of_http(HTTPException(405 if methods else 404), methods=methods)
        scope["state"]["error"] = problem.code
        await response_of(problem, family, scope["state"].get("request_id"))(scope, receive, send)


def route_path(scope: ASGIScope) -> str:
    """The address as the router reads it: without the path below which the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    below = path.removeprefix(root)
    return below if root and below != path and below[:1] in ("", "/") else path


def trouble_of(headers: Headers) -> str:
    """Why no key of a request counts, from the shape of its headers alone: of each key by itself nothing is told."""
    bearers, others = headers.getlist("authorization"), headers.getlist("x-api-key")
    words = [value.split(None, 1) for value in bearers]
    if any(each and each[0].lower() != "bearer" for each in words):
        return (
            "Authorization does not begin with Bearer, the one scheme that is read here; send "
            "'Authorization: Bearer <key>', or X-API-Key without an Authorization"
        )
    tokens = [each[1].strip() if len(each) == 2 else "" for each in words] + [value.strip() for value in others]
    if not all(tokens):
        return "a header is there for the key, and no key in it; send it as 'Authorization: Bearer <key>'"
    if len(set(tokens)) > 1:
        return (
            "more than one key was sent; send one, as 'Authorization: Bearer <key>' or as X-API-Key "
            "(a proxy on the way may have added the other)"
        )
    return "the key is not one of this server's; it may have been withdrawn"


def token_of(headers: Headers) -> str | None:
    """The key in `Authorization: Bearer` or `X-API-Key`. Said twice it has to be the same; else it is none."""
    found = []
    for value in headers.getlist("authorization"):
        bearer = _BEARER.fullmatch(value)
        found.append("" if bearer is None else bearer[1])
    found += [value.strip() for value in headers.getlist("x-api-key")]
    if not found or not 0 < len(found[0]) <= MAX_TOKEN_CHARS:
        return None
    first = found[0].encode()
    return found[0] if all(hmac.compare_digest(first, other.encode()) for other in found[1:]) else None
