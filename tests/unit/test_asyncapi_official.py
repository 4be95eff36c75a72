"""``docs/asyncapi.yaml`` is what the official AsyncAPI 3.0 schema calls a document, and the schema would notice if not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from shared.contracts.asyncapi import DOCUMENT

SPECS = Path(__file__).resolve().parents[2] / ".tools" / "node_modules" / "@asyncapi" / "specs" / "schemas"


@pytest.fixture(scope="module")
def official() -> jsonschema_rs.Draft7Validator:
    path = SPECS / "3.0.0.json"
    if not path.exists():
        pytest.skip("the AsyncAPI schemas are not here: run `make tools` (needs npm)")
    return jsonschema_rs.Draft7Validator(json.loads(path.read_text(encoding="utf-8")))


def test_the_document_is_valid(official: jsonschema_rs.Draft7Validator) -> None:
    document = yaml.safe_load(DOCUMENT.read_text(encoding="utf-8"))
    assert [f"{error.instance_path}: {error.message}" for error in official.iter_errors(document)] == []


def _drop_info(document: dict[str, Any]) -> None:
    del document["info"]


def _odd_action(document: dict[str, Any]) -> None:
    next(iter(document["operations"].values()))["action"] = "shout"


def _unknown_field(document: dict[str, Any]) -> None:
    next(iter(document["channels"].values()))["subject"] = "rheo.x"


def _odd_schema(document: dict[str, Any]) -> None:
    next(iter(document["components"]["schemas"].values()))["type"] = "nothing"


@pytest.mark.parametrize("spoil", [_drop_info, _odd_action, _unknown_field, _odd_schema])
def test_the_schema_notices(official: jsonschema_rs.Draft7Validator, spoil: Callable[[dict[str, Any]], None]) -> None:
    document = yaml.safe_load(DOCUMENT.read_text(encoding="utf-8"))
    spoil(document)
    assert not official.is_valid(document)
