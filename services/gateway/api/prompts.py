"""``/v1/streams/{id}/prompt`` and ``…/timeline``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends
from fastapi.openapi.models import Example
from pydantic import BaseModel, Field, model_validator

from services.gateway.access import Seen, StreamId, Tenant
from services.gateway.api.streams import receipt
from services.gateway.errors import UnknownPartError
from services.gateway.handlers import Desk
from services.gateway.problems import PROBLEM_RESPONSES
from services.gateway.timeline import Play, Timeline, Timelines, TimelineView
from shared.contracts.commands import MAX_PROMPT_CHARS, MAX_PROMPT_PARTS, PromptPart, StreamPatch
from shared.contracts.views import Receipt, StreamView

EXAMPLES: dict[str, Example] = {
    "text": {"summary": "One prompt", "value": {"text": "a charcoal drawing, soft light", "blend_chunks": 6}},
    "mix": {
        "summary": "A mix of two",
        "value": {
            "prompts": [{"text": "a pencil drawing", "weight": 0.7}, {"text": "neon lights", "weight": 0.3}],
            "blend_chunks": 4,
        },
    },
}
TIMELINE_EXAMPLE: dict[str, Example] = {
    "two": {
        "summary": "Pencil, then neon, again and again",
        "value": {
            "entries": [{"at_s": 0, "prompt": "a pencil drawing"}, {"at_s": 8, "prompt": "neon", "blend_chunks": 6}],
            "loop_s": 16,
        },
    }
}


class PromptBody(BaseModel):
    """One prompt as ``text``, or several as ``prompts`` whose weights' proportions count."""

    text: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS)
    prompts: tuple[PromptPart, ...] = Field(default=(), max_length=MAX_PROMPT_PARTS)
    blend_chunks: int = Field(default=0, ge=0, le=64, description="Over so many chunks the old one fades out.")
    recache: bool = Field(
        default=False, description="Make what is cached anew, so that the old picture does not linger."
    )

    @model_validator(mode="after")
    def _one_way(self) -> PromptBody:
        if (self.text is None) != bool(self.prompts):
            raise ValueError("give text, or prompts with weights: one of them")
        self.patch()
        return self

    def patch(self) -> StreamPatch:
        """The change that it is."""
        return StreamPatch(prompt=self.text, prompts=self.prompts, blend_chunks=self.blend_chunks, recache=self.recache)


def router(desk: Desk, timelines: Timelines, seen: Seen) -> APIRouter:
    """The routes, bound to a desk."""
    api = APIRouter(prefix="/v1/streams/{stream}", tags=["prompts"], responses=PROBLEM_RESPONSES)
    found, changing = Depends(seen), Depends(seen.change)

    @api.post("/prompt", status_code=202, operation_id="setPrompt")
    async def prompt(
        stream: StreamId,
        tenant: Tenant,
        body: Annotated[PromptBody, Body(openapi_examples=EXAMPLES)],
        _: StreamView = changing,
    ) -> Receipt:
        """A new prompt, or a mix of several by weight; an applied event names the first chunk made with it."""
        return receipt(await desk.patch(stream, body.patch(), tenant))

    @api.get("/timeline", operation_id="getTimeline")
    async def get(view: StreamView = found) -> TimelineView:
        """The stream's timeline and how it stands; its ``entries`` and ``loop_s`` are what PUT takes."""
        return await timelines.get(view.id)

    @api.put("/timeline", operation_id="putTimeline")
    async def put(
        body: Annotated[Timeline, Body(openapi_examples=TIMELINE_EXAMPLE)], view: StreamView = changing
    ) -> TimelineView:
        """A timeline, in place of the one before, which stops."""
        return await timelines.put(view.id, body)

    @api.delete("/timeline", status_code=204, operation_id="deleteTimeline")
    async def delete(view: StreamView = changing) -> None:
        """Forget it; it stops."""
        if not await timelines.forget(view.id):
            raise UnknownPartError(f"stream {view.id} has no timeline")

    @api.post("/timeline/play", operation_id="playTimeline")
    async def play(body: Play | None = None, view: StreamView = changing) -> TimelineView:
        """Play it from an entry on. It goes on when the gateway is restarted, and ends with the stream."""
        return await timelines.play(view, 0 if body is None else body.entry)

    @api.post("/timeline/stop", operation_id="stopTimeline")
    async def stop(view: StreamView = changing) -> TimelineView:
        """Play no further; the prompt that is shown stays."""
        return await timelines.stop(view.id)

    return api
