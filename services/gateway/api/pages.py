"""The page's files, at ``/``. They are small and change with a release: a browser asks each time whether they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

PAGE_DIR = Path(__file__).resolve().parents[1] / "page"


class Fresh(StaticFiles):
    """Static files that are not used again without asking."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """One file, or 304."""
        answer = super().file_response(*args, **kwargs)
        answer.headers["cache-control"] = "no-cache"
        return answer


def install_page(app: FastAPI, folder: Path = PAGE_DIR) -> None:
    """Serve the folder; to be called last, because it answers for every path that nothing else does."""
    if not (folder / "index.html").is_file():

        @app.get("/", include_in_schema=False)
        async def home() -> RedirectResponse:
            """There is no page in this build: the API's own."""
            return RedirectResponse("/docs")

        return
    app.mount("/", Fresh(directory=folder, html=True), name="page")
