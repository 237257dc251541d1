"""The conformance suite of a declaration: one class with every property that must hold.

A failing test names the parameter or module at fault. Tests that make sense for some declarations only say what they
require (`slicecli_requires`), and are skipped elsewhere: whether a family is stock follows from its declaration.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from slicecli.adapters import Adapter
from slicecli.checkpoint.meta_model import build_runnable_meta_model, parameter_shapes, with_plain_experts
from slicecli.checkpoint.source import Source
from slicecli.errors import RequestError
from slicecli.estimation.cost import Cost, CostModel, Workload
from slicecli.family.context_length import context_length_of_config, own_names
from slicecli.family.dimensions import Dimensions, nearest_in
from slicecli.family.plugins import plugins
from slicecli.family.schedule import PublishedSizes, Schedule, slices_head
from slicecli.family.slice_plan import Method, SliceSizes, Width
from slicecli.family.written_class import OWN, SliceClasses, WrittenClass
from slicecli.jobs.options import SliceOptions
from slicecli.jobs.plan import find_adapter, full_fields, plan_slices
from slicecli.jobs.run import run_slices
from slicecli.proof.declaration import (
    identity_basis,
    logits,
    projected_model,
    prove_accounting,
    prove_channels,
    prove_embeddings,
    prove_refit,
    prove_rotation,
    prove_shortcuts,
    prove_tie,
    published_in_memory,
    relative_error,
    slice_in_memory,
)
from slicecli.proof.portable import prove_portable
from slicecli.proof.tiny import random_model, tiny_config
from slicecli.runtime.libraries import quiet_libraries
from slicecli.slicing.slicegpt import Orientation
from slicecli.testing.checkpoints import nonsense_text, save_checkpoint

__all__ = ["AdapterTests", "Subject", "make_subject", "tiny_of"]

FLOAT64, FLOAT32 = 1e-9, 1e-4
ROWS, LENGTH = 40, 24


class Subject:
    """The model that a declaration is tested on, and results derived from it; each is computed once, on first use.

    Attributes:
        adapter: The declaration.
        model: The model with weights, in float32.
        fields: The fields of its config.
        dimensions: Its sizes.
        is_real: It is a checkpoint that was named, not a tiny random model.
    """

    def __init__(
        self, adapter: Adapter, model: Any, folder: Path, is_real: bool, fields: Mapping[str, Any] | None = None
    ) -> None:
        self.adapter = adapter
        self.model = model
        self.fields = model.config.to_dict() if fields is None else fields
        self.adapter.require_sliceable(self.fields)
        self.dimensions: Dimensions = Dimensions(adapter, self.fields)
        self.is_real = is_real
        self._folder = folder
        self._sliced: dict[tuple[Method, bool, str], Path] = {}
        self._loaded: dict[tuple[Method, bool], Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        found: torch.device = self.model.device
        return found

    @functools.cached_property
    def exact(self) -> Any:
        """The model in float64."""
        model = type(self.model)(self.model.config).to(self.device, torch.float64).eval()
        model.load_state_dict(self.model.state_dict())
        return with_plain_experts(model)

    @functools.cached_property
    def tied(self) -> Any:
        """The model in float64 with its embedding table as its head."""
        config = copy.deepcopy(self.model.config)
        config.tie_word_embeddings = True
        model = type(self.model)(config).to(self.device, torch.float64).eval()
        state = {
            name: value for name, value in self.model.state_dict().items() if name in dict(model.named_parameters())
        }
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        return with_plain_experts(model)

    @functools.cached_property
    def token_ids(self) -> torch.Tensor:
        """Random tokens, shape (rows, sequence length)."""
        generator = torch.Generator().manual_seed(1)
        shape = (8 if self.is_real else ROWS, LENGTH)
        return torch.randint(2, min(self.dimensions.vocabulary, 258), shape, generator=generator).to(self.device)

    @property
    def dim(self) -> int:
        """A legal dim near three quarters of the hidden size."""
        return self.dimensions.nearest_legal(self.dimensions.hidden_size * 3 // 4)[0]

    @functools.cached_property
    def checkpoint(self) -> Path:
        """The model as a folder."""
        if self.is_real:
            return self._folder
        return save_checkpoint(self.model, self._folder / f"tiny-{self.adapter.name}")

    def sizes(self, method: Method) -> SliceSizes:
        """Return the legal dims and sizes of slices by a method."""
        return self.dimensions if method == "refit" else PublishedSizes(self.dimensions)

    @functools.cached_property
    def portable(self) -> tuple[WrittenClass, ...]:
        """The portable classes that this config can have."""
        with _registered(self.adapter):
            return SliceClasses.of(self.dimensions, self.model.config.model_type).available[1:]

    @property
    def mlp_dim(self) -> int:
        """About three quarters of the MLP channels, an odd number of them where that is legal."""
        return nearest_in(self.dimensions.legal_mlp_dims(), self.dimensions.mlp_size * 3 // 8 * 2 - 1)[0]

    def sliced(self, method: Method, has_fewer_channels: bool = False, write_as: str = OWN) -> Path:
        """Return a slice of the model, made by the same code as the command."""
        key = (method, has_fewer_channels, write_as)
        if key not in self._sliced:
            parent = Path(tempfile.mkdtemp(dir=None if self.is_real else self._folder))
            text, output = nonsense_text(parent / "nonsense.jsonl"), parent / "slice"
            options = SliceOptions(
                method=method,
                write_as=write_as,
                calibration=str(text),
                samples=24,
                sequence_length=32,
                dtype="float32",
                device_map=str(self.device),
            )
            with quiet_libraries(), _registered(self.adapter):
                width = Width(self.dim, mlp_dim=self.mlp_dim if has_fewer_channels else None)
                run_slices(plan_slices(str(self.checkpoint), [width], [output], options))
            self._sliced[key] = output
        return self._sliced[key]

    def loaded(self, method: Method, has_fewer_channels: bool = False) -> Any:
        """Return the slice, loaded with transformers."""
        key = (method, has_fewer_channels)
        if key not in self._loaded:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(self.sliced(*key), dtype=torch.float32)
            self._loaded[key] = loaded.eval()
        return self._loaded[key]

    @property
    def capabilities(self) -> set[str]:
        """The capabilities that the declaration gives the model, for tests to require."""
        blocks = self.dimensions.declared_blocks
        branches = [branch for block in blocks for branch in block.branches]
        linears = [linear for branch in branches for linear in branch.linears]
        found = {
            self.adapter.layout(self.fields): True,
            "tied": self.dimensions.is_tied,
            "can-tie": not self.adapter.why_untied(self.fields),
            "biases": any(self.dimensions.has_bias(linear) for linear in linears),
            "parallel": any(block.is_parallel for block in blocks),
            "experts": any(branch.experts is not None for branch in branches),
            "layer-norm": self.adapter.norm.is_centred,
            "slicegpt": not self.dimensions.shortcut_obstacle,
            "portable": bool(self.portable),
            "mlp": not self.dimensions.mlp_obstacle,
            "transposed": any(linear.is_transposed for linear in linears),
        }
        return {name for name, holds in found.items() if holds}


def make_subject(request: pytest.FixtureRequest, folder: Path) -> Subject:
    """Make the subject of a test class: the checkpoint of `--slicecli-model`, else a tiny model of the class's adapter.

    Args:
        request: The request for the fixture `slicecli_subject`; its parameter, where it has one, is an adapter and a
            config, and stands for the class's own.
        folder: A folder for what is written.
    """
    name, device = request.config.getoption("slicecli_model"), request.config.getoption("slicecli_device")
    if name:
        source = Source.find(name)
        source.fetch_weights()
        adapter = find_adapter(source, request.config.getoption("slicecli_adapter")).adapter
        model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
        return Subject(
            adapter, model.to(device), source.folder, is_real=True, fields=full_fields(source, source.config())
        )
    adapter, config = getattr(request, "param", None) or (request.cls.adapter, request.cls.tiny_config)
    if adapter is None:
        pytest.fail(f"{request.cls.__name__} names no adapter: set the attribute `adapter`")
    if config is None or isinstance(config, dict):
        config = tiny_of(adapter, adapter.model_types[0], **(config or {}))
    return Subject(adapter, random_model(config).to(device), folder, is_real=False)


def tiny_of(adapter: Adapter, model_type: str, **changes: Any) -> Any:
    """Return the config of a tiny model of one of an adapter's types.

    Args:
        adapter: The adapter.
        model_type: The type.
        **changes: Config fields to change.
    """
    return tiny_config(model_type, has_head_dim=adapter.layout(changes) == "stock", **changes)


needs_shortcuts = pytest.mark.slicecli_requires("slicegpt")
methods = pytest.mark.parametrize("method", ["refit", pytest.param("slicegpt", marks=needs_shortcuts)])


@pytest.mark.slicecli_suite
class AdapterTests:
    """Every property of a declaration. Subclass it and name the adapter.

    Attributes:
        adapter: The declaration under test.
        tiny_config: The transformers config of a small model of the family, or a dict of fields to change in the
            one that `slicecli.proof.tiny` makes, which does for most.

    Example:
        >>> class TestMine(AdapterTests):
        ...     adapter = ADAPTER
    """

    adapter: Adapter | None = None
    tiny_config: Any = None

    @pytest.fixture
    def subject(self, request: pytest.FixtureRequest, slicecli_subject: Subject) -> Subject:
        """The model under test; skips tests whose capabilities the declaration lacks."""
        for marker in request.node.iter_markers("slicecli_requires"):
            missing = sorted(set(marker.args) - slicecli_subject.capabilities)
            if missing:
                pytest.skip(f"adapter {slicecli_subject.adapter.name} is not {', '.join(missing)} here")
        return slicecli_subject

    # the declaration

    def test_it_names_every_parameter_with_its_size(self, subject: Subject) -> None:
        """No parameter is missing or invented, and every width and bias is right."""
        subject.dimensions.require_declared(parameter_shapes(subject.model))

    def test_counts_equal_the_model(self, subject: Subject) -> None:
        """The count from the declaration equals the model's."""
        assert subject.dimensions.parameters() == sum(value.numel() for value in subject.model.parameters())

    @pytest.mark.slicecli_requires("stock")
    def test_exactly_what_touches_the_stream_grows_with_it(self, subject: Subject) -> None:
        """A parameter has an axis of hidden size if and only if it is declared to touch the stream."""
        shapes = {
            size: parameter_shapes(build_runnable_meta_model(_resized(subject, size)))
            for size in (subject.dimensions.hidden_size, subject.dimensions.hidden_size * 2)
        }
        prove_accounting(shapes, subject.dimensions)

    def test_the_context_length_is_that_of_the_config_class(self, subject: Subject) -> None:
        """The longest row is found without the class under the name that the class has for it."""
        expected, found = context_length_of_config(subject.model.config), subject.dimensions.context_length
        own_name = own_names(subject.model.config).get("max_position_embeddings", "max_position_embeddings")
        assert found == expected, f"names does not say that max_position_embeddings is {own_name}, here {expected}"

    # what it costs

    def test_estimated_operations_are_those_of_the_model(self, subject: Subject) -> None:
        """The operations for a prompt and for one more token equal those of the model's matrix products."""
        cost = CostModel(subject.dimensions, "refit").dense("float32", Workload(1, LENGTH))
        compare_operations(subject.model, subject.dimensions, cost, subject.token_ids[:1])

    def test_the_estimated_cache_is_that_of_the_model(self, subject: Subject) -> None:
        """The estimated bytes of keys and values equal those of the model's cache, including sliding windows."""
        dimensions, batch = subject.dimensions, 3
        cost = CostModel(dimensions, "refit").dense("float32", Workload(batch, LENGTH))
        cache = transformers.DynamicCache(config=subject.model.config)
        with torch.no_grad():
            subject.model(subject.token_ids[:batch], **_with_cache(subject.model, cache))
        found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        # transformers lets the oldest token of a full window go as soon as the newest one is there
        full = sum(dimensions.window(block) in range(1, LENGTH + 1) for block in range(dimensions.blocks))
        found += full * batch * cost.kv_cache_bytes_per_token // dimensions.blocks
        # and some classes store keys and values once for every query head
        repeats = cache.layers[0].keys.shape[1] // dimensions.key_value_heads
        assert repeats in (1, dimensions.heads // dimensions.key_value_heads)
        assert cost.kv_cache_bytes == found / repeats

    # what a rotation must leave alone

    def test_folding_the_norms_leaves_logits_unchanged(self, subject: Subject, record_property: Any) -> None:
        """Norm weights and biases move into the readers exactly."""
        basis = identity_basis(subject.dimensions, subject.device)
        folded = projected_model(subject.exact, subject.dimensions.untied(), basis)
        error = relative_error(logits(folded, subject.token_ids), logits(subject.exact, subject.token_ids))
        record_property("relative_error", error)
        assert error <= FLOAT64, (
            f"folding the norms ({subject.adapter.norm}) into their readers changes the logits by {error:.1e}"
        )

    @pytest.mark.parametrize("seed", [0, 1])
    def test_a_rotation_leaves_logits_unchanged_in_float64(
        self, subject: Subject, seed: int, record_property: Any
    ) -> None:
        """Rotating the stream changes no value that a reader, writer or head sees."""
        error = prove_rotation(subject.exact, subject.dimensions, subject.token_ids, FLOAT64, seed)
        record_property("relative_error", error)

    def test_a_rotation_leaves_logits_unchanged_in_float32(self, subject: Subject, record_property: Any) -> None:
        """The same in the precision in which models run."""
        error = prove_rotation(subject.model, subject.dimensions, subject.token_ids, FLOAT32)
        record_property("relative_error", error)

    @pytest.mark.slicecli_requires("can-tie")
    def test_a_tied_model_stays_tied_without_loss(self, subject: Subject, record_property: Any) -> None:
        """One table serves a rotated model as embedding and as head, whether this config is tied or not."""
        dimensions = Dimensions(subject.adapter, {**subject.fields, "tie_word_embeddings": True})
        error = prove_tie(subject.tied, dimensions, subject.token_ids, FLOAT64)
        record_property("relative_error", error)

    def test_the_refit_at_full_width_finds_nothing_to_mend(self, subject: Subject, record_property: Any) -> None:
        """Multipliers, gates and the order of branches are as declared."""
        error = prove_refit(subject.exact, subject.dimensions, subject.token_ids, FLOAT64)
        record_property("relative_error", error)

    @pytest.mark.slicecli_requires("stock")
    def test_a_slice_starts_from_the_projection_of_the_stream(self, subject: Subject, record_property: Any) -> None:
        """Nothing that depends on the hidden size itself changes the embeddings."""
        # models hold such a factor in float32
        error = prove_embeddings(subject.exact, subject.dimensions, subject.token_ids, subject.dim, FLOAT32)
        record_property("relative_error", error)

    # portable classes

    @pytest.mark.slicecli_requires("portable")
    def test_a_portable_class_computes_the_same(self, subject: Subject, record_property: Any) -> None:
        """The model written in another class has the same logits."""
        for written in subject.portable:
            error = prove_portable(subject.exact, written, subject.token_ids, FLOAT64)
            record_property(f"relative_error as {written.model_type}", error)

    @pytest.mark.slicecli_requires("portable")
    def test_a_slice_in_a_portable_class_is_the_same_slice(self, subject: Subject, record_property: Any) -> None:
        """A slice written in another class has the predicted parameters and the logits of one in the family's own."""
        ids = subject.token_ids.cpu()
        expected = logits(subject.loaded("refit"), ids)
        for written in subject.portable:
            if subject.dim not in written.legal_dims():
                continue
            folder = subject.sliced("refit", write_as=written.model_type)
            made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            assert made.config.model_type == written.model_type
            assert sum(value.numel() for value in made.parameters()) == written.parameters(subject.dim)
            error = relative_error(logits(made, ids), expected)
            record_property(f"relative_error as {written.model_type}", error)
            assert error <= FLOAT32, f"written as {written.model_type}, the logits of a slice change by {error:.1e}"

    # the dims

    def test_illegal_dims_are_refused_with_the_legal_neighbours(self, subject: Subject) -> None:
        """A refusal names the nearest legal dims."""
        dimensions = subject.dimensions
        legal = dimensions.legal_dims()
        for dim in (-1, 0, dimensions.hidden_size, dimensions.hidden_size + 1, *_between(legal)):
            with pytest.raises(RequestError) as refused:
                dimensions.check_dim(dim)
            for neighbour in dimensions.nearest_legal(dim):
                assert str(neighbour) in str(refused.value), f"the refusal of dim {dim} does not name {neighbour}"
        assert legal, "no dim at all is legal"

    @pytest.mark.slicecli_requires("stock")
    def test_the_config_class_takes_the_legal_dims_and_no_others(self, subject: Subject) -> None:
        """The rule on dims is that of the config class."""
        legal = subject.dimensions.legal_dims()
        for dim in (legal[0], legal[-1], subject.dim):
            _resized(subject, dim)
        for dim in [dim for dim in _between(legal)[:1] if dim % subject.dimensions.config_multiple]:
            try:
                _resized(subject, dim)
            except Exception:  # config classes raise what they like
                continue
            pytest.fail(f"the config class takes a hidden size of {dim}, which dim_divisors rules out")

    # slices

    def test_a_wider_slice_is_closer_to_the_model(self, subject: Subject, record_property: Any) -> None:
        """A wider refitted slice is closer to the model."""
        width = subject.dimensions.hidden_size
        dims = [subject.dimensions.nearest_legal(width * part // 8)[0] for part in (4, 6, 7)]
        slices, _ = slice_in_memory(subject.model, subject.dimensions, subject.token_ids, *dims)
        _check_order(subject, dims, slices, record_property)

    @needs_shortcuts
    def test_a_wider_published_slice_is_closer_to_the_model(self, subject: Subject, record_property: Any) -> None:
        """A wider slice by the published method is closer to the model."""
        sizes = PublishedSizes(subject.dimensions)
        dims = [subject.dimensions.hidden_size * part // 8 for part in (4, 6, 7)]
        slices = [
            published_in_memory(subject.model, subject.dimensions, subject.token_ids, sizes.schedule(dim))
            for dim in dims
        ]
        _check_order(subject, dims, slices, record_property)

    @needs_shortcuts
    def test_the_published_method_is_proved_on_a_small_model(self, subject: Subject) -> None:
        """Blocks with shortcuts compute the same as the family's blocks, and run at a smaller width."""
        prove_shortcuts(subject.adapter, subject.model.config, slices_head(subject.dimensions, None))

    @needs_shortcuts
    @pytest.mark.parametrize("orientation", ["pca", "random"])
    def test_the_published_method_at_full_width_leaves_logits_unchanged(
        self, subject: Subject, orientation: Orientation, record_property: Any
    ) -> None:
        """Rotating the stream at every norm site changes nothing, and blocks with shortcuts compute the same."""
        schedule = Schedule.constant(subject.dimensions, subject.dimensions.hidden_size)
        turned = published_in_memory(subject.exact, subject.dimensions, subject.token_ids, schedule, orientation)
        error = relative_error(logits(turned, subject.token_ids), logits(subject.exact, subject.token_ids))
        record_property("relative_error", error)
        assert error <= FLOAT64, f"with shortcuts the logits change by {error:.1e}"

    # the channels of MLPs

    def test_channels_can_be_removed_or_the_declaration_says_why_not(self, subject: Subject) -> None:
        """Every MLP has a width of `mlp_widths`, unless that is empty or `mlp_obstacle` gives a reason."""
        if subject.adapter.mlp_widths and not subject.adapter.why_whole_mlps(subject.fields):
            assert not subject.dimensions.mlp_obstacle, subject.dimensions.mlp_obstacle

    @pytest.mark.slicecli_requires("mlp")
    def test_channels_that_add_nothing_are_removed_without_loss(self, subject: Subject, record_property: Any) -> None:
        """Every parameter with an axis of MLP channels is declared, and how it arranges them."""
        error = prove_channels(subject.exact, subject.dimensions, subject.token_ids, FLOAT64)
        record_property("relative_error", error)

    @pytest.mark.slicecli_requires("mlp")
    def test_more_channels_are_closer_to_the_model(self, subject: Subject, record_property: Any) -> None:
        """At the hidden size of the model, and with all channels there is no loss."""
        width, size = subject.dimensions.hidden_size, subject.dimensions.mlp_size
        dense, errors = logits(subject.exact, subject.token_ids), {}
        for mlp_dim in (size // 2, size * 7 // 8, size):
            (made,), _ = slice_in_memory(
                subject.exact,
                subject.dimensions,
                subject.token_ids,
                width,
                mlp_dim=None if mlp_dim == size else mlp_dim,
            )
            errors[mlp_dim] = relative_error(logits(made, subject.token_ids), dense)
        record_property("relative_errors", errors)
        assert list(errors.values()) == sorted(errors.values(), reverse=True), f"relative errors are {errors}"
        assert errors[size] <= FLOAT64

    @pytest.mark.slicecli_requires("mlp")
    def test_a_slice_with_fewer_channels_has_the_parameters_that_were_predicted(self, subject: Subject) -> None:
        """The predicted number of parameters equals that of the loaded model, and no tensor is missing or unused."""
        predicted = subject.dimensions.with_mlp_dim(subject.mlp_dim).parameters(subject.dim)
        folder = subject.sliced("refit", has_fewer_channels=True)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        for kind, names in report.items():
            assert not names, f"{kind}: {sorted(names)}"
        assert sum(value.numel() for value in model.parameters()) == predicted

    @pytest.mark.slicecli_requires("mlp")
    def test_a_slice_with_fewer_channels_generates(self, subject: Subject) -> None:
        """Greedy tokens are the same with a cache and without."""
        ids, loaded = subject.token_ids[:3, :8].cpu(), subject.loaded("refit", has_fewer_channels=True)
        cached, plain = (_generate(loaded, ids, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain), f"with cache {cached.tolist()}, without {plain.tolist()}"

    @methods
    def test_a_slice_has_the_parameters_that_were_predicted(self, subject: Subject, method: Method) -> None:
        """The predicted number of parameters equals that in the files."""
        predicted, loaded = subject.sizes(method).parameters(subject.dim), subject.loaded(method)
        assert sum(value.numel() for value in loaded.parameters()) == predicted
        stored = sum(
            tensor.numel()
            for file in subject.sliced(method).glob("*.safetensors")
            for tensor in load_file(file).values()
        )
        parameters = {name for name, _ in loaded.named_parameters(remove_duplicate=False)}
        buffers = sum(value.numel() for name, value in loaded.state_dict().items() if name not in parameters)
        assert stored == predicted + buffers

    @methods
    def test_a_slice_loads_whole(self, subject: Subject, method: Method) -> None:
        """No tensor is missing or unused, and custom code is stored only if needed."""
        folder = subject.sliced(method)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True
        )
        for kind, names in report.items():
            assert not names, f"{kind}: {sorted(names)}"
        assert isinstance(model, type(subject.model))
        has_code = method == "slicegpt" or subject.dimensions.layout == "custom-code"
        assert (type(model) is type(subject.model)) == (not has_code)
        assert bool(list(folder.glob("*.py"))) == has_code
        assert ("auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))) == has_code

    @methods
    def test_a_slice_loads_without_its_head(self, subject: Subject, method: Method) -> None:
        """The base model of a slice gives the same hidden states as the model with the head."""
        base, report = transformers.AutoModel.from_pretrained(
            subject.sliced(method), dtype=torch.float32, output_loading_info=True
        )
        assert not report["missing_keys"]
        ids, loaded = subject.token_ids.cpu(), subject.loaded(method)
        with torch.no_grad():
            alone, under = (one.eval()(input_ids=ids).last_hidden_state for one in (base, loaded.base_model))
        assert relative_error(alone, under) < 1e-5

    @methods
    def test_saving_and_loading_a_slice_keeps_it(self, subject: Subject, method: Method, tmp_path: Path) -> None:
        """Saving and loading changes no weight; saving again changes no file."""
        loaded = subject.loaded(method)
        loaded.save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
        written = loaded.state_dict()
        assert {name for name, value in again.state_dict().items() if not torch.equal(value, written[name])} == set()
        ids = subject.token_ids.cpu()
        # not to the bit: where a file's tensors lie in memory changes how products are rounded
        assert relative_error(logits(again, ids), logits(loaded, ids)) < 1e-5
        again.save_pretrained(tmp_path / "third")
        first, second = (
            {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("again", "third")
        )
        assert first == second

    @methods
    def test_generation_with_cache_equals_generation_without(self, subject: Subject, method: Method) -> None:
        """Greedy tokens are the same either way."""
        ids, loaded = subject.token_ids[:3, :8].cpu(), subject.loaded(method)
        cached, plain = (_generate(loaded, ids, use_cache=use) for use in (True, False))
        assert torch.equal(cached, plain), f"with cache {cached.tolist()}, without {plain.tolist()}"

    @methods
    def test_a_padded_batch_equals_single_rows(self, subject: Subject, method: Method) -> None:
        """Left padding does not change the result of the padded rows."""
        loaded = subject.loaded(method)
        rows = [subject.token_ids[index, : 5 + 3 * index].cpu() for index in range(3)]
        longest = max(len(row) for row in rows)
        ids = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.int64), row]) for row in rows])
        mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
        together = _generate(loaded, ids, attention_mask=mask)[:, longest:]
        for index, row in enumerate(rows):
            alone = _generate(loaded, row[None])[0, len(row) :]
            assert torch.equal(together[index], alone), f"row {index}: padded {together[index]}, alone {alone}"

    @methods
    def test_a_slice_runs_in_bfloat16(self, subject: Subject, method: Method, record_property: Any) -> None:
        """In half precision the result is about the same."""
        half = transformers.AutoModelForCausalLM.from_pretrained(subject.sliced(method), dtype=torch.bfloat16).eval()
        ids = subject.token_ids.cpu()
        error = relative_error(logits(half, ids).float(), logits(subject.loaded(method), ids))
        record_property("relative_error", error)
        assert error < 0.1, f"in bfloat16 the logits differ by {error:.2f}"


def compare_operations(model: Any, dimensions: Dimensions, cost: Cost, token_ids: torch.Tensor) -> None:
    """Compare estimated operations with those that torch counts in the products of matrices.

    Args:
        model: The model, dense or sliced.
        dimensions: Sizes of the dense model.
        cost: Its cost in float32, of one sequence as long as the tokens.
        token_ids: Tokens of one sequence, shape (1, sequence length).
    """
    length = token_ids.shape[1]
    windows = [dimensions.window(block) or length for block in range(dimensions.blocks)]
    # the plain attention multiplies the later tokens too, and masks them
    attended = sum(min(position, window) for position in range(1, length + 1) for window in windows)
    masked = 4 * dimensions.heads * dimensions.head_dim * (dimensions.blocks * length**2 - attended)
    cache = transformers.DynamicCache(config=model.config)
    prefill = _counted_operations(model, token_ids)
    _counted_operations(model, token_ids[:, :-1], cache)
    decode = _counted_operations(model, token_ids[:, -1:], cache)
    assert length * cost.flops_per_token_prefill == pytest.approx(prefill - masked, rel=1e-12)
    assert cost.flops_per_token_decode == decode


def _counted_operations(model: Any, token_ids: torch.Tensor, cache: Any = None) -> int:
    """Return the operations of a forward, without those that turn positions into angles; a cache is filled."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # attention in products that the counter knows
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(token_ids, **_with_cache(model, cache))
    rotations = [name for name, module in model.named_modules() if "Rotary" in type(module).__name__]
    counts = {name.partition(".")[2]: sum(count.values()) for name, count in counter.get_flop_counts().items()}
    return counter.get_total_flops() - sum(counts.get(name, 0) for name in rotations)


def _with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments that give a model a cache; newer versions of transformers have another name for it."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache, "use_cache": cache is not None}


def _check_order(subject: Subject, dims: list[int], slices: list[Any], record_property: Any) -> None:
    """Check that of slices in ascending order of width each is closer to the model than the one before."""
    dense = logits(subject.model, subject.token_ids)
    errors = [relative_error(logits(made, subject.token_ids), dense) for made in slices]
    record_property("relative_errors", dict(zip(dims, errors, strict=True)))
    assert errors == sorted(errors, reverse=True), f"relative errors at dims {dims} are {errors}"


def _resized(subject: Subject, size: int) -> Any:
    """Return the config with another hidden size."""
    fields = subject.model.config.to_dict() | subject.dimensions.sliced_fields(size)
    return type(subject.model.config).from_dict(fields)


def _between(legal: range) -> list[int]:
    """Return dims inside the range of the legal ones that are not legal."""
    return [dim for dim in range(legal[0] + 1, legal[-1]) if dim not in legal][:2] if legal else []


def _generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Continue rows greedily; none ends early."""
    options = {"attention_mask": torch.ones_like(ids), **options}
    with torch.no_grad():
        made: torch.Tensor = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **options
        )
    return made


@contextmanager
def _registered(adapter: Adapter) -> Iterator[None]:
    """Let the engine find a declaration that no installed plugin registers, for a while."""
    adapters = plugins().adapters
    before = dict(adapters)
    for name, other in before.items():
        if set(other.model_types) & set(adapter.model_types):
            del adapters[name]
    adapters[adapter.name] = adapter
    try:
        yield
    finally:
        adapters.clear()
        adapters.update(before)
