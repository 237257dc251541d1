"""Write the verdicts of `benchmarks/serving.py` into docs/serving.md, between the marks there."""

from __future__ import annotations

import re
from pathlib import Path

from slicecli.family.serving import all_verdicts, clients

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
TABLE = re.compile(r"(?<=<!-- table: begin -->\n\n).*(?=\n\n<!-- table: end -->)", flags=re.DOTALL)
REASONS = re.compile(r"(?<=<!-- reasons: begin -->\n\n).*(?=\n\n<!-- reasons: end -->)", flags=re.DOTALL)


def page() -> str:
    """Return the page, with what was measured in place of what is in it."""
    verdicts = all_verdicts()
    versions = clients()
    cells = {(one.slice, one.client): one for one in verdicts}
    rows = [
        ["slice", "layout", *(f"{client} ({version})" for client, version in versions.items())],
        ["---"] * (2 + len(versions)),
    ]
    for name, layout in dict.fromkeys(
        (one.slice, one.kind.layout) for one in sorted(verdicts, key=lambda one: one.slice)
    ):
        found = [cells.get((name, client)) for client in versions]
        rows.append([name, layout, *("" if one is None else _cell(one.verdict, one.agreement) for one in found)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    reasons = sorted({(one.client, one.slice, _plain(one.reason)) for one in verdicts if one.verdict == "refused"})
    listed = "\n".join(f"- {client}, {name}: `{reason}`" for client, name, reason in reasons)
    text = TABLE.sub(lambda _: table, PAGE.read_text(encoding="utf-8"))
    return REASONS.sub(lambda _: listed, text)


def _cell(verdict: str, agreement: float | None) -> str:
    return f"**wrong** ({agreement:.1%})" if verdict == "wrong" and agreement is not None else verdict


def _plain(reason: str) -> str:
    return re.sub(r"/\S+/", "", reason.replace("`", "'").replace("|", "/"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
