"""Every setting is documented in one place, which is up to date."""

from __future__ import annotations

import re

import pytest

from shared.config import ServiceSettings
from tests.support.compose import NAMES, ROOT, variables_of
from tests.support.settings_page import page

PAGE = ROOT / "docs/settings.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.support.settings_page docs/settings.md"


@pytest.mark.parametrize("service", NAMES)
def test_every_variable_of_a_service_is_on_it(service: str) -> None:
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    told = set(re.findall(r"^\| `(RHEOCAST_[A-Z0-9_]+)`", sections[service] + sections["Every service"], re.MULTILINE))
    assert told == variables_of(service)


def test_documents_name_no_variable_that_nobody_reads() -> None:
    known = {name for service in NAMES for name in variables_of(service)}
    known |= {f"RHEOCAST_{name.upper()}" for name in ServiceSettings.model_fields}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"\bRHEOCAST_[A-Z0-9_]+[A-Z0-9]\b", path.read_text()))
        assert named <= known, f"{path.name}: {named - known}"
