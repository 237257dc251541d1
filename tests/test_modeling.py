"""Slices with code of their own: how they load, run, train and travel."""

from __future__ import annotations

import ast
import copy
import io
import json
import sys

import pytest
import torch
import transformers
from programs import run_program
from test_cli import python
from test_families import CASES
from test_slicing import dimensions_of

from slicecli.family.dimensions import Dimensions
from slicecli.family.schedule import Schedule
from slicecli.modeling import CODE_FILES
from slicecli.proof.declaration import logits, published_in_memory, relative_error, slice_in_memory
from slicecli.proof.tiny import random_model
from slicecli.testing.checkpoints import save_checkpoint

FOUR = ("phi3", "phi", "opt", "gpt2")
IDS = torch.randint(2, 250, (3, 12), generator=torch.Generator().manual_seed(0))
CACHED = {"use_cache": True, "return_dict_in_generate": True, "pad_token_id": 0}
# greedy tokens and logits of every folder named, in a process that cannot import slicecli
BARE = """
import json, sys
sys.modules["slicecli"] = None
import torch, transformers
transformers.logging.set_verbosity_error()
out = {}
for folder in json.loads(sys.argv[1]):
    found = []
    for where in (folder, folder + "-again"):
        model = transformers.AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True).eval()
        base = transformers.AutoModel.from_pretrained(where, trust_remote_code=True).eval()
        ids = torch.tensor(json.loads(sys.argv[2]))
        options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        options["attention_mask"] = torch.ones_like(ids)
        with torch.no_grad():
            for use_cache in (True, False):
                found.append(model.generate(ids, use_cache=use_cache, **options).tolist())
            hidden = base(ids).last_hidden_state
            error = float((hidden - model.base_model(ids).last_hidden_state).abs().max())
            assert error < 1e-5, error
        if where == folder:
            model.save_pretrained(folder + "-again")
    out[folder] = found
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def slices(tmp_path_factory, text_file):
    """Folders with slices, by family and method, made by the command."""
    from click.testing import CliRunner

    from slicecli.cli import group

    parent, made = tmp_path_factory.mktemp("slices"), {}
    for name in FOUR:
        dense = save_checkpoint(random_model(CASES[name][1]), parent / name)
        for method in ("refit", "slicegpt"):
            folder = made[name, method] = parent / f"{name}-{method}"
            words = ["slice", dense, "--dim", "48", "--method", method, "--calibration", text_file]
            words += ["--samples", "24", "--seq-len", "32", "--dtype", "float32", "-o", folder]
            done = CliRunner().invoke(group, [str(word) for word in words], prog_name="slicecli")
            assert done.exit_code == 0, done.output
    return made


@pytest.fixture
def folder(slices):
    """One of them: Phi-3 as published, sequential blocks with shortcuts."""
    return slices["phi3", "slicegpt"]


@pytest.fixture
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_slices_load_and_write_the_same_without_slicecli(slices, monkeypatch, tmp_path):
    folders = [str(path) for path in slices.values()]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    done = run_program("-c", BARE, json.dumps(folders), json.dumps(IDS.tolist()))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in folders:
        here = transformers.AutoModelForCausalLM.from_pretrained(name).eval()
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        expected = here.generate(IDS, attention_mask=torch.ones_like(IDS), **options).tolist()
        assert found[name] == [expected] * 4


def test_without_slicecli_code_runs_only_with_consent(folder):
    code = (
        "import sys; sys.modules['slicecli'] = None; import transformers\n"
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)"
    )
    done = run_program("-c", code, folder)
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import slicecli, transformers",
        "import transformers, slicecli",
        "import transformers; transformers.AutoConfig; import slicecli",
        "import transformers; transformers.AutoModelForCausalLM; import slicecli",
        "from slicecli.modeling.modeling_slicecli import SlicedForCausalLM; import transformers",
        "from slicecli.modeling.configuration_slicecli import SlicedConfig; import transformers",
    ],
)
def test_with_slicecli_the_installed_code_runs_whatever_is_imported_first(folder, imports):
    code = (
        f"{imports}\nimport sys\n"
        "config = transformers.AutoConfig.from_pretrained(sys.argv[1])\n"
        "assert type(config).__module__ == 'slicecli.modeling.configuration_slicecli', type(config)\n"
        "for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM):\n"
        "    model = auto.from_pretrained(sys.argv[1])\n"
        "    assert type(model).__module__ == 'slicecli.modeling.modeling_slicecli', type(model)\n"
    )
    done = run_program("-c", code, folder)
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_slicecli_imports_no_transformers():
    done = python("import sys, slicecli; assert not {'torch', 'transformers'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_code_imports_torch_and_transformers_only():
    for file in CODE_FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                assert top in {"torch", "transformers"} or top in sys.stdlib_module_names, f"{file.name}: {name}"


def test_the_folder_has_the_code_that_is_installed(folder):
    for file in CODE_FILES:
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_the_config_answers_for_the_dense_one(model):
    config = model.config
    assert config.embedding_size == model.get_input_embeddings().embedding_dim == 48
    assert config.hidden_size == config.dense_config.hidden_size == 64
    assert config.num_hidden_layers == config.get_text_config().num_hidden_layers == 2
    assert config.vocab_size == 304
    with pytest.raises(AttributeError, match="SlicedConfig"):
        _ = config.no_such_field
    assert not hasattr(transformers.AutoConfig.for_model("slicecli"), "num_hidden_layers")


@pytest.mark.parametrize("kind", [("opt", "refit"), ("gpt2", "refit"), ("phi", "slicegpt"), ("gpt2", "slicegpt")])
def test_the_config_states_the_widths_that_serving_programs_read(slices, kind):
    model = transformers.AutoModelForCausalLM.from_pretrained(slices[kind])
    config = model.config.get_text_config()
    assert config is model.config
    assert config.embedding_size == model.get_input_embeddings().weight.shape[1]
    assert config.hidden_size == model.get_output_embeddings().weight.shape[1]
    assert config.head_dim == model.generate(IDS, max_new_tokens=2, **CACHED).past_key_values.layers[0].keys.shape[-1]


def test_a_config_that_says_nothing_of_slicing_is_refused():
    config = transformers.AutoConfig.for_model("slicecli", dense_config=CASES["llama"][1].to_dict())
    with pytest.raises(ValueError, match="slicing"):
        transformers.AutoModelForCausalLM.from_config(config)


def test_a_model_is_one_of_its_family(model):
    assert isinstance(model, transformers.Phi3ForCausalLM)
    assert type(model).__name__ == "SlicedForCausalLM"
    assert {type(block).__name__ for block in model.model.layers} <= model._no_split_modules


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["mistral", "cohere2", "gpt2", "phi3"])
def test_attention_implementations_agree(family, implementation):
    """Masks are made for the implementation that runs, in the base model too, whose config is another."""
    adapter, config = CASES[family]
    dense = random_model(config)
    sizes = Dimensions(adapter, config.to_dict())
    ids = torch.randint(2, 250, (6, 40), generator=torch.Generator().manual_seed(0))
    made = published_in_memory(dense, sizes, ids, Schedule.constant(sizes, sizes.hidden_size))
    made.set_attn_implementation(implementation)
    assert made.config._attn_implementation == made.config.dense_config._attn_implementation == implementation
    dense.set_attn_implementation("eager")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected, found = (one(input_ids=ids, attention_mask=mask).logits[:, 5:] for one in (dense, made))
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("method", ["refit", "slicegpt"])
def test_hidden_states_and_attentions_can_be_seen(slices, name, method):
    model = transformers.AutoModelForCausalLM.from_pretrained(slices[name, method], attn_implementation="eager").eval()
    with torch.no_grad():
        seen = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(seen.hidden_states) == 3
    assert [value.shape[-1] for value in seen.hidden_states[:2]] == [48, 48]
    assert len(seen.attentions) == 2
    assert torch.allclose(seen.attentions[0].sum(-1), torch.ones(()), atol=1e-5)


def test_weights_may_lie_on_disk(folder, model, tmp_path):
    places = {name: "cpu" for name, _ in model.named_modules() if name.count(".") == 1 or name == "lm_head"}
    places = {name: place for name, place in places.items() if name != "model.layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    spread = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert spread.hf_device_map["model.layers.1"] == "disk"
    assert relative_error(logits(spread, IDS), logits(model, IDS)) < 1e-6


def test_a_block_stays_on_one_device(model):
    from accelerate import infer_auto_device_map

    size = sum(value.numel() * 4 for value in model.model.layers[0].parameters())
    places = infer_auto_device_map(
        model, {0: int(size * 1.5), "cpu": size * 20}, no_split_module_classes=list(model._no_split_modules)
    )
    assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]


def test_checkpointed_gradients_are_the_gradients(folder):
    gradients = []
    for is_checkpointed in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert any(name.endswith("shortcuts.1.weight") for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


def test_copies_and_pickles_are_whole(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(other) is type(model)
        assert torch.equal(logits(other, IDS), logits(model, IDS))


def test_it_compiles_without_a_break(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


def test_new_tokens_can_be_added(model):
    model.resize_token_embeddings(320)
    assert model.config.vocab_size == model.config.dense_config.vocab_size == 320
    assert logits(model, torch.full((1, 2), 319)).shape == (1, 2, 320)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "falcon", "gptj", "stablelm", "phi qk_layernorm=True"])
def test_the_refit_beats_the_published_method_there_too(name):
    """Families whose own class cannot describe a slice, at the same dim and with fewer parameters."""
    adapter, config = CASES[name]
    model, sizes = random_model(config), Dimensions(adapter, config.to_dict(), unties=True)
    rows = torch.randint(2, 300, (60, 24), generator=torch.Generator().manual_seed(0))
    fresh = torch.randint(2, 300, (20, 24), generator=torch.Generator().manual_seed(1))
    (refitted,), _ = slice_in_memory(model, sizes, rows, 48)
    projected = published_in_memory(model, sizes, rows, Schedule.constant(sizes, 48))
    errors = [relative_error(logits(one, fresh), logits(model, fresh)) for one in (refitted, projected)]
    assert errors[0] < errors[1]
    weights = [sum(value.numel() for value in one.parameters()) for one in (refitted, projected)]
    assert weights[0] < weights[1]


def test_shortcuts_are_trained_by_low_rank_adapters(tmp_path):
    """The embedded model, sliced hard, wins back part of what it lost by training only small maps for a few steps."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from slicecli.data.demo import MODEL_FOLDER
    from slicecli.data.packing import calibration_rows, evaluation_rows
    from slicecli.data.text import read_text
    from slicecli.evaluation.perplexity import measure_perplexity

    dense = transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_FOLDER)
    rows = calibration_rows(read_text("demo", "calibration"), tokenizer, 64, 128, seed=0).ids
    held_out = evaluation_rows(read_text("demo", "evaluation"), tokenizer, 128, samples=40)
    sizes = dimensions_of(dense.config)
    sliced = published_in_memory(dense, sizes, rows, Schedule.constant(sizes, 72), batch_rows=16)
    before = measure_perplexity(sliced, held_out, 20).value
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["shortcuts.0", "shortcuts.1", "q_proj", "down_proj"])
    torch.manual_seed(0)
    tuned = get_peft_model(sliced, settings)
    trained = [value for value in tuned.parameters() if value.requires_grad]
    assert any("shortcuts.1.lora_A" in name for name, value in tuned.named_parameters() if value.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    tuned.train()
    for step in range(12):
        batch = rows[step * 5 % 60 :][:5]
        optimizer.zero_grad()
        tuned(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    tuned.eval()
    after = measure_perplexity(tuned, held_out, 20).value
    assert after < 0.9 * before, f"perplexity {before:.1f} before, {after:.1f} after"

    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative_error(logits(again, rows[:2]), logits(merged, rows[:2])) < 1e-5
    fresh = published_in_memory(dense, sizes, rows, Schedule.constant(sizes, 72), batch_rows=16)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert relative_error(logits(loaded, rows[:2]), logits(merged, rows[:2])) < 1e-4
