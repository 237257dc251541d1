"""Write docs/families.md from the installed adapters, so that the page cannot differ from the program.

Usage: python tools/write_families_page.py
"""

from __future__ import annotations

from pathlib import Path

from slicecli.adapters import Adapter
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.testing.adapter_tests import tiny_of

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
HEAD = """\
# Model families

What the shipped adapters declare. Any other type is [inferred](auto.md), or declared in a [plugin](plugins.md). This
page is written by `python tools/write_families_page.py`.

**Layout.** *Stock*: a slice by `--method refit` is a checkpoint of the family's own class with a smaller hidden size.
*Custom code*: the class takes other sizes from the hidden size, so a slice [brings code of its own](custom-code.md). A
slice by `--method slicegpt` always does.

**Checked.** All adapters pass the [conformance suite](testing.md) on tiny random models of each type and arrangement:
every parameter accounted for; folded norms, rotations, a refit at full width and the published method at full width
leave the logits unchanged (float64, 1e-9); by both methods, slices are made, counted, loaded whole and without their
head, saved again, run in bfloat16, and generate with and without cache and padding. On trained weights: Llama, and the
same weights rewritten as Phi-3 (fused projections), as OLMo (LayerNorms) and as Mixtral (experts), whose slices are as
good as Llama's or better.
"""


def describe(adapter: Adapter) -> str:
    """Return what is special about a family's block, read off its declaration."""
    dimensions = Dimensions(adapter, tiny_of(adapter, adapter.model_types[0]).to_dict())
    branches = [branch for block in dimensions.declared_blocks for branch in block.branches]
    norm = adapter.norm
    words = ["LayerNorm" if norm.kind == "layer" else "RMSNorm"]
    words += ["1 + weight"] if norm.weight_offset else []
    words += ["no weight"] if not norm.has_weight else []
    words += ["parallel"] if any(block.is_parallel for block in dimensions.declared_blocks) else []
    words += ["experts"] if any(branch.experts for branch in branches) else []
    words += ["multipliers"] if any(branch.multiplier for branch in branches) else []
    words += ["embeddings times root of width"] if adapter.scales_embeddings_by_width else []
    words += ["learned positions"] if len(adapter.embeddings) > 1 else []
    words += ["head sliced with the blocks"] if adapter.keeps_width else []
    words += ["norms on queries"] if any(block.kept for block in dimensions.declared_blocks) else []
    words += ["varies with the config"] if callable(adapter.block) else []
    return ", ".join(words)


def page() -> str:
    """Return the page."""
    rows = ["| adapter | model types | block | layout | dim of a stock slice |", "|---|---|---|---|---|"]
    reasons = []
    for _, adapter in sorted(plugins().adapters.items()):
        layout = adapter.layout({})
        rule = " and ".join(f"a multiple of `{name}`" for name in adapter.dim_divisors) or "any"
        rule = "" if layout == "custom-code" else rule
        types = ", ".join(f"`{name}`" for name in adapter.model_types)
        shown = layout.replace("-", " ")
        if callable(adapter.stock_obstacle):
            shown += " (depends on the config)"
        elif adapter.stock_obstacle:
            reasons.append(f"- {adapter.name}: {adapter.stock_obstacle}")
        rows.append(f"| {adapter.name} | {types} | {describe(adapter)} | {shown} | {rule} |")
    refused = [
        f"- {', '.join(f'`{name}`' for name in refusal.model_types)}: {refusal.reason}"
        for refusal in plugins().refusals
    ]
    return "\n".join(
        [
            HEAD,
            *rows,
            "\n## Why custom code\n",
            *reasons,
            "\nPhi-3 with LongRoPE and Phi with norms on queries need it too; the message says why.",
            "\n## Refused by name\n",
            *refused,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
