"""Take a stream's restyled frames over NATS, as JPEG files: a sink is added for it and taken away at the end, by Ctrl-C too."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
from contextlib import suppress
from pathlib import Path

from shared.client import Api, ApiError, Broker, ClientError, Feed
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.sinks import FramePublished, NatsSink

SINK = f"subscriber-{secrets.token_hex(3)}"  # others may watch the same stream


async def subscribe(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    taken, latencies = 0, list[float]()
    async with (
        Api(options.api, options.token) as api,
        Broker.connect(options.nats) as broker,
        broker.frames(options.stream) as frames,
        broker.events(options.stream) as events,
    ):
        ending = asyncio.create_task(end_of(events, frames))
        try:
            await api.applied(await api.add_sink(options.stream, NatsSink(id=SINK, format="jpeg", quality=85)))
            async for frame in frames:
                latencies.append((frame.shown_ns - frame.captured_ns) / 1e6)
                path = options.out / f"{frame.chunk:06d}-{frame.pts}.jpg"
                await asyncio.to_thread(path.write_bytes, frame.data)
                taken += 1
                if taken == options.frames:
                    break
        finally:
            ending.cancel()
            with suppress(ApiError):  # the stream may have ended
                await api.remove_sink(options.stream, SINK)
        dropped = frames.dropped
    median = sorted(latencies)[taken // 2] if taken else 0.0
    print(json.dumps({"frames": taken, "missed": dropped, "latency_ms": round(median, 1), "folder": str(options.out)}))


async def end_of(events: Feed[StreamEvent], frames: Feed[FramePublished]) -> None:
    """When the stream is over, no frame comes any more."""
    async for event in events:
        if event.event in (EventKind.STOPPED, EventKind.FAILED):
            frames.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stream")
    parser.add_argument("--api", default="http://127.0.0.1:7860")
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="`rheocast up` prints its own")
    parser.add_argument("--token")
    parser.add_argument("--frames", type=int, default=0, help="take so many, then leave; 0: until the stream ends")
    parser.add_argument("--out", type=Path, default=Path("frames"))
    try:
        asyncio.run(subscribe(parser.parse_args()))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except ClientError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
