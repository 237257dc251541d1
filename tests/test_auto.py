"""The auto adapter: what it infers, what it refuses, and what it writes."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from slicecli.errors import NotInferredError, OutputError
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.infer.explain import classify_norm, explain_change, linear_form
from slicecli.infer.inference import infer_adapter
from slicecli.infer.observe import Call
from slicecli.infer.scaffold import package_files, structural_switches, write_package
from slicecli.proof.tiny import random_model, tiny_config
from slicecli.testing import save_checkpoint

pytestmark = pytest.mark.slow

# config classes whose own defaults cannot be built, and what is needed
COMPLETE = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
# multi-query attention makes the fused projection as wide as no config field says
NOT_INFERRED = {"falcon"}
DECLARED = sorted({kind for adapter in plugins().adapters.values() for kind in adapter.model_types} - NOT_INFERRED)


def adapter_of(model_type):
    return next(adapter for adapter in plugins().adapters.values() if model_type in adapter.model_types)


@functools.cache
def inferred_of(model_type):
    """Return a type's default config and the adapter inferred for it."""
    config = transformers.CONFIG_MAPPING[model_type](**COMPLETE.get(model_type, {}))
    return config, infer_adapter(config).adapter


@pytest.mark.parametrize("model_type", DECLARED)
def test_the_inferred_declaration_equals_the_written_one(model_type):
    config, inferred = inferred_of(model_type)
    written = adapter_of(model_type)
    fields = config.to_dict()
    assert Dimensions(inferred, fields).declaration() == Dimensions(written, fields).declaration()
    assert inferred.layout(fields) == written.layout(fields)
    assert inferred.keeps_width == written.keeps_width
    assert inferred.shortcut_obstacle == written.shortcut_obstacle
    assert inferred.norm == written.norm
    dims = (Dimensions(inferred, fields).hidden_size // 2, None)
    assert [Dimensions(inferred, fields).parameters(dim) for dim in dims] == [
        Dimensions(written, fields).parameters(dim) for dim in dims
    ]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("granite", {"residual_multiplier": 0.22}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("cohere", {"use_qk_norm": True}),
        ("opt", {"enable_bias": False}),
    ],
)
def test_the_inference_sees_how_the_config_arranges_the_model(model_type, changes):
    config = transformers.CONFIG_MAPPING[model_type](**changes)
    fields = config.to_dict()
    inferred = Dimensions(infer_adapter(config).adapter, fields)
    assert inferred.declaration() == Dimensions(adapter_of(model_type), fields).declaration()


def test_a_bias_is_tied_to_the_field_that_switches_it():
    adapter = infer_adapter(transformers.LlamaConfig()).adapter
    assert {reader.bias for branch in adapter.block.branches for reader in branch.readers} == {
        "attention_bias",
        "mlp_bias",
    }


@pytest.mark.parametrize(
    ("model_type", "check", "reason"),
    [
        ("gemma2", "branches", "passes through model.layers.0.post_attention_layernorm and"),
        ("gemma3_text", "branches", "passes through"),
        ("glm4", "branches", "passes through model.layers.0.post_self_attn_layernorm and"),
        ("olmo2", "branches", "no norm of model.layers.0 reads the stream"),
        ("bloom", "embeddings", "something else changes the embeddings"),
        ("doge", "branches", "not the sum of its linear maps' outputs"),
        ("bert", "head", "neither an RMSNorm nor a LayerNorm"),
        ("t5", "blocks", "cannot build"),
        ("openai-gpt", "head", "no norm lies between"),
    ],
)
def test_what_does_not_fit_a_declaration_is_refused_with_the_reason(model_type, check, reason):
    with pytest.raises(NotInferredError, match=reason) as refused:
        infer_adapter(transformers.CONFIG_MAPPING[model_type]())
    assert refused.value.check == check


def test_blocks_that_the_tiny_model_does_not_show_are_found_on_the_real_config():
    """A config whose later blocks are of another kind than the first two."""
    config = transformers.CONFIG_MAPPING["qwen3_moe"](num_hidden_layers=4, mlp_only_layers=[3])
    with pytest.raises(NotInferredError, match=r"layers\.3\.mlp") as refused:
        infer_adapter(config)
    assert refused.value.check == "proof"
    assert refused.value.found["blocks"] == "model.layers"


# the explanations


def call(path, module, entering, order=0):
    with torch.no_grad():
        return Call(path, module, order, entering, module(entering))


@pytest.fixture
def tokens():
    return torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_change_is_explained_by_what_is_part_of_it(tokens):
    torch.manual_seed(0)
    one, two, three = (call(f"m{i}", torch.nn.Linear(8, 8).double(), tokens, i) for i in range(3))
    written = explain_change(0.5 * one.leaving + two.leaving, [one, two, three])
    assert [(part.call.path, round(part.multiplier, 9)) for part in written] == [("m0", 0.5), ("m1", 1.0)]
    assert explain_change(one.leaving.square(), [one, two, three]) is None
    assert explain_change(one.leaving, []) is None


def test_a_gate_is_found_where_it_multiplies(tokens):
    torch.manual_seed(0)
    one, two = (call(f"m{i}", torch.nn.Linear(8, 8).double(), tokens, i) for i in range(2))
    gates = [call(f"g{i}", torch.nn.Linear(8, 1).double(), tokens) for i in range(2)]
    change = one.leaving + torch.sigmoid(gates[1].leaving) * two.leaving
    written = explain_change(change, [one, two], gates)
    assert [(part.call.path, part.gate and part.gate.path) for part in written] == [("m0", None), ("m1", "g1")]


def test_norms_and_linear_maps_are_told_by_their_numbers(tokens):
    layer = torch.nn.LayerNorm(8, eps=0.01).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
    found = classify_norm(call("n", layer, tokens), 8, {"my_eps": 0.01})
    assert (found.kind, found.epsilon, found.has_bias, found.weight_offset) == ("layer", "my_eps", True, 0.0)
    assert classify_norm(call("n", layer, tokens), 8, {"my_eps": 0.02}) is None
    assert classify_norm(call("n", torch.nn.Linear(8, 8).double(), tokens), 8, {"my_eps": 0.01}) is None
    square = transformers.pytorch_utils.Conv1D(8, 8).double()
    assert linear_form(call("c", square, tokens)).is_transposed
    assert linear_form(call("l", torch.nn.Linear(8, 3).double(), tokens)).outputs == 3
    assert linear_form(call("n", layer, tokens)) is None


# the command line


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """Checkpoints of types that no plugin knows."""

    def make(model_type, **changes):
        folder = tmp_path_factory.mktemp(model_type) / f"tiny-{model_type}"
        return save_checkpoint(random_model(tiny_config(model_type, **changes)), folder)

    return make


def test_an_unknown_type_is_sliced_and_said_to_be_inferred(run, unknown, slice_words, tmp_path):
    model = unknown("apertus", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    done = run("slice", model, "--dim", "48", "-o", tmp_path / "out", *slice_words)
    assert done.exit_code == 0, done.output
    assert "the adapter was inferred" in done.stderr
    record = json.loads((tmp_path / "out" / "slicecli.json").read_text())
    assert record["adapter"] == "auto"
    assert "--adapter auto" in (tmp_path / "out" / "README.md").read_text()
    made, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert made.config.hidden_size == 48
    assert not any(report.values()), report  # the activation's buffers are in the checkpoint too


def test_experts_are_stored_as_their_family_stores_them(run, unknown, slice_words, tmp_path):
    from safetensors.torch import load_file

    model = unknown("granitemoe")
    assert run("slice", model, "--dim", "48", "-o", tmp_path / "out", *slice_words).exit_code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert before.keys() == after.keys()


CODE = {
    "configuration_mine.py": """
from transformers import LlamaConfig

class MineConfig(LlamaConfig):
    model_type = "mine"
""",
    "modeling_mine.py": """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
""",
}


def test_a_model_with_code_of_its_own_is_sliced_on_request_and_keeps_it(run, checkpoint_copy, slice_words, tmp_path):
    path = checkpoint_copy / "config.json"
    maps = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    changes = {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": maps}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for name, text in CODE.items():
        (checkpoint_copy / name).write_text(text)
    words = ["slice", checkpoint_copy, "--dim", "36", "-o", tmp_path / "out", *slice_words]
    refused = run(*words)
    assert refused.exit_code == 1
    assert "'mine' are not supported" in refused.stderr
    done = run(*words, "--trust-remote-code")
    assert done.exit_code == 0, done.output
    for name in CODE:
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint_copy / name).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "MineForCausalLM"
    assert loaded.config.hidden_size == 36
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "no custom code" not in card


OWN_CLASS = """
from transformers import LlamaForCausalLM

class MineForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp.register_forward_hook(self.change)

    @staticmethod
    def change(module, arguments, output):
        return {returned}
"""


@pytest.fixture
def with_own_class(checkpoint_copy):
    """A Llama whose config names a class of its own for the model alone."""

    def make(returned="output", reference="modeling_mine.MineForCausalLM"):
        path = checkpoint_copy / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModelForCausalLM": reference}}))
        (checkpoint_copy / "modeling_mine.py").write_text(OWN_CLASS.format(returned=returned))
        return checkpoint_copy

    return make


def test_a_type_of_transformers_with_a_model_class_of_its_own_is_sliced(run, with_own_class, slice_words, tmp_path):
    folder, output = with_own_class(), tmp_path / "out"
    done = run("slice", folder, "--dim", "36", "-o", output, *slice_words, "--trust-remote-code")
    assert done.exit_code == 0, done.output
    assert (output / "modeling_mine.py").read_bytes() == (folder / "modeling_mine.py").read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert (type(loaded).__name__, loaded.config.hidden_size) == ("MineForCausalLM", 36)
    assert str(tmp_path) not in (output / "config.json").read_text()
    assert run("verify", output).exit_code == 0
    # without the flag the type's own class is sliced, and the slice is one of it, as transformers does
    assert run("slice", folder, "--dim", "36", "-o", tmp_path / "stock", *slice_words).exit_code == 0
    assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())


def test_a_class_of_its_own_that_computes_something_else_is_not_sliced_as_its_type(
    run, with_own_class, slice_words, tmp_path
):
    folder, output = with_own_class("output + arguments[0] ** 2"), tmp_path / "out"
    done = run("slice", folder, "--dim", "36", "-o", output, *slice_words, "--trust-remote-code")
    assert done.exit_code == 1
    assert "MineForCausalLM" in done.stderr
    assert "model.layers.1" in done.stderr
    assert not output.exists()


def test_code_of_another_repository_is_refused(run, with_own_class, slice_words, tmp_path):
    folder = with_own_class(reference="you/code--modeling_mine.MineForCausalLM")
    done = run("slice", folder, "--dim", "36", "-o", tmp_path / "out", *slice_words, "--trust-remote-code")
    assert done.exit_code == 1
    assert "loads code from another repository: 'you/code--modeling_mine.MineForCausalLM'" in done.stderr


def test_inspect_shows_an_inferred_declaration(run, unknown):
    model = unknown("vaultgemma")
    document = json.loads(run("inspect", model, "--format", "json").stdout)
    assert document["inferred"]["error"] < 1e-9
    assert document["declaration"]["scales_embeddings_by_width"] is True
    shown = run("inspect", model)
    assert "adapter inferred, stock layout" in shown.stdout
    assert "it accounts for every parameter" in shown.stderr


def test_inspect_shows_what_was_found_of_one_that_was_not_inferred(run, unknown):
    model = unknown("doge")
    done = run("inspect", model, "--format", "json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["not_inferred"]["check"] == "branches"
    assert document["not_inferred"]["found"]["final_norm"] == "model.norm"
    assert "found embeddings: model.embed_tokens" in done.stderr
    refused = run("slice", model, "--dim", "48")
    assert refused.exit_code == 1
    assert "not the sum of its linear maps' outputs" in refused.stderr


def test_a_family_refused_by_name_is_not_inferred(run, unknown):
    done = run("slice", unknown("gemma2"), "--dim", "48")
    assert done.exit_code == 1
    assert "'gemma2' cannot be sliced: its branches pass through a norm" in done.stderr
    assert "found" not in done.stderr


def test_the_auto_adapter_gives_the_slice_of_the_written_one(run, checkpoints, slice_words, tmp_path):
    for name, words in (("written", ()), ("inferred", ("--adapter", "auto"))):
        done = run("slice", checkpoints("qwen3"), "--dim", "36", "-o", tmp_path / name, *words, *slice_words)
        assert done.exit_code == 0, done.output
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("written", "inferred")]
    assert files[0] == files[1]


def test_a_type_that_transformers_does_not_know_is_not_supported(run, checkpoint_copy):
    path = checkpoint_copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "lama"}))
    done = run("inspect", checkpoint_copy)
    assert done.exit_code == 1
    assert "Did you mean 'llama'" in done.stderr


# the scaffold


def test_the_scaffold_says_what_it_has_seen_and_no_more():
    config = transformers.CONFIG_MAPPING["stablelm"]()
    adapter = infer_adapter(config).adapter
    switches = structural_switches(config, adapter)
    assert switches == {"qk_layernorm": False, "use_parallel_residual": False}
    names: dict = {}
    exec(package_files(adapter, switches)["slicecli_stablelm/__init__.py"], names)
    made = names["ADAPTER"]
    assert Dimensions(made, config.to_dict()).declaration() == Dimensions(adapter, config.to_dict()).declaration()
    made.require_sliceable(config.to_dict())
    with pytest.raises(Exception, match="use_parallel_residual = True"):
        made.require_sliceable({**config.to_dict(), "use_parallel_residual": True})


@pytest.mark.parametrize("model_type", DECLARED)
def test_the_source_of_a_scaffold_is_the_adapter(model_type):
    _, adapter = inferred_of(model_type)
    names: dict = {}
    exec(package_files(adapter, {})[f"slicecli_{model_type}/__init__.py"], names)
    assert names["ADAPTER"] == adapter


def test_the_scaffold_replaces_nothing(tmp_path):
    config = transformers.CONFIG_MAPPING["apertus"]()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(OutputError, match="'mine' already exists"):
        write_package(config, tmp_path / "mine")
    with pytest.raises(NotInferredError):
        write_package(transformers.CONFIG_MAPPING["gemma2"](), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_scaffolded_package_is_installed_found_and_passes_its_test(run, unknown, tmp_path):
    """In an environment of its own, which sees this one's packages but has the plugin alone."""
    package, environment = tmp_path / "slicecli-granitemoe", tmp_path / "environment"
    assert run("adapters", "--scaffold", unknown("granitemoe"), "-o", package).exit_code == 0
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    here = [path for path in sys.path if path.endswith("site-packages")]
    source = Path(__file__).parent.parent
    (Path(site.stdout.strip()) / "here.pth").write_text("\n".join([*here, str(source), str(source / "plugins")]))
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", package]
    subprocess.run(install, check=True)
    listed = subprocess.run([python, "-m", "slicecli", "adapters"], capture_output=True, text=True, check=True)
    assert "slicecli-granitemoe" in listed.stdout
    tested = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout
    assert "passed" in tested.stdout
