"""Texts by name and by dataset id, with the real `datasets` against a Hub on this machine."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys

import pytest

CODE = """
import json, sys
from slicecli.errors import TextError
from slicecli.data.text import read_text
for name, part in json.loads(sys.argv[1]):
    try:
        text = read_text(name, part)
        print(json.dumps([text.name, list(text.documents)]))
    except TextError as error:
        print(json.dumps(str(error)))
"""


def parquet(**columns):
    import pyarrow
    import pyarrow.parquet

    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), written)
    return written.getvalue()


def packed(*texts):
    return gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode())


@pytest.fixture
def read(loopback_hub, isolated_hub_cache):
    """Read several texts in one process of its own, which has no token."""
    wikitext = {
        "README.md": (
            b"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: test\n"
            b"    path: wikitext-2-raw-v1/test-*\n  - split: train\n    path: wikitext-2-raw-v1/train-*\n---\n"
        )
    }
    ptb = {}
    for split in ("train", "test"):
        wikitext[f"wikitext-2-raw-v1/{split}-0.parquet"] = parquet(text=[" = A = \n", "", f"{split}\n"])
        ptb[f"penn_treebank/{split}/0000.parquet"] = parquet(sentence=[f"{split} one", f"{split} two"])
    c4 = {
        "en/c4-train.00000-of-01024.json.gz": packed("a", "b"),
        "en/c4-validation.00000-of-00008.json.gz": packed("c"),
    }
    alpaca = {"data/train-0.parquet": parquet(instruction=["i"] * 10, text=[f"{number}" for number in range(10)])}
    for name, files in (
        ("Salesforce/wikitext", wikitext),
        ("tatsu-lab/alpaca", alpaca),
        ("allenai/c4", c4),
        ("me/mine", {"train-0.parquet": parquet(words=["w", "v"], number=[1, 2])}),
        ("me/several", {"train-0.parquet": parquet(one=["w"], two=["v"])}),
        ("me/gated", {"train-0.parquet": parquet(text=["w"])}),
    ):
        loopback_hub.upload(name, files, kind="dataset")
    loopback_hub.upload("ptb-text-only/ptb_text_only", ptb, kind="dataset", revision="refs/convert/parquet")
    loopback_hub.repository("me/gated", kind="dataset").gated = True

    def call(*wishes):
        environment = loopback_hub.environment(isolated_hub_cache, token=None)
        command = [sys.executable, "-c", CODE, json.dumps(wishes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


def test_named_texts_come_from_their_datasets(read):
    found = read(
        ("wikitext2", "calibration"),
        ("wikitext2", "evaluation"),
        ("c4", "calibration"),
        ("c4", "evaluation"),
        ("alpaca", "calibration"),
        ("alpaca", "evaluation"),
        ("ptb", "calibration"),
    )
    assert found == [
        # lines of one text, joined by blank lines, as the field does
        ["wikitext2", [" = A = \n\n\n\n\ntrain\n"]],
        ["wikitext2", [" = A = \n\n\n\n\ntest\n"]],
        ["c4", ["a", "b"]],
        ["c4", ["c"]],
        ["alpaca", [str(number) for number in range(9)]],
        ["alpaca", ["9"]],
        ["ptb", ["train one\n\ntrain two"]],
    ]


def test_any_dataset_is_read_by_its_only_column_of_text(read):
    mine, missing, gated, several, split = read(
        ("me/mine", "calibration"),
        ("me/nothing", "calibration"),
        ("me/gated", "calibration"),
        ("me/several", "calibration"),
        ("me/mine", "evaluation"),
    )
    assert mine == ["me/mine", ["w", "v"]]
    assert "'me/nothing' cannot be loaded" in missing
    assert "'me/gated' cannot be loaded" in gated
    assert "no column `text`; its columns are one, two" in several
    assert "no split test or validation" in split
