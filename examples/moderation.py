"""Watch every stream's prompt, at its start and at every change, and act on those that break a rule.

A rule is a regular expression. A stream that breaks one is stopped, or gets another prompt (--instead). Each action is a
JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from contextlib import suppress

from shared.client import Api, Broker, ClientError, ConflictError, NotFoundError
from shared.contracts.events import EventKind
from shared.contracts.views import StreamView

LOOK_AT = (EventKind.ACCEPTED, EventKind.APPLIED)  # every start and every change is told by one of these
OVER = ("stopping", "stopped", "failed")


class Moderator:
    """Judges streams by their prompts. ``instead`` empty: they are stopped."""

    def __init__(self, api: Api, rules: list[re.Pattern[str]], instead: str) -> None:
        self._api, self._rules, self._instead = api, rules, instead
        self.actions = 0

    def broken(self, view: StreamView) -> str | None:
        """The rule that one of the stream's prompts breaks."""
        texts = (view.prompt, *(part.text for part in view.prompts))
        return next((rule.pattern for rule in self._rules for text in texts if rule.search(text)), None)

    async def look(self, stream: str) -> None:
        """Judge one stream as it is now, and act."""
        with suppress(NotFoundError, ConflictError):  # it has ended meanwhile
            view = await self._api.stream(stream)
            rule = self.broken(view)
            if rule is None or view.state in OVER:
                return
            if self._instead:
                await self._api.patch(stream, prompt=self._instead, recache=True)
            else:
                await self._api.stop(stream, drain=False)
            self.actions += 1
            told = {"stream": stream, "prompt": view.prompt, "rule": rule, "did": "prompt" if self._instead else "stop"}
            print(json.dumps(told), flush=True)


async def moderate(options: argparse.Namespace) -> None:
    rules = [re.compile(rule, re.IGNORECASE) for rule in options.forbid]
    async with (
        Api(options.api, options.token) as api,
        Broker.connect(options.nats) as broker,
        broker.events() as events,
    ):
        moderator = Moderator(api, rules, options.instead)
        async for view in api.streams("starting", "live", "degraded", "recovering"):  # what ran before we came
            await moderator.look(view.id)
        print(json.dumps({"watching": options.forbid}), flush=True)
        async for event in events:
            if event.event in LOOK_AT:
                await moderator.look(event.stream)
            if moderator.actions == options.actions:
                return


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
