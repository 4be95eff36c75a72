"""Record some seconds of a running stream to an MP4 file here: an MP4 sink is added, finished and fetched."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from shared.client import Api, ClientError


async def record(options: argparse.Namespace) -> None:
    async with Api(options.api, options.token) as api:
        begun = await api.record(options.stream)
        first = await api.applied(begun)
        try:
            await asyncio.sleep(options.seconds)
        finally:  # also on Ctrl-C: the recording is finished and kept
            ended = await api.stop_recording(options.stream)
        await api.applied(ended)
        size = await api.download(begun.name, options.out)
        print(json.dumps({"file": str(options.out), "bytes": size, "from_chunk": first.chunk, "on_server": begun.name}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stream")
    parser.add_argument("--api", default="http://127.0.0.1:7860")
    parser.add_argument("--token")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("recording.mp4"))
    try:
        asyncio.run(record(parser.parse_args()))
    except ClientError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
