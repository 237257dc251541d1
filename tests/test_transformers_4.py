"""Slices in transformers 4 give the logits that they give in transformers 5.

It runs where the environment variable SLICECLI_TRANSFORMERS_4 names the Python of an environment with transformers 4
and torch; `tox -e transformers4` makes one.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch
import transformers
from programs import call_command
from test_families import CASES
from test_legacy_fields import ROTATIONS

from slicecli.proof.declaration import logits, relative_error
from slicecli.proof.tiny import random_model, tiny_config
from slicecli.testing.checkpoints import nonsense_text, save_checkpoint

PYTHON = os.environ.get("SLICECLI_TRANSFORMERS_4")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SLICECLI_TRANSFORMERS_4 names no Python with transformers 4"),
]
IDS = torch.randint(2, 250, (2, 50), generator=torch.Generator().manual_seed(0))
# what transformers 4 cannot run, and says so: types it does not have, heads of Qwen2-MoE that are narrower than
# hidden_size / heads, experts in modules of their own, a stream of GPT-J that ends wider than it began
REFUSED = {
    r"exaone|internlm3": "does not recognize|Unrecognized model identifier",
    r"qwen2_moe": "must be divisible by num_heads",
    r"(mixtral|qwen3_moe).*, slicegpt": "from other modules than the version this slice was made with",
    r"gptj, slicegpt": "is invalid for input of size",
}
# of each folder its logits, or the error
VERSION_4 = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
transformers.logging.set_verbosity_error()
ids, folders = torch.load(sys.argv[1])
found = {}
for folder in folders:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            found[folder] = model(ids, use_cache=False).logits
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
torch.save(found, sys.argv[2])
"""


def with_other_theta(config):
    """Return a config whose positions rotate by another base than its class's default."""
    fields = config.to_dict()
    if "rope_theta" in (fields.get("rope_parameters") or {}):
        fields["rope_parameters"] = {**fields["rope_parameters"], "rope_theta": 777.0}
    return type(config).from_dict(fields)


def arrangements():
    """Return a config and a method for each slice, by name."""
    found = {}
    for name, (_, config) in CASES.items():
        for method in ("refit", "slicegpt"):
            found[f"{name}, {method}"] = (with_other_theta(config), method)
    for kind, rotation in ROTATIONS.items():
        for method in ("refit", "slicegpt"):
            config = tiny_config("llama", rope_parameters={**rotation, "rope_theta": 777.0})
            found[f"llama with {kind} rotation, {method}"] = (config, method)
    return found


ARRANGEMENTS = arrangements()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Slices and their logits in transformers 4, by name."""
    parent = tmp_path_factory.mktemp("slices")
    text = nonsense_text(parent / "nonsense.jsonl")
    folders = {}
    for index, (name, (config, method)) in enumerate(ARRANGEMENTS.items()):
        dense = save_checkpoint(random_model(config), parent / f"dense-{index}")
        folders[name] = parent / f"slice-{index}"
        words = ["--dim", "48", "--method", method, "--calibration", text, "--samples", "24", "--seq-len", "32"]
        done = call_command("slice", dense, *words, "--no-cache", "-o", folders[name])
        assert done.returncode == 0, f"{name}: {done.stderr}"
    torch.save((IDS, [str(folder) for folder in folders.values()]), parent / "asked")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["HF_MODULES_CACHE"] = str(parent / "modules")
    command = [PYTHON, "-c", VERSION_4, parent / "asked", parent / "answered"]
    done = subprocess.run(command, env=environment, cwd=parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = torch.load(parent / "answered")
    return {name: (folder, answers[str(folder)]) for name, folder in folders.items()}


def refusal(name):
    """Return what transformers 4 says of a slice that it cannot run, `None` if it can."""
    return next((message for pattern, message in REFUSED.items() if re.match(pattern, name)), None)


@pytest.mark.parametrize("name", [name for name in ARRANGEMENTS if refusal(name) is None])
def test_logits_are_the_same_in_both(both, name):
    folder, found = both[name]
    assert not isinstance(found, str), found
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert relative_error(found, logits(model, IDS)) < 1e-4


@pytest.mark.parametrize("name", [name for name in ARRANGEMENTS if refusal(name) is not None])
def test_what_transformers_4_cannot_run_it_refuses(both, name):
    _, found = both[name]
    assert isinstance(found, str), "it runs"
    assert re.search(refusal(name), found)
