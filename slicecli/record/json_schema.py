"""The JSON schema of records, generated from the models of their fields.

`tools/write_record_schema.py` writes it to `docs/record-1.schema.json`.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from slicecli.record.schema import RECORD_VERSION, RECORDS, Record

__all__ = ["record_schema"]


class _Schema(GenerateJsonSchema):
    """JSON schema that is as strict as the models."""

    def dict_schema(self, schema: Any) -> dict[str, Any]:
        """Refuse names that do not fit, which pydantic's own schema leaves open."""
        found = super().dict_schema(schema)
        return {**found, "additionalProperties": False} if "patternProperties" in found else found

    def default_schema(self, schema: Any) -> dict[str, Any]:
        """Leave out defaults: a field without a value is not in the record."""
        return self.generate_inner(schema["schema"])


def record_schema() -> dict[str, Any]:
    """Return the JSON schema of records."""
    return {
        "$schema": _Schema.schema_dialect,
        "$id": f"urn:slicecli:record:{RECORD_VERSION}",
        "title": "Record of a slice",
        "description": " ".join((Record.__doc__ or "").split()),
        **RECORDS.json_schema(schema_generator=_Schema),
    }
