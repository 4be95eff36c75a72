"""Push frames into a stream over NATS: a video file, or pictures drawn here. Prints the stream's id first.

What an outage of NATS keeps from being sent is left out (``unsent`` at the end); of more than 10 s it ends the stream.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from shared.client import Api, Broker, ClientError
from shared.contracts.commands import StreamSpec
from shared.contracts.sources import PushSource
from shared.media.jpeg import JpegEncoder


def drawn(width: int, height: int) -> Iterator[np.ndarray]:
    """Endless uint8 [height, width, 3]: a bright disc that goes round over a gradient."""
    y, x = np.mgrid[0:height, 0:width]
    ground = np.stack([x * 200 // width, y * 200 // height, np.full_like(x, 120)], axis=-1).astype(np.uint8)
    for index in itertools.count():
        angle = index * 0.15
        middle_x, middle_y = width * (0.5 + 0.3 * np.cos(angle)), height * (0.5 + 0.3 * np.sin(angle))
        picture = ground.copy()
        picture[(x - middle_x) ** 2 + (y - middle_y) ** 2 < (height / 5) ** 2] = (250, 220, 60)
        yield picture


def played(path: Path) -> Iterator[np.ndarray]:
    """A file's pictures, begun again at its end."""
    while True:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")


async def publish(options: argparse.Namespace) -> None:
    width, height = options.size
    spec = StreamSpec(
        source=PushSource(idle_s=10),
        prompt=options.prompt,
        width=width,
        height=height,
        fps=options.fps,
        steps=1,
        deadline_ms=options.deadline_ms,
    )
    pictures = played(options.file) if options.file else drawn(width, height)
    encoder = JpegEncoder(quality=90)
    async with Api(options.api, options.token) as api, Broker.connect(options.nats) as broker:
        stream = (await api.start(spec, options.stream)).id
        print(stream, flush=True)
        begun = time.monotonic()
        for number in range(int(options.seconds * options.fps)):
            jpeg = await asyncio.to_thread(lambda: encoder.encode(next(pictures)))
            await broker.push(stream, jpeg)
            await asyncio.sleep(max(0.0, begun + (number + 1) / options.fps - time.monotonic()))
        await broker.end(stream)
        view = await api.ended(stream)
        ledger = view.ledger.model_dump(mode="json")
        print(json.dumps({"stream": stream, "state": view.state, "unsent": broker.dropped, "ledger": ledger}))


def size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--api", default="http://127.0.0.1:7860")
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="`rheocast up` prints its own")
    parser.add_argument("--token")
    parser.add_argument("--stream", help="the id it shall have")
    parser.add_argument("--prompt", default="a pencil drawing")
    parser.add_argument("--file", type=Path, help="a video; without it pictures are drawn")
    parser.add_argument("--size", type=size, default=(320, 192), metavar="WxH", help="multiples of 16")
    parser.add_argument("--fps", type=float, default=12)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--deadline-ms", type=int, default=1000, help="from a frame's capture to when it is shown")
    try:
        asyncio.run(publish(parser.parse_args()))
    except ClientError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
