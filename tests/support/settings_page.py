"""Writes docs/settings.md: every variable of every service, from the settings' own source.

``python -m tests.support.settings_page docs/settings.md``
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shared.config import ServiceSettings
from tests.support.compose import NAMES, settings_of

HEAD = """# Settings

Every service reads its settings from the environment, and from nowhere else. Generated from the `settings.py` of the services
by `python -m tests.support.settings_page docs/settings.md`; a test fails when it is out of date.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, _section("Every service", [ServiceSettings], ServiceSettings)]
    for name in NAMES:
        settings = settings_of(name)
        parts.append(_section(name, _classes(settings), settings))
    return "\n".join(parts)


def _classes(settings: type[BaseModel]) -> list[type[BaseModel]]:
    """A settings class and its bases that add fields, but for those of every service."""
    known = set(inspect.getmro(ServiceSettings))
    return [each for each in inspect.getmro(settings) if each not in known and issubclass(each, BaseModel)]


def _section(title: str, classes: list[type[BaseModel]], settings: type[BaseModel]) -> str:
    told = [" ".join(inspect.cleandoc(each.__doc__ or "").replace("``", "`").split()) for each in classes]
    rows = [
        f"| `RHEOCAST_{name.upper()}` | {_default(settings.model_fields[name])} | {note} |"
        for each in classes
        for name, note in _fields(each)
    ]
    text = "\n".join(textwrap.fill(each, 128, break_long_words=False, break_on_hyphens=False) for each in told)
    return "\n".join([f"## {title}", "", text, "", "| variable | default | |", "| --- | --- | --- |", *rows, ""])


def _fields(settings: type[BaseModel]) -> list[tuple[str, str]]:
    """The fields that a class itself adds, each with the comment on its line."""
    source = textwrap.dedent(inspect.getsource(settings))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found: list[tuple[str, str]] = []
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            assert name in settings.model_fields, name
            comment = re.search(r"#\s*((?!\s*noqa).*)$", lines[(node.end_lineno or 1) - 1])
            found.append((name, comment.group(1) if comment else ""))
    return found


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump_json()
    elif isinstance(value, Enum):
        value = value.value
    elif isinstance(value, tuple):
        value = ",".join(str(getattr(part, "value", part)) for part in value)
    elif isinstance(value, bool | dict):
        value = json.dumps(value)
    return "" if value in (None, "") else f"`{value}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
