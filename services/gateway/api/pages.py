"""The page's files, at ``/``. They are small and change with a release: a browser asks each time whether they did."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

PAGE_DIR = Path(__file__).resolve().parents[1] / "page"


def install_page(app: FastAPI, folder: Path = PAGE_DIR) -> None:
    """Serve the folder: a route for each of its files and no other path, so that what the API lacks stays a 404 of the API."""
    if not (folder / "index.html").is_file():

        @app.get("/", include_in_schema=False)
        async def home() -> RedirectResponse:
            """There is no page in this build: the API's own."""
            return RedirectResponse("/docs")

        return
    files = StaticFiles(directory=folder)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            _serve(app, files, path.name)


def _serve(app: FastAPI, files: StaticFiles, name: str) -> None:
    async def file(request: Request) -> Response:
        answer = await files.get_response(name, request.scope)  # the file, or 304
        answer.headers["cache-control"] = "no-cache"
        return answer

    app.add_route("/" if name == "index.html" else f"/{name}", file, methods=["GET"], include_in_schema=False)
