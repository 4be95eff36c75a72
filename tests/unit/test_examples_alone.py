"""What examples ask of the API, without a system that runs."""

from __future__ import annotations

import argparse
import asyncio
import runpy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.client import Api, Feed, NotNowError
from shared.contracts.commands import StreamSpec
from shared.contracts.sinks import Sink
from shared.contracts.views import Problem, Receipt, ReceiptView, StreamView

EXAMPLES = Path(__file__).parents[2] / "examples"


class Noting(Api):
    """An API that lets no stream in and keeps what it is asked for."""

    def __init__(self, url: str = "", token: str | None = None) -> None:
        super().__init__()
        self.specs: list[StreamSpec] = []
        self.sinks: list[str] = []
        self.removed: list[str] = []

    async def start(self, spec: StreamSpec, stream: str | None = None, *, key: str | None = None) -> StreamView:
        self.specs.append(spec)
        raise NotNowError(Problem(title="Full", status=503, detail="no room"))

    async def add_sink(self, stream: str, sink: Sink) -> Receipt:
        self.sinks.append(sink.id)
        return Receipt(stream=stream, command="c", version=1)

    async def applied(self, receipt: Any, timeout_s: float = 30.0) -> ReceiptView:
        return ReceiptView(stream=receipt.stream, command=receipt.command, version=1, state="applied")

    async def remove_sink(self, stream: str, sink: str) -> Receipt:
        await asyncio.sleep(0)
        self.removed.append(sink)
        return Receipt(stream=stream, command="d", version=1)


class Quiet:
    """A broker on which nothing comes."""

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str) -> AsyncIterator[Quiet]:
        yield cls()

    @asynccontextmanager
    async def frames(self, stream: str) -> AsyncIterator[Feed[Any]]:
        yield Feed(1)

    events = frames


def example(name: str, function: str, api: Api) -> Any:
    """One of an example's functions, which finds this API and a quiet broker wherever they are."""
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))[function]
    found.__globals__.update(Api=lambda *_: api, Broker=Quiet)
    return found


@pytest.mark.parametrize("model", ["rheo-tiny", "wan2.1-1.3b"])
async def test_a_load_is_of_the_model_that_was_asked_for(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Noting()
    monkeypatch.setattr("asyncio.run", lambda work: asyncio.ensure_future(work))
    monkeypatch.setattr("sys.argv", ["load_generator.py", "--streams", "2", "--every", "0", "--model", model])
    main = example("load_generator", "main", api)
    main()
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
    assert [spec.model for spec in api.specs] == [model, model]


async def test_a_subscriber_that_is_interrupted_takes_its_own_sink_away(tmp_path: Path) -> None:
    api = Noting()
    options = argparse.Namespace(stream="s", api="", token=None, nats="", frames=0, out=tmp_path)
    watching = [asyncio.create_task(example("subscriber", "subscribe", api)(options)) for _ in range(2)]
    async with asyncio.timeout(5):
        while len(api.sinks) < 2:
            await asyncio.sleep(0.01)
    assert len(set(api.sinks)) == 2
    for number, each in enumerate(watching, 1):
        each.cancel()
        with pytest.raises(asyncio.CancelledError):
            await each
        assert api.removed == api.sinks[:number]
