"""rheocast drain against a real HTTP server that answers as the gateway does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from services.cli.drain import drain
from services.cli.errors import CommandError, ExitCode
from tests.support.answering import Answering, answering


@pytest.fixture
def gateway() -> Iterator[Answering]:
    with answering() as made:
        yield made


def view(state: str, *streams: str, **stuck: str) -> dict[str, Any]:
    return {"instance": "worker-0", "state": state, "streams": list(streams), "stuck": stuck}


def test_it_waits_until_the_worker_is_empty_and_says_what_holds_it_up(gateway: Answering) -> None:
    gateway.answers = [
        (202, view("draining", "a", "b")),
        (200, view("draining", "a", "b")),
        (200, view("draining", "b", b="full with 16 streams")),
        (200, view("drained")),
    ]
    said: list[str] = []
    slept: list[float] = []
    found = drain(gateway.url, "worker-0", say=said.append, sleep=slept.append)
    assert found["state"] == "drained"
    assert gateway.asked[0] == ("POST", "/v1/workers/worker-0/drain?force=false")
    assert gateway.asked[1:] == [("GET", "/v1/workers/worker-0")] * 3
    assert len(slept) == 3
    assert said[0] == "worker-0: 2 streams are still on it"
    assert len(said) == 2, "what has not changed is not said again"
    assert "full with 16 streams" in said[1]
    assert "--force" in said[1]


def test_force_undo_and_no_waiting(gateway: Answering) -> None:
    gateway.answers = [(202, view("draining", "a")), (200, view("ready")), (202, view("drained"))]
    assert drain(gateway.url, "worker-0", wait=False, say=print)["state"] == "draining"
    assert drain(gateway.url, "worker-0", undo=True, say=print)["state"] == "ready"
    assert drain(gateway.url, "a/b", force=True, say=print)["state"] == "drained"
    assert [method for method, _ in gateway.asked] == ["POST", "DELETE", "POST"]
    assert gateway.asked[2][1] == "/v1/workers/a%2Fb/drain?force=true"


def test_refusals_are_one_line(gateway: Answering) -> None:
    gateway.answers = [(404, {"detail": "there is no worker x"}), (503, {"detail": "the scheduler did not answer"})]
    with pytest.raises(CommandError, match="there is no worker x") as unknown:
        drain(gateway.url, "x", say=print)
    assert unknown.value.code is ExitCode.REFUSED
    with pytest.raises(CommandError, match="did not answer") as silent:
        drain(gateway.url, "x", say=print)
    assert silent.value.code is ExitCode.FAILED
    gateway.server.shutdown()
    gateway.server.server_close()
    with pytest.raises(CommandError, match="is it running"):
        drain(gateway.url, "x", say=print)
    with pytest.raises(CommandError, match=r"give its address, e\.g\."):
        drain("ftp://there", "x", say=print)
