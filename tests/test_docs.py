"""The documentation against the program."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slicecli
from slicecli.family import hookspecs
from slicecli.family.dimensions import Dimensions

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


def test_the_page_of_programs_is_what_was_found_in_them():
    tool = load_tool("write_serving_page")
    assert tool.PAGE.read_text() == tool.page()


def test_the_page_and_the_schema_of_the_record_are_those_of_its_models():
    tool = load_tool("write_record_schema")
    assert tool.PAGE.read_text() == tool.page()
    assert tool.SCHEMA.read_text() == tool.schema_text()


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


@pytest.fixture
def run_from_a_clone(tmp_path, monkeypatch):
    """Run commands where the demo model lies as in a clone."""
    import shlex

    from click.testing import CliRunner

    from slicecli.cli import group
    from slicecli.data.demo import MODEL_FOLDER

    (tmp_path / "slicecli" / "data" / "demo").mkdir(parents=True)
    (tmp_path / "slicecli" / "data" / "demo" / "model").symlink_to(MODEL_FOLDER)
    monkeypatch.chdir(tmp_path)

    def run(command):
        result = CliRunner().invoke(group, shlex.split(command)[1:], prog_name="slicecli")
        assert result.exit_code == 0, f"{command}\n{result.output}"
        return result

    return run


def test_the_commands_on_the_page_of_estimates_run_as_written(run_from_a_clone, tmp_path):
    page = (ROOT / "docs" / "estimate.md").read_text()
    blocks = re.findall(r"```\n(.*?)```", page, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("slicecli ")]
    assert {command.split()[1] for command in commands} == {"estimate", "spectrum", "sweep", "fit"}
    for command in commands:
        # less text, which changes nothing but the time
        run_from_a_clone(
            command.replace("--samples 64", "--samples 8 --limit 4").replace("--samples 32", "--samples 4")
        )
    for name in ("estimate.png", "spectrum.json", "demo-sweep/results.json", "demo-sweep/curve.png", "curve.png"):
        assert (tmp_path / name).is_file()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(snippet, {})


def test_the_commands_on_the_page_of_recovery_run_as_written(run_from_a_clone, tmp_path):
    page = (ROOT / "docs" / "recover.md").read_text()
    (commands,) = re.findall(r"```\n(slicecli slice .*?)```", page, flags=re.DOTALL)
    for command in commands.splitlines():
        # less text, which changes nothing but the time and the figures
        quick = command.replace("--samples 256", "--samples 8").replace("--tokens 270k", "--tokens 10k")
        run_from_a_clone(quick.replace(" --record", " --record --limit 4"))
    assert "| dense | sliced | recovered |" in (tmp_path / "demo-recovered" / "README.md").read_text()


def test_the_commands_on_the_page_of_two_widths_run_as_written(run_from_a_clone, tmp_path):
    page = (ROOT / "docs" / "shape.md").read_text()
    (commands,) = re.findall(r"```\n(slicecli slice .*?)```", page, flags=re.DOTALL)
    for command in commands.splitlines():
        run_from_a_clone(
            command.replace("--samples 64", "--samples 8").replace("--perplexity", "--limit 4 --perplexity")
        )
    both, width = (json.loads((tmp_path / name / "slicecli.json").read_text()) for name in ("demo-1m", "demo-1m-width"))
    assert both["parameters"]["sliced"] <= 1_000_000
    assert both["mlp_dim"] is not None
    assert width["mlp_dim"] is None


def test_the_table_of_two_widths_is_that_of_its_figures():
    """Every figure of the page stands in the bundled table."""
    import csv

    with (ROOT / "benchmarks" / "two_widths.csv").open(encoding="utf-8") as file:
        measured = {f"{row['dim']} × {row['mlp_dim']}: {float(row['perplexity']):.2f}" for row in csv.DictReader(file)}
    page = (ROOT / "docs" / "shape.md").read_text()
    shown = re.findall(r"\d+ × \d+: [\d.]+", page)
    assert len(shown) > 15
    assert set(shown) <= measured


def test_the_relation_in_the_documentation_registers_and_fits():
    page = (ROOT / "docs" / "plugins.md").read_text()
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "Relation(" in block]
    names: dict = {}
    exec(source, names)
    registered = []
    names["slicecli_register_relations"](registered.append)
    (relation,) = registered
    from slicecli.estimation.relations import Dense

    dense = Dense(2.0)
    points = [(sparsity, relation.predict(sparsity, dense, (3.0,))) for sparsity in (0.1, 0.3)]
    assert relation.fit(points, dense, None) == pytest.approx((3.0,))


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


def test_every_function_in_the_index_of_formulas_exists():
    page = (ROOT / "docs" / "notation.md").read_text().partition("## From a formula to its function")[2]
    places = re.findall(r"`(\w+/\w+\.py)`(?:: `(\w+)`)?", page)
    assert len(places) >= 15
    for file, name in places:
        module = importlib.import_module(f"slicecli.{file.removesuffix('.py').replace('/', '.')}")
        assert not name or hasattr(module, name), f"{file}: {name}"
