"""A limit on request bodies that counts what comes: a chunked body announces no length."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.problems import problem


class BodyLimit:
    """ASGI middleware: reads a body of at most ``max_bytes`` before the application sees it; more is answered 413.

    Paths in ``streamed`` take their bodies as they come, and count for themselves.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, streamed: tuple[str, ...] = ()) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["path"] in self._streamed:
            await self._app(scope, receive, send)
            return
        read = None if self._announces_more(scope) else await self._read(receive)
        if read is None:
            refusal = problem(413, "Too large", f"a body may have {self._max_bytes} bytes")
            await refusal(scope, receive, send)
            return
        waiting = iter(read)

        async def replay() -> Message:
            message = next(waiting, None)
            return await receive() if message is None else message

        await self._app(scope, replay, send)

    def _announces_more(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"content-length":
                return not value.isdigit() or int(value) > self._max_bytes
        return False

    async def _read(self, receive: Receive) -> list[Message] | None:
        """The messages up to the end of the body, or of the connection; None once they hold too much."""
        messages: list[Message] = []
        size = 0
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                return None
            messages.append(message)
            if message["type"] != "http.request" or not message.get("more_body", False):
                return messages
