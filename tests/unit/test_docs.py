"""What the pages say can be followed: links lead somewhere, commands print what stands there, snippets are code of ours."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from services.cli.commands import cli as cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in headings(linked), target


def plans() -> list[tuple[str, list[str]]]:
    """The commands of the page about sizing, each with the lines it shows."""
    blocks = re.findall(r"```\n\$ (rheocast plan .*?)\n(.*?)```", (ROOT / "docs/sizing.md").read_text(), re.DOTALL)
    return [(command, lines.splitlines()) for command, lines in blocks]


@pytest.mark.parametrize(("command", "lines"), plans(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_plan_still_says_what_the_page_shows(command: str, lines: list[str]) -> None:
    printed = CliRunner().invoke(cli, shlex.split(command)[1:])
    assert printed.exit_code == 0, printed.output
    assert lines
    assert [line for line in lines if line not in printed.output.splitlines()] == []


def test_the_clients_snippet_uses_what_there_is() -> None:
    text = (ROOT / "docs/integration.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippets
    for snippet in snippets:
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []
