"""Write docs/serving.md from the verdicts of `benchmarks/serving.py`."""

from __future__ import annotations

import re
from pathlib import Path

from slicecli.family.serving import all_verdicts, clients

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BEGINNING = """# Where slices run

Slices of tiny random models of each type (hidden size 256 to 192, heads of 32) in the programs that people serve models
with, compared with transformers 5 after each of 200 tokens. *Correct* means that every most probable next token is the
same and its log probability differs by less than 0.01; *wrong*, that the program runs and they differ, with the share
of next tokens that agree; *refused*, that it stops with an error. A cell is empty where it was not tried. "Published"
slices are those of `--method slicegpt`, "tied" ones share their head with the embeddings. `benchmarks/serving.py` runs
the comparison, and `tools/write_serving_page.py` writes this page.

"""


def page() -> str:
    """Return the page."""
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
    return f"{BEGINNING}{table}\n\n## Why slices are refused\n\n{listed}\n"


def _cell(verdict: str, agreement: float | None) -> str:
    return f"**wrong** ({agreement:.0%})" if verdict == "wrong" and agreement is not None else verdict


def _plain(reason: str) -> str:
    return re.sub(r"/\S+/", "", reason.replace("`", "'").replace("|", "/"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
