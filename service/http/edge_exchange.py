"""One request at the edge and what has become of it: how much of it is held, what its client is told, and its end.

Serve's own plain-text answers become OpenAI's errors here. Knows no routes, no settings and no metrics.
"""

from __future__ import annotations

import asyncio
import random

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from service.chat.admission import Share
from service.chat.streaming import error_event
from service.errors import ApiError
from service.http.request_id import REQUEST_ID_HEADER

PIECE_BYTES = 1024 * 1024
"""Of a large message; the next piece waits until the client has taken the one before."""
RESTART_S = 5.0
"""A replica that was lost is back by then."""
LATEST_RETRY_S = 10.0
"""Whom Serve's full queue refused is sent away for 1 s to so long: nobody here knows how soon there will be room."""
LOST = ApiError("engine_unavailable", "the process that worked on this request was lost; try again",
                retry_after_s=RESTART_S)  # fmt: skip


def refusal(status: int) -> ApiError:
    """Serve's own plain-text answers, by their status."""
    if status == 404:  # our application answers on every path, so there is none
        return ApiError("engine_unavailable", "the service is starting or stopping; try again", retry_after_s=RESTART_S)
    if status == 408:
        return ApiError("request_timeout", "the request took too long; ask for less, or later")
    if status in (429, 503):
        return overloaded("too many requests are waiting; try again later")
    return LOST


def overloaded(message: str) -> ApiError:
    """Those who are refused together must not come back together."""
    return ApiError("overloaded", message, retry_after_s=random.uniform(1, LATEST_RETRY_S))


class Exchange:
    """One request and what has become of it."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        write_timeout_s: float,
        max_body_bytes: int,
        held_body: Share,
        held_answer: Share,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._write_timeout_s, self._max_body_bytes = write_timeout_s, max_body_bytes
        self._held_body, self._held_answer = held_body, held_answer
        self._body_bytes = 0
        """Handed on so far."""
        headers = Headers(scope=scope)
        self._body_read = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        self._started = False
        self._finished = False
        self._streams_events = False
        self.told: ApiError | None = None
        """What a client that is still there was told here, and not by the application."""
        self.broke_off = False
        """A stream with the status 200 ended with that."""
        self._left = False
        self._gone = False
        """The client takes nothing any more."""
        self._leave = asyncio.Event()
        """For the application the client has disconnected."""
        self.refused: ApiError | None = None
        """What to say instead of Serve's own answer."""

    def refuse_by_length(self) -> None:
        """Where a header that has been checked tells that the body is too large."""
        if int(Headers(scope=self._scope).get("content-length", "0")) > self._max_body_bytes:
            self.refused = self._too_large()

    async def receive(self) -> Message:
        """The client's next message, or that it has disconnected, as soon as that is decided here."""
        reading, leaving = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._leave.wait())
        try:
            await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return {"type": "http.disconnect"}
            message = reading.result()
        finally:
            reading.cancel()
            leaving.cancel()
        self._note(message)
        if (refused := self._charge(len(message.get("body", b"")))) is not None:
            self._break_off(refused)
            return {"type": "http.disconnect"}
        return message

    def _charge(self, body_bytes: int) -> ApiError | None:
        """Why a piece of body is too much, if it is."""
        self._body_bytes += body_bytes
        if self._body_bytes > self._max_body_bytes:
            return self._too_large()
        try:
            self._held_body.take(body_bytes)
        except ApiError as error:
            return overloaded(error.message)
        return None

    def _note(self, message: Message) -> None:
        """Whether more can come from the client."""
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._body_read = True
        if message["type"] == "http.disconnect":
            self._left = self._body_read = True

    async def send(self, message: Message) -> None:
        """Serve's refusals are kept back; everything else goes to the client."""
        self._held_body.give_back()  # the application answers: it has read what it wanted
        if message["type"] == "http.response.start" and self.refused is None:
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if message["status"] >= 400 and kind.startswith("text/plain"):
                self.refused = refusal(message["status"])
            else:
                self._streams_events = kind.startswith("text/event-stream")
        if self.refused is None:
            await self._deliver(message)

    def give_up(self) -> None:
        """Unless an answer has begun: there is nobody to give one."""
        if not self._started:
            self._break_off(LOST)

    def _break_off(self, error: ApiError) -> None:
        """Nothing more goes to the application, and nothing of it to the client, unless its answer has begun."""
        if not self._started:
            self.refused = error
        self._leave.set()

    def _too_large(self) -> ApiError:
        return ApiError("request_too_large", f"the body may have at most {self._max_body_bytes} bytes")

    async def finish(self, linger_s: float) -> None:
        """After the application: complete what it left open, and let go of a client that still sends."""
        if self._gone:
            return
        if not self._started:
            error = self.refused or LOST
            self.told = None if self._left else error
            response = error.response({REQUEST_ID_HEADER: Headers(scope=self._scope)[REQUEST_ID_HEADER]})
            await response(self._scope, self.receive, self._deliver)
        elif not self._finished and self._streams_events:
            self.told, self.broke_off = None if self._left else LOST, True
            await self._deliver({"type": "http.response.body", "body": error_event(LOST)})
        if self._finished and not self._body_read:
            await self._linger(linger_s)
            await self._write({"type": "http.response.body", "body": b""})

    async def _deliver(self, message: Message) -> None:
        """To the client. The last message waits where the client has not sent everything."""
        if message["type"] == "http.response.start":
            self._started = True
            if not self._body_read:
                message = {**message, "headers": list(message["headers"])}
                MutableHeaders(raw=message["headers"])["connection"] = "close"
        elif not message.get("more_body", False):
            self._finished = True
            if not self._body_read:
                message = {**message, "more_body": True}
        await self._write(message)

    async def _write(self, message: Message) -> None:
        """A large message goes piece by piece and counts as held until it is taken; without room for it the client
        counts as gone.
        """
        body = message.get("body", b"")
        if len(body) <= PIECE_BYTES:
            await self._write_piece(message)
            return
        try:
            self._held_answer.take(len(body))
        except ApiError:
            self._lose_client()
        for start in range(0, len(body), PIECE_BYTES):
            end = start + PIECE_BYTES
            more = end < len(body) or message.get("more_body", False)
            await self._write_piece({**message, "body": body[start:end], "more_body": more})
        self._held_answer.give_back()

    async def _write_piece(self, message: Message) -> None:
        """Unless the client counts as gone, or does from here on."""
        if self._gone:
            return
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._send(message)
        except TimeoutError:
            self._lose_client()

    def _lose_client(self) -> None:
        self._gone = True
        self._leave.set()

    async def _linger(self, seconds: float) -> None:
        """Take in and forget what a client sends that has its answer already."""
        try:
            async with asyncio.timeout(seconds):
                while not self._body_read:
                    self._note(await self._receive())
        except TimeoutError:
            pass
