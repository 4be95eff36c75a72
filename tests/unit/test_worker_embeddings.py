"""Prompts from the worker that encodes them to the stages, over the session store: exact, in little room."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from services.worker.assignments import Assignments
from services.worker.embeddings import from_store, to_store
from services.worker.roles.text import TextRole
from shared.bus.port import Received
from shared.clock import VirtualClock
from shared.contracts import subjects
from shared.contracts.commands import PreparePrompt, PromptPart, TextEncode
from shared.session.memory import MemoryStore
from shared.session.port import EMBEDDING_TTL_S

TEXT_LEN, TEXT_DIM = 512, 64


def embedding_of(words: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Padded with zeros, of values that ``dtype`` can hold."""
    whole = torch.zeros(TEXT_LEN, TEXT_DIM)
    whole[:words] = torch.randn(words, TEXT_DIM, generator=torch.Generator().manual_seed(words)).to(dtype).float()
    return whole


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 1.0 + 2**-20, 1e-42, float("inf"), float("nan")])
@pytest.mark.parametrize("words", [0, 1, 40, TEXT_LEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_encoded(words: int, dtype: torch.dtype, value: float) -> None:
    embedding = embedding_of(words, dtype)
    embedding[0, 0] = embedding[-1, -1] = value
    kept = to_store(embedding)
    assert kept[1] == (TEXT_LEN, TEXT_DIM)
    assert same_bits(from_store(*kept), embedding)


def test_a_value_between_two_bfloat16_stays() -> None:
    embedding = torch.tensor([[0x7F800001, 0x3F800001]], dtype=torch.int32).view(torch.float32)
    assert to_store(embedding)[0] == "float32"
    assert same_bits(from_store(*to_store(embedding)), embedding)


def test_what_an_encoder_in_bfloat16_makes_takes_half_the_room() -> None:
    assert len(to_store(embedding_of(40, torch.bfloat16))[2]) == TEXT_LEN * TEXT_DIM * 2
    assert len(to_store(embedding_of(40))[2]) == TEXT_LEN * TEXT_DIM * 4


class Bench:
    """A worker's assignments; in its text encoder's, its stage's, its device's and its bus' place is this."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.store = MemoryStore(self.clock)
        self.encoded: list[str] = []
        self.prepared: list[Tensor] = []
        self.answers: list[Any] = []
        runtime = SimpleNamespace(
            settings=SimpleNamespace(model="m", pipeline="p0"),
            text=TextRole(self, beside=True),
            stage=self,
            place=SimpleNamespace(pipeline="p0", stage=0),
        )
        context = SimpleNamespace(bus=self, store=self.store, instance="w0")
        self.worker = Assignments(
            cast("Any", context), cast("Any", runtime), cast("Any", self), cast("Any", None), cast("Any", None)
        )
        self.worker.streams["s"] = cast("Any", SimpleNamespace(take=SimpleNamespace(epoch=1)))

    def encode(self, prompt: str) -> Tensor:
        self.encoded.append(prompt)
        return embedding_of(len(prompt), torch.bfloat16)

    def set_prompt(self, stream: str, version: int, embedding: Tensor, oldest: int) -> None:
        self.prepared.append(embedding)

    async def call(self, rank: object, run: Callable[[], Any]) -> Any:
        return run()

    async def publish(self, subject: str, message: Any) -> None:
        self.answers.append(message)

    async def text(self, prompt: str, *parts: PromptPart) -> str:
        """Have it encoded, as the scheduler does before a prompt is prepared; its digest."""
        message = TextEncode(model="m", prompt=prompt, parts=parts)
        answer = await self.worker.on_text(Received(subjects.TEXT_ENCODE, message, 0, {}))
        assert answer.error is None
        return answer.digest

    async def prepare(self, digest: str) -> str | None:
        """Have the stage prepare it; its complaint."""
        message = PreparePrompt(instance="w0", stream="s", epoch=1, version=1, digest=digest)
        await self.worker.on_assign(Received(subjects.assign("worker"), message, 0, {}))
        return self.answers.pop().error

    def kept_bytes(self, digest: str) -> int:
        return len(self.store._embeddings[digest][-1])


async def test_a_prompt_is_encoded_once_and_only_its_own_rows_are_kept() -> None:
    bench = Bench()
    digest = await bench.text("a neon cat")
    assert await bench.text("a neon cat") == digest
    assert bench.encoded == ["a neon cat"]
    assert bench.kept_bytes(digest) <= 10 * TEXT_DIM * 2
    assert await bench.prepare(digest) is None
    assert same_bits(bench.prepared[0], embedding_of(10, torch.bfloat16))


async def test_a_mix_is_kept_exactly_with_the_rows_of_its_longest_prompt() -> None:
    bench = Bench()
    parts = (PromptPart(text="ink", weight=0.7), PromptPart(text="a neon cat", weight=0.3))
    digest = await bench.text("", *parts)
    assert bench.kept_bytes(digest) <= 10 * TEXT_DIM * 4
    assert await bench.prepare(digest) is None
    assert same_bits(bench.prepared[0], TextRole(bench).mix([(part.text, part.weight) for part in parts]))


async def test_a_prompt_that_was_forgotten_comes_again() -> None:
    """A recovery long after the start: the prompt is encoded anew, and is what it was."""
    bench = Bench()
    digest = await bench.text("ink")
    assert await bench.prepare(digest) is None
    bench.clock.jump(EMBEDDING_TTL_S + 1)
    assert await bench.prepare(digest) == "the prompt's embedding is no longer in the session store"
    assert await bench.text("ink") == digest
    assert bench.encoded == ["ink", "ink"]
    assert await bench.prepare(digest) is None
    assert same_bits(*bench.prepared)


async def test_what_is_no_embedding_is_told() -> None:
    bench = Bench()
    await bench.store.put_embedding("odd", "float64", (1,), bytes(8))
    assert "KeyError" in (await bench.prepare("odd") or "")
    assert bench.prepared == []
