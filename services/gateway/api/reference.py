"""``/docs``: the API's description as a plain page. No script and nothing from elsewhere, so that it works offline."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, .path { font-family: ui-monospace, monospace }
details { border-top: 1px solid color-mix(in srgb, currentColor 20%, transparent) }
summary { padding: .4rem 0; cursor: pointer } .verb { display: inline-block; min-width: 4.5rem; font-weight: 600 }
table { border-collapse: collapse } td { padding: .1rem 1rem .1rem 0; vertical-align: top } h2 { margin-top: 2rem }
"""


def reference_page(schema: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI schema: every operation by tag, with its parameters and answers."""
    by_tag: dict[str, list[str]] = {}
    for path, verbs in schema["paths"].items():
        for verb, operation in verbs.items():
            tag = (operation.get("tags") or ["other"])[0]
            by_tag.setdefault(tag, []).append(_operation(path, verb, operation))
    sections = "".join(f"<h2>{_text(tag)}</h2>{''.join(found)}" for tag, found in by_tag.items())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Rheocast API</title><link rel=stylesheet href='/docs/style.css'><h1>Rheocast API</h1>"
        f"<p>{_text(schema['info'].get('description', ''))} Machine-readable: <a href='/openapi.json'>openapi.json</a>. "
        f"Errors are <code>application/problem+json</code>.</p>{sections}</html>"
    )


def _operation(path: str, verb: str, operation: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{_text(each['name'])}</code><td>{_text(each['in'])}"
        f"<td>{_text(each.get('description') or each.get('schema', {}).get('type', ''))}"
        for each in operation.get("parameters", ())
    )
    body = operation.get("requestBody", {}).get("content", {})
    kinds = ", ".join(f"<code>{_text(kind)}</code>" for kind in body)
    answers = ", ".join(code for code in operation["responses"] if code < "400")
    about = f"<p>{_text(operation.get('description', ''))}</p>"
    return (
        f"<details><summary><span class=verb>{verb.upper()}</span> <span class=path>{_text(path)}</span></summary>{about}"
        f"{f'<table>{rows}</table>' if rows else ''}{f'<p>Body: {kinds}</p>' if kinds else ''}"
        f"<p>Answers: {answers}</p></details>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def install_reference(app: FastAPI) -> None:
    """Serve the page, made once."""
    made: list[str] = []

    @app.get("/docs", include_in_schema=False)
    async def reference() -> HTMLResponse:
        if not made:
            made.append(reference_page(app.openapi()))
        return HTMLResponse(made[0])

    @app.get("/docs/style.css", include_in_schema=False)
    async def style() -> HTMLResponse:
        return HTMLResponse(STYLE, media_type="text/css")
