"""Discovery of plugins, and life with broken ones."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from slicecli.adapters import select_adapter
from slicecli.errors import NoAdapterError, RequestError, UnsupportedModelError
from slicecli.family.plugins import load_plugins

SOUND = """
import slicecli
from slicecli.adapters import Adapter, Block, Branch, Linear, Refusal

@slicecli.hookimpl
def slicecli_register_adapters(register):
    register(Adapter("{name}", ("{model_type}",), Block((Branch("norm", (), Linear("mlp.down", "query"), "mlp"),))))
"""
COMMAND = """
import click
import slicecli

@slicecli.hookimpl
def slicecli_register_commands(group):
    @group.command("greet")
    def greet():
        '''Say hello.'''
        click.echo("hello")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, source):
        (tmp_path / f"plugin_{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"plugin_{name}", raising=False)
        return EntryPoint(name, f"plugin_{name}", "slicecli")

    return make


def test_a_plugin_registers_its_adapter(plugin):
    found = load_plugins([plugin("one", SOUND.format(name="one", model_type="a"))])
    assert found.adapters["one"].model_types == ("a",)
    assert found.loaded[0].hooks == ("slicecli_register_adapters",)
    assert not found.broken


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_package", "no_such_package"),
        ("raise RuntimeError('boom')", "boom"),
        ("def broken(:", "SyntaxError"),
        (SOUND.format(name="x", model_type="b") + "    raise ValueError('late')", "late"),
        (SOUND.format(name="x", model_type="a"), "'a' is served by adapter 'good'"),
        (SOUND.format(name="good", model_type="b"), "'good' is registered already"),
        (SOUND.format(name="auto", model_type="b"), "'auto' is registered already"),
        (
            SOUND.format(name="x", model_type="b") + '    register(Refusal(("a",), "It cannot."))',
            "served by adapter 'good'",
        ),
        ("import slicecli\n@slicecli.hookimpl\ndef slicecli_no_such_hook(): pass", "unknown hook"),
    ],
)
def test_a_broken_plugin_is_reported_and_the_others_work(plugin, source, reason):
    found = load_plugins(
        [
            plugin("a_good", SOUND.format(name="good", model_type="a")),
            plugin("b_bad", source),
            plugin("c_good", SOUND.format(name="last", model_type="z")),
        ]
    )
    assert sorted(found.adapters) == ["good", "last"]
    (broken,) = found.broken
    assert broken.name == "b_bad"
    assert reason in broken.error
    found.manager.hook.slicecli_register_adapters(register=lambda adapter: None)


def test_a_plugin_can_refuse_a_family(plugin):
    source = SOUND.format(name="one", model_type="a") + '    register(Refusal(("b", "c"), "It cannot."))'
    found = load_plugins([plugin("one", source)])
    assert found.refusals[0].model_types == ("b", "c")
    with pytest.raises(UnsupportedModelError, match="'c' cannot be sliced: It cannot"):
        select_adapter({"model_type": "c"}, found.adapters, refusals=found.refusals)
    with pytest.raises(NoAdapterError):
        select_adapter({"model_type": "d"}, found.adapters, refusals=found.refusals)


def test_only_wanted_plugins_are_imported(plugin):
    entries = [plugin("one", SOUND.format(name="one", model_type="a")), plugin("two", "raise RuntimeError")]
    assert [entry.name for entry in load_plugins(entries, {"one"}).loaded] == ["one"]
    assert load_plugins(entries, set()).adapters == {}
    with pytest.raises(RequestError, match="not installed: three"):
        load_plugins(entries, {"one", "three"})


def slicecli(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "slicecli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_built_in_families_are_found_through_the_entry_points():
    shown = slicecli("plugins")
    assert shown.returncode == 0
    for name in ("llama", "mistral", "phi3", "qwen2", "qwen3"):
        assert name in shown.stdout


def test_the_switch_loads_none_or_some():
    assert "llama" not in slicecli("adapters", SLICECLI_PLUGINS="").stdout
    some = slicecli("adapters", SLICECLI_PLUGINS="llama,phi3").stdout
    assert "phi3" in some
    assert "qwen2" not in some
    wrong = slicecli("adapters", SLICECLI_PLUGINS="lama")
    assert wrong.returncode == 2
    assert "lama" in wrong.stderr


def test_an_installed_plugin_adds_a_command_and_a_broken_one_does_not_stop_help(tmp_path):
    for name, source in (("greeting", COMMAND), ("broken", "import no_such_package")):
        (tmp_path / f"plugin_{name}.py").write_text(source)
        metadata = tmp_path / f"plugin_{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-{name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[slicecli]\n{name} = plugin_{name}\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    help_page = slicecli("--help", PYTHONPATH=path)
    assert help_page.returncode == 0
    assert "Say hello." in help_page.stdout
    assert slicecli("greet", PYTHONPATH=path).stdout == "hello\n"
    warned = slicecli("adapters", PYTHONPATH=path)
    assert "plugin broken of plugin-broken was skipped" in warned.stderr
    assert "no_such_package" in warned.stderr
    assert "llama" in warned.stdout
    (tmp_path / "config.json").write_text('{"model_type": "theirs"}')
    unsupported = slicecli("inspect", str(tmp_path), PYTHONPATH=path)
    assert "plugin broken of plugin-broken was skipped" in unsupported.stderr
    assert "'theirs' are not supported" in unsupported.stderr
