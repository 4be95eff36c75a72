"""Watch every stream's prompt, at its start and at every change, and act on those that break a rule.

A rule is a regular expression. A stream that breaks one is stopped, or gets another prompt (--instead); where that cannot
be done it is stopped. While the API has no time or does not answer, it is asked again until it does, and after an outage of
NATS all that run are judged: nothing goes by unseen. Each action is a JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress

from shared.client import (
    Api,
    ApiError,
    Broker,
    ClientError,
    ConflictError,
    Feed,
    NotFoundError,
    UnreachableError,
)
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.views import StreamView

LOOK_AT = (EventKind.ACCEPTED, EventKind.APPLIED)  # every start and every change is told by one of these
OVER = ("stopping", "stopped", "failed")
ASK_AGAIN_S = 1.0  # where nobody answered
LOOK_UP_S = 1.0  # from the events, where none comes


class Moderator:
    """Judges streams by their prompts. ``instead`` empty: they are stopped."""

    def __init__(self, api: Api, rules: list[re.Pattern[str]], instead: str) -> None:
        self._api, self._rules, self._instead = api, rules, instead
        self.actions = 0

    def broken(self, view: StreamView) -> str | None:
        """The rule that one of the stream's prompts breaks."""
        texts = (view.prompt, *(part.text for part in view.prompts))
        return next((rule.pattern for rule in self._rules for text in texts if rule.search(text)), None)

    async def sweep(self) -> None:
        """Judge all that run."""
        await self._patiently("all", self._look_at_all)

    async def watch(self, stream: str) -> None:
        """Judge one stream, however long it takes until the API answers."""
        await self._patiently(stream, lambda: self.look(stream))

    async def _patiently(self, whom: str, judge: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                return await judge()
            except ApiError as error:
                if error.status != 429 and error.status < 500:  # it would be refused for ever
                    raise
                wait_s, why = error.problem.retry_after_s or ASK_AGAIN_S, str(error)
            except UnreachableError as error:
                wait_s, why = ASK_AGAIN_S, str(error)
            print(json.dumps({"stream": whom, "waiting_s": wait_s, "why": why}), flush=True)
            await asyncio.sleep(wait_s)

    async def _look_at_all(self) -> None:
        async for view in self._api.streams("starting", "live", "degraded", "recovering"):
            await self.watch(view.id)

    async def look(self, stream: str) -> None:
        """Judge one stream as it is now, and act."""
        with suppress(NotFoundError, ConflictError):  # it has ended meanwhile
            view = await self._api.stream(stream)
            rule = self.broken(view)
            if rule is None or view.state in OVER:
                return
            did = await self._act(stream)
            self.actions += 1
            print(json.dumps({"stream": stream, "prompt": view.prompt, "rule": rule, "did": did}), flush=True)

    async def _act(self, stream: str) -> str:
        if self._instead:
            with suppress(ClientError):  # whatever is in the way of another prompt: then the stream ends
                await self._api.applied(await self._api.patch(stream, prompt=self._instead, recache=True))
                return "prompt"
        await self._api.stop(stream, drain=False)
        return "stop"


async def moderate(options: argparse.Namespace) -> None:
    rules = [re.compile(rule, re.IGNORECASE) for rule in options.forbid]
    async with (
        Api(options.api, options.token) as api,
        Broker.connect(options.nats) as broker,
        broker.events() as events,
    ):
        moderator = Moderator(api, rules, options.instead)
        await moderator.sweep()  # what ran before we came
        print(json.dumps({"watching": options.forbid}), flush=True)
        await follow(broker, events, moderator, options.actions)


async def follow(broker: Broker, events: Feed[StreamEvent], moderator: Moderator, actions: int) -> None:
    """Judge whatever is told of, and all that run when something was not; ``actions`` below 0: for ever."""
    missed = 0
    while actions < 0 or moderator.actions < actions:
        event = await soon(events)
        if events.dropped + broker.reconnects > missed:  # more was told than is kept, or while NATS was away
            missed = events.dropped + broker.reconnects
            await moderator.sweep()
        if event is not None and event.event in LOOK_AT:
            await moderator.watch(event.stream)


async def soon(events: Feed[StreamEvent]) -> StreamEvent | None:
    """The next event; None: there is none just now."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LOOK_UP_S):
            return await anext(events)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forbid", action="append", required=True, metavar="REGEX", help="may be given several times")
    parser.add_argument("--instead", default="", metavar="PROMPT", help="change the prompt to this; without it: stop")
    parser.add_argument("--actions", type=int, default=-1, help="leave after so many")
    parser.add_argument("--api", default="http://127.0.0.1:7860")
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="`rheocast up` prints its own")
    parser.add_argument("--token", help="of an operator; an admin's for every tenant's streams")
    try:
        asyncio.run(moderate(parser.parse_args()))
    except ClientError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
