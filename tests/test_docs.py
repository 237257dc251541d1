"""The documentation against the program."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import slicecli
from slicecli import hookspecs
from slicecli.dimensions import Dimensions

ROOT = Path(__file__).parent.parent


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_page_is_the_help_of_the_commands():
    page = (ROOT / "docs" / "cli.md").read_text()
    # by words, because versions of click break lines differently
    assert page.split() == load_tool("write_cli_page").page().split()


def test_the_page_of_families_is_what_the_adapters_declare():
    page = (ROOT / "docs" / "families.md").read_text()
    assert page == load_tool("write_families_page").page()


def test_every_public_name_exists_and_every_hook_is_documented():
    for name in slicecli.__all__:
        assert getattr(slicecli, name) is not None
    page = (ROOT / "docs" / "plugins.md").read_text()
    hooks = [name for name in dir(hookspecs) if name.startswith("slicecli_")]
    assert hooks
    for hook in hooks:
        assert f"def {hook}(" in page


def test_the_plugin_in_the_documentation_registers_its_adapter():
    page = (ROOT / "docs" / "plugins.md").read_text()
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], names)
    registered = []
    names["slicecli_register_adapters"](registered.append)
    (adapter,) = registered
    fields = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 5,
        "num_attention_heads": 2,
        "intermediate_size": 3,
    }
    # embedding and head, two norms and a final one, four attention matrices with a writer's bias, two of the MLP
    assert Dimensions(adapter, {**fields, "attention_bias": True}).parameters(4) == 40 + 12 + 4 * 32 + 4 + 24


def test_every_link_between_pages_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_continuous_integration_runs_the_readme_command():
    commands = re.findall(r"^(python3 -m venv .*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("option", ["--dim", "--calibration", "--samples", "--seed", "--dtype"])
def test_options_in_the_readme_and_docs_exist(option):
    assert option in (ROOT / "docs" / "cli.md").read_text()


def test_version_is_the_distribution_s():
    from importlib.metadata import version

    assert slicecli.__version__ == version("slicecli")
