"""Write the JSON schema of the record and the table of its fields in docs/record.md from the models of its fields.

Usage: python tools/write_record_schema.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from slicecli.record.json_schema import record_schema
from slicecli.record.schema import RECORD_VERSION, Record

DOCS = Path(__file__).parent.parent / "docs"
SCHEMA = DOCS / f"record-{RECORD_VERSION}.schema.json"
PAGE = DOCS / "record.md"
TABLE = re.compile(r"(?<=\| field \| \|\n\|---\|---\|\n)(\| `\w+` \|.*\n)+")


def schema_text() -> str:
    """Return the JSON schema as its file has it."""
    return json.dumps(record_schema(), indent=2) + "\n"


def page() -> str:
    """Return docs/record.md with the table of the fields as the models have them."""
    rows = "".join(f"| `{name}` | {field.description} |\n" for name, field in Record.model_fields.items())
    return TABLE.sub(lambda _: rows, PAGE.read_text(encoding="utf-8"), count=1)


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
