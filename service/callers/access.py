"""Who may ask for what, and how often: decided before a byte of a body is read. Decodes and parses nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from service.callers.keys import ANYBODY, Caller, KeyRing, Scope
from service.callers.ledger import Charge
from service.errors import ApiError

if TYPE_CHECKING:  # it brings Ray, which reads its environment when it is imported: `__main__` sets that later
    from service.callers.ledger_client import LedgerClient

BEARER = re.compile(r"bearer +([!-~]{1,1024})", re.IGNORECASE)


class Access:
    """What stands before every route."""

    def __init__(self, key_ring: KeyRing | None, ledger: LedgerClient) -> None:
        """Without a key ring everybody may do everything."""
        self._keys, self._ledger = key_ring, ledger

    async def admit(self, headers: Headers) -> Caller:
        """The caller of a request. Raises ApiError: without a key the same for every path."""
        caller = ANYBODY if self._keys is None else authenticate(self._keys, headers)
        await self._charge(caller, {"requests": 1})
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


def require(caller: Caller, scope: Scope) -> None:
    """Raises ApiError where the caller's key has not the scope."""
    if scope not in caller.scopes:
        raise ApiError("permission_denied", f"this path needs a key with the scope '{scope}'")


def authenticate(key_ring: KeyRing, headers: Headers) -> Caller:
    """Raises ApiError where there is no key, or not exactly one, or it is not in force."""
    presented = headers.getlist("authorization")
    match = BEARER.fullmatch(presented[0].strip()) if len(presented) == 1 else None
    caller = key_ring.find(match[1].encode()) if match else None
    if caller is None:
        raise ApiError("invalid_api_key", "a valid API key is needed, as in Authorization: Bearer KEY")
    return caller
