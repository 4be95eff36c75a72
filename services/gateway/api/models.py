"""``/v1/models``: what can be streamed with, and the styles that a model has learnt."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Path as InPath
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field, ValidationError

from services.gateway.access import Viewer
from services.gateway.errors import NoAnswerError, RefusedError, UnknownPartError
from services.gateway.handlers import Desk
from services.gateway.problems import responses
from services.gateway.settings import Settings
from shared.contracts.operating import FleetAsked
from shared.engine.plan.registry import known_models, model_folder, model_spec
from shared.engine.plan.spec import SpecError, UnknownModelError

STYLES_FILE = "styles.json"
PICTURES = "styles"
MAX_STYLES = 256
STYLE_PATTERN = r"^[a-z0-9][a-z0-9-]{0,63}$"
WEBP: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture.",
        "content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}},
    }
}

ModelName = Annotated[str, InPath(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", examples=["rheo-tiny"])]


class ModelView(BaseModel):
    """A model. ``served``: a pipeline of it runs now; null when the scheduler did not say."""

    name: str
    served: bool | None
    layers: int
    steps: int = Field(description="The most denoising steps.")
    noise: float = Field(description="The noise scale when none is asked for.")
    styles: int = Field(description="How many styles it names; 0: it takes any prompt.")


class ModelList(BaseModel):
    """By name."""

    models: list[ModelView]


class StyleView(BaseModel):
    """A style: its prompts are examples, the first is the plainest. ``thumbnail`` is a path of this API, or null."""

    name: str
    id: str
    prompt: str
    prompts: list[str]
    thumbnail: str | None = None


class StyleList(BaseModel):
    """In the order in which they are to be shown."""

    model: str
    styles: list[StyleView]


def router(desk: Desk, settings: Settings) -> APIRouter:
    """The routes, bound to a desk."""
    api = APIRouter(prefix="/v1/models", tags=["models"], responses=responses(404))

    async def view_of(name: str, served: frozenset[str] | None) -> ModelView:
        spec = await asyncio.to_thread(model_spec, name, settings.models_dir)
        styles = await asyncio.to_thread(read_styles, name, settings.models_dir)
        return ModelView(
            name=name,
            served=None if served is None else name in served,
            layers=spec.layers,
            steps=len(spec.steps),
            noise=spec.noise.s0,
            styles=len(styles),
        )

    async def served_now() -> frozenset[str] | None:
        try:
            told = await asyncio.wait_for(desk.fleet(FleetAsked()), settings.capacity_timeout_s)
        except (NoAnswerError, RefusedError, TimeoutError):
            return None
        return frozenset(pipeline.model for pipeline in told.pipelines)

    @api.get("", operation_id="listModels")
    async def list_models(_: Viewer) -> ModelList:
        """The models that are known here."""
        served = await served_now()
        names = await asyncio.to_thread(known_models, settings.models_dir)
        found: list[ModelView] = []
        for name in names:
            try:
                found.append(await view_of(name, served))
            except (SpecError, UnknownModelError):
                continue  # a folder that is no model (any more)
        return ModelList(models=found)

    @api.get("/{model}", operation_id="getModel")
    async def get(model: ModelName, _: Viewer) -> ModelView:
        """One model."""
        try:
            return await view_of(model, await served_now())
        except (SpecError, UnknownModelError) as error:
            raise UnknownPartError(str(error)) from None

    @api.get("/{model}/styles", operation_id="listStyles")
    async def styles(model: ModelName, _: Viewer) -> StyleList:
        """The styles that the model has learnt by name; none for a model that takes any prompt."""
        try:
            return StyleList(model=model, styles=await asyncio.to_thread(read_styles, model, settings.models_dir))
        except UnknownModelError as error:
            raise UnknownPartError(str(error)) from None

    @api.get("/{model}/styles/{style}.webp", operation_id="getStylePicture", response_class=Response, responses=WEBP)
    async def picture(
        model: ModelName, style: Annotated[str, InPath(pattern=STYLE_PATTERN, examples=["pencil"])], _: Viewer
    ) -> FileResponse:
        """A small picture in the style."""
        try:
            path = model_folder(model, settings.models_dir) / PICTURES / f"{style}.webp"
        except UnknownModelError as error:
            raise UnknownPartError(str(error)) from None
        if not await asyncio.to_thread(path.is_file):
            raise UnknownPartError(f"{model} has no picture of {style}")
        return FileResponse(path, media_type="image/webp", headers={"cache-control": "private, max-age=3600"})

    return api


class _Style(BaseModel):
    name: str = Field(min_length=1, max_length=64)
    prompts: list[str] = Field(min_length=1, max_length=64)


class _File(BaseModel):
    styles: list[_Style] = Field(max_length=MAX_STYLES)


def read_styles(model: str, models_dir: Path | None) -> list[StyleView]:
    """The styles in the model's folder; none when it has no such file, or one that cannot be read. Raises UnknownModelError."""
    folder = model_folder(model, models_dir)
    if model not in known_models(models_dir):
        raise UnknownModelError(f"there is no model {model!r} here; known: {', '.join(known_models(models_dir))}")
    path = folder / STYLES_FILE
    try:
        held = _File.model_validate(json.loads(path.read_text("utf-8"))) if path.is_file() else _File(styles=[])
    except (OSError, ValueError, ValidationError):
        return []
    found: list[StyleView] = []
    for style in held.styles:
        name = re.sub(r"[^a-z0-9]+", "-", style.name.lower()).strip("-")
        shown = (folder / PICTURES / f"{name}.webp").is_file()
        path_of = f"/v1/models/{model}/styles/{name}.webp" if shown else None
        found.append(
            StyleView(name=style.name, id=name, prompt=style.prompts[0], prompts=style.prompts, thumbnail=path_of)
        )
    return found
