"""The published schemas, against which the tests hold every JSON that the library writes."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"


def schema(name: str) -> dict[str, Any]:
    """The schema that "clockwork_hooks/flops/1" names."""
    start, kind, version = name.split("/")
    assert start == "clockwork_hooks"
    data: dict[str, Any] = json.loads((FOLDER / f"{kind}-{version}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(data)
    assert data["$id"] == name
    return data


def follows_its_schema(data: dict[str, Any]) -> None:
    """It does; without any one of its parts, or with another one, it would not."""
    checker = jsonschema.Draft202012Validator(schema(data["schema"]))
    checker.validate(data)
    for name in data:
        with pytest.raises(jsonschema.ValidationError):
            checker.validate({key: value for key, value in data.items() if key != name})
        with pytest.raises(jsonschema.ValidationError):
            checker.validate({**data, name: object()})
    with pytest.raises(jsonschema.ValidationError):
        checker.validate({**data, "another": 1})
