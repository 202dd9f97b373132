"""Who may ask for which path, and how often: decided before a byte of a body is read. Decodes and parses nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import Scope

from service import keys
from service.errors import ApiError
from service.keys import ANYBODY, Caller, KeyRing
from service.ledger import Charge

if TYPE_CHECKING:  # it brings Ray, which reads its environment when it is imported: `__main__` sets that later
    from service.ledger_client import LedgerClient

ROUTE_SCOPES: dict[str, keys.Scope | None] = {
    "/healthz": None,
    "/readyz": None,
    "/openapi.json": None,
    "/v1/chat/completions": "chat",
    "/v1/feedback": "chat",
    "/v1/models": "chat",
    "/v1/models/{model_id:path}": "chat",
    "/version": "chat",
    "/metrics": "metrics",
}
"""Path of a route to the scope that a key needs; None: public. A route that is not here is not reachable."""
BEARER = re.compile(r"bearer +([!-~]{1,1024})", re.IGNORECASE)


def find_route(scope: Scope) -> str | None:
    """The path of the application's route that a request is for, as in ROUTE_SCOPES; methods are the route's matter."""
    for route in scope["app"].routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            return route.path if route.path in ROUTE_SCOPES else None
    return None


class Access:
    """What stands before every route."""

    def __init__(self, key_ring: KeyRing | None, ledger: LedgerClient) -> None:
        """Without a key ring everybody may do everything."""
        self._keys, self._ledger = key_ring, ledger

    async def admit(self, route: str | None, headers: Headers) -> Caller:
        """The caller of a request that may be answered. Raises ApiError: without a key the same for every path."""
        if route is not None and ROUTE_SCOPES[route] is None:
            return ANYBODY
        caller = ANYBODY if self._keys is None else authenticate(self._keys, headers)
        await self._charge(caller, {"requests": 1})
        if route is None:
            raise ApiError("route_not_found", "there is no such path")
        needed = ROUTE_SCOPES[route]
        if needed not in caller.scopes:
            raise ApiError("permission_denied", f"this path needs a key with the scope '{needed}'")
        return caller

    async def admit_images(self, caller: Caller, count: int, pixels: int) -> None:
        """Raises ApiError where the caller's quota does not allow so many images, and so many pixels, together, now."""
        await self._charge(caller, {"images": count, "pixels": pixels})

    async def _charge(self, caller: Caller, amounts: dict[str, int]) -> None:
        limits = {kind: getattr(caller.quota, f"{kind}_per_minute") for kind in amounts if amounts[kind]}
        charges = tuple(Charge(kind, amounts[kind], limit) for kind, limit in limits.items() if limit is not None)
        if not charges:
            return
        for charge in charges:
            if charge.amount > charge.per_minute:
                raise ApiError(
                    "request_too_large",
                    f"messages: {charge.amount} {charge.kind} are more than the {charge.per_minute} that the key "
                    "may send in a minute; send less at once",
                    param="messages",
                )
        wait_s = await self._ledger.charge(caller.name, charges)
        if wait_s > 0:
            quota = ", ".join(f"{charge.per_minute} {charge.kind}" for charge in charges)
            raise ApiError(
                "rate_limit_exceeded",
                f"the key's quota is used up: {quota} a minute; see Retry-After",
                retry_after_s=wait_s,
            )


def authenticate(key_ring: KeyRing, headers: Headers) -> Caller:
    """Raises ApiError where there is no key, or not exactly one, or it is not in force."""
    presented = headers.getlist("authorization")
    match = BEARER.fullmatch(presented[0].strip()) if len(presented) == 1 else None
    caller = key_ring.find(match[1].encode()) if match else None
    if caller is None:
        raise ApiError("invalid_api_key", "a valid API key is needed, as in Authorization: Bearer KEY")
    return caller
