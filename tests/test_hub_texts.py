"""Texts by name and by dataset id, with the real `datasets` against a Hub on this machine."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import pytest
from loopback import loopback_hub

CODE = """
import json, sys
from slicecli.errors import TextError
from slicecli.text import read_text
for name, part in json.loads(sys.argv[1]):
    try:
        text = read_text(name, part)
        print(json.dumps([text.name, list(text.documents)]))
    except TextError as error:
        print(json.dumps(str(error)))
"""


def parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def packed(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode()))


@pytest.fixture
def read(tmp_path):
    """Read several texts in one process of its own."""
    root = tmp_path / "hub"
    for split in ("train", "test"):
        parquet(root / "wikitext" / "wikitext-2-raw-v1" / f"{split}-0.parquet", text=[" = A = \n", "", f"{split}\n"])
        parquet(root / "ptb" / "penn_treebank" / split / "0000.parquet", sentence=[f"{split} one", f"{split} two"])
    parquet(root / "alpaca" / "data" / "train-0.parquet", instruction=["i"] * 10, text=[f"{n}" for n in range(10)])
    packed(root / "c4" / "en" / "c4-train.00000-of-01024.json.gz", "a", "b")
    packed(root / "c4" / "en" / "c4-validation.00000-of-00008.json.gz", "c")
    parquet(root / "mine" / "train-0.parquet", words=["w", "v"], number=[1, 2])
    parquet(root / "several" / "train-0.parquet", one=["w"], two=["v"])
    (root / "wikitext" / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: test\n"
        "    path: wikitext-2-raw-v1/test-*\n  - split: train\n    path: wikitext-2-raw-v1/train-*\n---\n"
    )
    served = {
        "Salesforce/wikitext": root / "wikitext",
        "ptb-text-only/ptb_text_only": root / "ptb",
        "tatsu-lab/alpaca": root / "alpaca",
        "allenai/c4": root / "c4",
        "me/mine": root / "mine",
        "me/several": root / "several",
    }

    def call(*wishes):
        with loopback_hub(served, gated=("me/gated",)) as server:
            environment = {
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path / "cache"),
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
            }
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
