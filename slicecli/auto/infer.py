"""From an observed run to a declaration, and its proof.

The run is that of a tiny random model of the same config class. The stream is what enters the first block. Going
through a block's norms in order, the stream that a norm sees must be the one before plus fixed multiples of what
some modules returned: those modules are writers, and what saw the norm's output are readers. Sizes are told apart by
value, because those of the tiny model all differ (`slicecli.tiny`); what depends on the config is found by
changing the config. Whatever cannot be explained ends the inference with a sentence.

A declaration that was found is then proved: every parameter is accounted for, exactly those grow with the hidden
size that are said to, and a rotation of the stream changes nothing (`slicecli.proof`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from slicecli.adapters import Adapter, Block, Branch, Embedding, Experts, Kept, Linear, Norm
from slicecli.auto.observe import Call, Observation, observe
from slicecli.errors import SlicecliError, UnsupportedModelError, reason_of
from slicecli.proof import prove_accounting, prove_refit, prove_rotation
from slicecli.slicing.moments import normalise
from slicecli.tiny import HEAD_DIM, SIZES, random_model, tiny_config

__all__ = ["Inference", "NotInferredError", "infer_adapter", "tiny_like"]

TOLERANCE = 1e-9
ROWS, LENGTH = 3, 12
# distinct values for epsilons, so that a norm's tells which field it comes from
EPSILON_STEP = 0.0037
FIXED_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)
CHECKS = ("blocks", "embeddings", "norms and branches", "parameters", "layout", "proof")


class NotInferredError(UnsupportedModelError):
    """No declaration of the model could be inferred and proved.

    Attributes:
        check: The check that failed.
        found: What had been found until then, by name.
    """

    def __init__(self, cause: str, check: str, found: Mapping[str, Any]) -> None:
        super().__init__(cause, "Describe the family in a plugin: `slicecli adapters --scaffold` and docs/plugins.md.")
        self.check = check
        self.found = dict(found)


@dataclass(frozen=True)
class Inference:
    """A declaration that was inferred and proved.

    Attributes:
        adapter: The declaration.
        error: Relative error of the logits after a rotation of a tiny model, in float64.
        checks: The checks that it passed.
    """

    adapter: Adapter
    error: float
    checks: tuple[str, ...] = CHECKS


class _Unexplained(Exception):
    """Something that was seen does not fit any declaration."""


def infer_adapter(config: Any, trust_remote_code: bool = False) -> Inference:
    """Infer the declaration of a model's family from its config, and prove it on a tiny random model.

    Args:
        config: The transformers config; no weights are read.
        trust_remote_code: Whether code from the model's repository may run.

    Raises:
        NotInferredError: Something about the model does not fit a declaration, or the proof fails.
    """
    inferring = _Inferring(config, trust_remote_code)
    check = CHECKS[0]
    try:
        for check in CHECKS:
            getattr(inferring, f"check_{check.replace(' ', '_')}")()
    except _Unexplained as reason:
        raise _not_inferred(config, check, str(reason), inferring.found) from None
    except SlicecliError as error:
        raise _not_inferred(config, check, error.cause, inferring.found) from error
    except Exception as error:  # a model of any family is built and run with sizes nobody tried
        raise _not_inferred(config, check, f"{type(error).__name__}: {reason_of(error)}", inferring.found) from error
    return Inference(inferring.adapter, inferring.error)


def _not_inferred(config: Any, check: str, reason: str, found: Mapping[str, Any]) -> NotInferredError:
    return NotInferredError(
        f"No adapter is known for models of type {config.model_type!r}, and none could be inferred ({check}): "
        f"{reason.rstrip('.')}.",
        check,
        found,
    )


def tiny_like(config: Any, has_head_dim: bool, **changes: Any) -> Any:
    """Return a tiny config of the same class, with epsilons and multipliers that can be told apart.

    Args:
        config: The config.
        has_head_dim: Whether the heads get a width of their own.
        **changes: Fields to set besides.

    Raises:
        SourceError: The class refuses small sizes.
    """
    return tiny_config(config, has_head_dim, **(_distinct_floats(config) | changes))


def _distinct_floats(config: Any) -> dict[str, float]:
    """Return values for the epsilons and multipliers of a config by which they can be told apart."""
    floats = sorted(name for name, value in config.to_dict().items() if isinstance(value, float))
    epsilons = [name for name in floats if "eps" in name]
    multipliers = [name for name in floats if "multiplier" in name]
    values = {name: EPSILON_STEP * (index + 1) for index, name in enumerate(epsilons)}
    return values | {name: 0.5 + 0.11 * index for index, name in enumerate(multipliers)}


def _shapes(config: Any, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a config's parameters, without memory for them."""
    from slicecli.source import empty_model

    return {name: tuple(value.shape) for name, value in empty_model(config, trust_remote_code).named_parameters()}


class _Inferring:
    """The inference under way: each check adds to what is found, or ends it.

    Attributes:
        found: What has been found so far, for people.
    """

    adapter: Adapter
    error: float

    def __init__(self, config: Any, trust_remote_code: bool) -> None:
        self._config = config
        self._trusted = trust_remote_code
        self.found: dict[str, Any] = {}

    def check_blocks(self) -> None:
        """Build the tiny model, run it, and find the list of blocks, the final norm and the head."""
        self._ids = torch.randint(2, SIZES["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        try:
            self._seen = self._run_tiny(has_head_dim=True)
        except Exception:  # a class that ties the heads' width to the hidden size fails in ways of its own
            self._seen = self._run_tiny(has_head_dim=False)
        self._model = self._seen.model
        self._width = int(self._tiny.hidden_size)
        count = int(self._tiny.num_hidden_layers)
        lists = [
            path
            for path, module in self._model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count and f"{path}.0" in self._seen.calls
        ]
        if not lists:
            raise _Unexplained(f"the model has no list of {count} blocks")
        self._blocks = lists[0]
        self.found["blocks"] = self._blocks
        self._block_calls = [self._seen.calls[f"{self._blocks}.{index}"] for index in range(count)]
        for call in self._block_calls:
            if call.entering is None or call.entering.shape[-1] != self._width or call.leaving is None:
                raise _Unexplained(f"{call.path} does not take and return a stream of {self._width} numbers")
        for before, after in itertools.pairwise(self._block_calls):
            if not _equal(before.leaving, after.entering):
                raise _Unexplained(f"what leaves {before.path} is not what enters {after.path}")
        self._find_head()

    def _run_tiny(self, has_head_dim: bool) -> Observation:
        """Build and run a tiny model."""
        self._has_head_dim = has_head_dim
        self._tiny = tiny_like(self._config, has_head_dim)
        model = random_model(self._tiny, dtype="float64", trust_remote_code=self._trusted)
        sizes = {size for parameter in model.parameters() for size in parameter.shape}
        if has_head_dim and HEAD_DIM * SIZES["num_attention_heads"] not in sizes:
            raise _Unexplained("the class takes no notice of head_dim")
        return observe(model, self._ids)

    def _find_head(self) -> None:
        head = self._model.get_output_embeddings()
        call = next((call for call in self._seen.calls.values() if call.module is head), None)
        if call is None:
            raise _Unexplained("the model has no head that is called")
        linear = self._as_linear(call)
        if linear is None:
            raise _Unexplained(f"the head {call.path} is not a linear map")
        self._head = dataclasses.replace(linear, path=call.path, width="vocab_size")
        self.found["head"] = self._head.path
        outside = [c for path, c in self._seen.calls.items() if not path.startswith(f"{self._blocks}.")]
        norms = [
            c for c in outside if _equal(c.entering, self._block_calls[-1].leaving) and _equal(c.leaving, call.entering)
        ]
        if not norms:
            raise _Unexplained(f"no norm lies between the last block and {call.path}")
        self._final_norm = norms[0]
        self._norm = self._classify_norm(norms[0])
        if self._norm is None:
            raise _Unexplained(f"{norms[0].path} is neither an RMSNorm nor a LayerNorm")
        self.found["final_norm"], self.found["norm"] = norms[0].path, str(self._norm)

    def check_embeddings(self) -> None:
        """Find the tables that add into the stream, and what multiplies them."""
        tables = [
            call
            for path, call in self._seen.calls.items()
            if isinstance(call.module, nn.Embedding)
            and not path.startswith(f"{self._blocks}.")
            and call.leaving is not None
            and call.leaving.shape[-1] == self._width
        ]
        self.found["embeddings"] = [call.path for call in tables]
        scale = self._embedding_scale(self._seen, self._block_calls[0], [call.path for call in tables])
        wider = self._wider()
        other = observe(random_model(wider, dtype="float64", trust_remote_code=self._trusted), self._ids)
        scale_of_other = self._embedding_scale(other, other.calls[f"{self._blocks}.0"], [call.path for call in tables])
        growth = scale_of_other / scale
        if abs(growth - math.sqrt(2)) < 1e-6:
            self._is_scaled = True
        elif abs(growth - 1) < 1e-6:
            self._is_scaled = False
        else:
            raise _Unexplained("what multiplies the embeddings depends on the hidden size, and not as its root")
        self._tables = tuple(
            Embedding(call.path, *self._rows(call.module.weight.shape[0], call.path)) for call in tables
        )

    def _embedding_scale(self, seen: Observation, first: Call, paths: Sequence[str]) -> float:
        """Return c with: stream = c x sum of the tables' rows."""
        stream = first.entering
        assert stream is not None
        total = torch.zeros_like(stream)
        for path in paths:
            made = seen.calls[path].leaving
            assert made is not None
            # the rows themselves, because an embedding may scale what it returns; positions are looked up once
            total += _rows_behind(seen.calls[path].module.weight.detach(), made).repeat(len(stream) // len(made), 1)
        scale = float((stream * total).sum() / total.square().sum()) if paths else 0.0
        if not paths or not _close(stream, scale * total):
            raise _Unexplained(
                "the stream that enters the first block is not a multiple of the sum of "
                f"{', '.join(paths) or 'any tables'}: something changes the embeddings on their way"
            )
        return scale

    def _wider(self) -> Any:
        """Return the tiny config with twice the hidden size."""
        return tiny_like(self._config, self._has_head_dim, **{self._own("hidden_size"): 2 * self._width})

    def _rows(self, count: int, path: str) -> tuple[str, int]:
        if path == self._path_of(self._model.get_input_embeddings()):
            return "vocab_size", 0
        base = SIZES["max_position_embeddings"]
        if 0 <= count - base <= 8:
            return "max_position_embeddings", count - base
        raise _Unexplained(f"no config field gives the {count} rows of {path}")

    def _path_of(self, module: nn.Module) -> str:
        return next(path for path, other in self._model.named_modules() if other is module)

    def check_norms_and_branches(self) -> None:
        """Explain every block as norms, readers and writers."""
        blocks = [self._explain_block(call) for call in self._block_calls]
        self.found["block"] = _describe_block(blocks[0])
        if any(block != blocks[0] for block in blocks[1:]):
            raise _Unexplained("its blocks differ from one another")
        self._block = blocks[0]

    def _explain_block(self, block: Call) -> Block:
        calls = self._seen.below(block.path)
        norms = {call.path: call for call in calls if self._classify_norm(call) == self._norm}
        leaves = [
            call
            for call in calls
            if call.path not in norms
            and call.leaving is not None
            and call.leaving.shape == block.entering.shape
            and any(True for _ in call.module.parameters(recurse=False))
        ]
        stream, group, steps = block.entering, [], []
        for norm in norms.values():
            if _equal(norm.entering, stream):
                group.append(norm)
                continue
            between = [call for call in leaves if call.order < norm.order and call not in _flat(steps)]
            written = _explain(norm.entering - stream, between)
            if written is not None and group:
                steps.append((group, written))
                stream, group = norm.entering, [norm]
        rest = block.leaving - stream
        remaining = [call for call in leaves if call not in _flat(steps)]
        written = _explain(rest, remaining)
        if written is None:
            written = self._explain_gated(rest, remaining)
        if not group or written is None or not written:
            self._complain(block, rest, norms, group, remaining)
        steps.append((group, written))
        return self._block_of(block, steps)

    def _explain_gated(self, rest: torch.Tensor, leaves: Sequence[Call]) -> list[tuple[Call, float, str]] | None:
        """Explain a sum in which one writer is multiplied by the sigmoid of a one-row linear."""
        gates = [
            call
            for path, call in self._seen.calls.items()
            if call.leaving is not None and call.leaving.shape == (len(rest), 1) and isinstance(call.module, nn.Linear)
        ]
        for gate, writer in itertools.product(gates, leaves):
            scaled = dataclasses.replace(writer, leaving=torch.sigmoid(gate.leaving) * writer.leaving)
            written = _explain(rest, [scaled if call is writer else call for call in leaves])
            if written is not None and any(call is scaled for call, _, _ in written):
                return [(writer, c, gate.path) if call is scaled else (call, c, "") for call, c, _ in written]
        return None

    def _complain(
        self,
        block: Call,
        rest: torch.Tensor,
        norms: Mapping[str, Call],
        group: Sequence[Call],
        leaves: Sequence[Call],
    ) -> NoReturn:
        """Say why a block cannot be explained."""
        if not group:
            raise _Unexplained(f"no norm of {block.path} sees the stream as it enters")
        through = [norm for norm in norms.values() if norm not in group]
        passed = _explain(rest, [*leaves, *through])
        names = [call.path for call, _, _ in passed or () if call in through]
        if names:
            raise _Unexplained(
                f"what {block.path} adds to the stream passes through {' and '.join(names)}, and a norm's weight does "
                "not commute with a rotation"
            )
        raise _Unexplained(f"what {block.path} adds to the stream is not the sum of what its linear maps return")

    def _block_of(self, block: Call, steps: Sequence[tuple[list[Call], list[tuple[Call, float, str]]]]) -> Block:
        prefix = f"{block.path}."
        is_parallel = len(steps) == 1 and len({_head_of(c.path, prefix) for c, _, _ in steps[0][1]}) > 1
        branches: list[Branch] = []
        for group, written in steps:
            if not is_parallel and len(group) != 1:
                raise _Unexplained(f"{', '.join(norm.path for norm in group)} all read the same stream")
            branches += self._branches(prefix, group, written)
        if len(steps) > 1 and len(branches) != len(steps):
            raise _Unexplained(f"{block.path} is neither sequential nor parallel")
        if any(not branch.module for branch in branches[:-1]):
            raise _Unexplained(f"the branches of {block.path} do not each lie in a module")
        return Block(tuple(branches), is_parallel)

    def _branches(self, prefix: str, norms: Sequence[Call], written: Sequence[tuple[Call, float, str]]) -> list[Branch]:
        """Declare the branches of one step, told apart by the module of the block in which they lie."""
        below = self._seen.below(prefix[:-1])
        branches = []
        for module in dict.fromkeys(_head_of(call.path, prefix) for call, _, _ in written):
            mine = [(call, c, gate) for call, c, gate in written if _head_of(call.path, prefix) == module]
            multipliers = {round(c, 9) for _, c, _ in mine}
            found: list[tuple[str, Linear]] = []
            experts: Experts | None = None
            for call in below:
                norm = next((n for n in norms if _equal(call.entering, n.leaving)), None)
                is_leaf = any(True for _ in call.module.parameters(recurse=False))
                if norm is None or not is_leaf or _head_of(call.path, prefix) != module:
                    continue
                if any(parameter.dim() == 3 for parameter in call.module.parameters(recurse=False)):
                    experts = self._as_experts(call, prefix)
                    found.append((norm.path, Linear("", "1")))
                    continue
                linear = self._as_linear(call)
                if linear is None:
                    raise _Unexplained(f"{call.path} reads the stream and is not a linear map")
                path = call.path.removeprefix(prefix)
                bias = self._bias_switch(call.path, bool(linear.bias))
                found.append((norm.path, dataclasses.replace(linear, path=path, bias=bias)))
            if not found or len({norm for norm, _ in found}) != 1 or len(multipliers) != 1:
                raise _Unexplained(f"the branch {module or prefix[:-1]} has no single norm and multiplier")
            writers = [self._writer(call, gate, prefix) for call, _, gate in mine if not _is_experts(call.module)]
            if len(writers) > 1:
                raise _Unexplained(f"the branch {module} has several writers")
            branches.append(
                Branch(
                    norm=found[0][0].removeprefix(prefix),
                    readers=tuple(reader for _, reader in found if reader.path),
                    writer=writers[0] if writers else None,
                    module=module,
                    multiplier=self._multiplier(multipliers.pop()),
                    experts=experts,
                )
            )
        return branches

    def _writer(self, call: Call, gate: str, prefix: str) -> Linear:
        linear = self._as_linear(call, is_writer=True)
        if linear is None:
            raise _Unexplained(f"{call.path} writes to the stream and is not a linear map")
        bias = self._bias_switch(call.path, bool(linear.bias))
        return dataclasses.replace(
            linear, path=call.path.removeprefix(prefix), bias=bias, gate=gate.removeprefix(prefix)
        )

    def _as_linear(self, call: Call, is_writer: bool = False) -> Linear | None:
        """Return a call's module as a linear map, if it is one; the bias as it is here."""
        weight, bias = getattr(call.module, "weight", None), getattr(call.module, "bias", None)
        if call.entering is None or call.leaving is None or weight is None or weight.dim() != 2:
            return None
        for is_transposed in (False, True):
            matrix = weight.mT if is_transposed else weight
            if matrix.shape != (call.leaving.shape[-1], call.entering.shape[-1]):
                continue
            made = call.entering @ matrix.mT + (0 if bias is None else bias)
            if _close(made, call.leaving):
                size = call.entering.shape[-1] if is_writer else call.leaving.shape[-1]
                return Linear(call.path, self._size_name(size, call.path), bias is not None, is_transposed)
        return None

    def _as_experts(self, call: Call, prefix: str) -> Experts:
        three = {name: value for name, value in call.module.named_parameters(recurse=False) if value.dim() == 3}
        readers = [name for name, value in three.items() if value.shape[2] == self._width]
        writers = [name for name, value in three.items() if value.shape[1] == self._width]
        if len(three) != 2 or len(readers) != 1 or len(writers) != 1:
            raise _Unexplained(f"{call.path} does not hold its experts in two tensors (experts, outputs, inputs)")
        reader, writer = three[readers[0]], three[writers[0]]
        return Experts(
            module=call.path.removeprefix(prefix),
            count=self._size_name(reader.shape[0], call.path),
            reader_width=self._size_name(reader.shape[1], call.path),
            writer_width=self._size_name(writer.shape[2], call.path),
            reader=readers[0],
            writer=writers[0],
        )

    def _classify_norm(self, call: Call) -> Norm | None:
        """Return what kind of norm over the stream a call is, if it is one."""
        if call.entering is None or call.leaving is None:
            return None
        if call.entering.shape != call.leaving.shape or call.entering.shape[-1] != self._width:
            return None
        weight, bias = getattr(call.module, "weight", None), getattr(call.module, "bias", None)
        if any(value is not None and value.shape != (self._width,) for value in (weight, bias)):
            return None
        names = {float(getattr(self._tiny, name)): name for name in _distinct_floats(self._config) if "eps" in name}
        epsilons: list[tuple[float, str | float]] = [*names.items(), *((value, value) for value in FIXED_EPSILONS)]
        kinds: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
        for kind, (value, epsilon) in itertools.product(kinds, epsilons):
            normal = normalise(call.entering, value, kind == "layer")
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                made = normal if weight is None else normal * (weight + offset)
                if _close(made if bias is None else made + bias, call.leaving):
                    return Norm(kind, epsilon, weight is not None, bias is not None, offset)
        return None

    def _size_name(self, size: int, path: str) -> str:
        """Return the name of the size that has a value in the tiny model."""
        heads = SIZES["num_attention_heads"]
        head_dim = HEAD_DIM if self._has_head_dim else self._width // heads
        groups = self._value("num_key_value_heads") or heads
        known = {
            "query": heads * head_dim,
            "key_value": groups * head_dim,
            "query_key_value": (heads + 2 * groups) * head_dim,
            "head_dim": head_dim,
            "vocab_size": SIZES["vocab_size"],
        }
        fields = {name: value for name, value in self._tiny.to_dict().items() if type(value) is int and value > 8}
        fields |= {name: SIZES[name] for name in ("num_experts", "num_local_experts") if name in self._tiny.to_dict()}
        known |= {self._usual(name): value for name, value in fields.items() if self._usual(name) not in known}
        for factor in (1, 2, 3, 4):
            for name, value in known.items():
                # a width that is the hidden size itself would not be told from the stream
                if factor * value == size and (factor > 1 or name != "hidden_size"):
                    return name if factor == 1 else f"{factor}*{name}"
        if size <= 8:
            return "num_attention_heads" if size == heads else str(size)
        raise _Unexplained(f"no config field gives the size {size} of {path}")

    def _value(self, name: str) -> Any:
        return getattr(self._tiny, name, None)

    def _usual(self, name: str) -> str:
        """Return the usual name of a field of this config."""
        own = {own: usual for usual, own in (getattr(self._tiny, "attribute_map", None) or {}).items()}
        return str(own.get(name, name))

    def _own(self, name: str) -> str:
        """Return this config's own name of a field."""
        return str((getattr(self._tiny, "attribute_map", None) or {}).get(name, name))

    def _multiplier(self, value: float) -> str:
        """Return the config field that multiplies a branch."""
        if abs(value - 1) < TOLERANCE:
            return ""
        floats = {name: field for name, field in self._tiny.to_dict().items() if isinstance(field, float)}
        names = [name for name, field in floats.items() if abs(field - value) < TOLERANCE]
        if not names:
            raise _Unexplained(f"a branch is multiplied by {value:.6g}, which no config field gives")
        return names[0]

    def _bias_switch(self, path: str, has_bias: bool) -> bool | str:
        """Return the config field that switches a linear's bias on and off, or whether it has one."""
        for name, switched in self._switched_biases().items():
            if path in switched:
                return name
        return has_bias

    def _switched_biases(self) -> dict[str, set[str]]:
        """Return, by config field, the modules whose bias comes or goes with it."""
        if not hasattr(self, "_switches"):
            self._switches: dict[str, set[str]] = {}
            here = _biased(_shapes(self._tiny, self._trusted))
            for name, value in self._tiny.to_dict().items():
                if "bias" in name and isinstance(value, bool):
                    try:
                        other = tiny_like(self._config, self._has_head_dim, **{name: not value})
                        there = _biased(_shapes(other, self._trusted))
                    except SlicecliError:
                        continue
                    self._switches[name] = here ^ there
        return self._switches

    def check_parameters(self) -> None:
        """Account for every parameter: what is left in a block must not grow with the hidden size."""
        shapes = {name: tuple(value.shape) for name, value in self._model.named_parameters()}
        self._wider_shapes = _shapes(self._wider(), self._trusted)
        bare = self._declare(self._block)
        declared = set(bare.dimensions(self._tiny.to_dict()).stream_parameters())
        declared |= set(bare.dimensions(self._tiny.to_dict()).other_parameters())
        left = [name for name in shapes if name not in declared]
        prefix = f"{self._blocks}.0."
        kept = []
        for name in left:
            if not name.startswith(f"{self._blocks}."):
                raise _Unexplained(f"nothing explains the parameter {name}")
            if name.startswith(prefix):
                kept.append(Kept(name.removeprefix(prefix), self._size_name(math.prod(shapes[name]), name)))
        self._block = dataclasses.replace(self._block, kept=tuple(kept))
        self.found["block"] = _describe_block(self._block)
        self.adapter = self._declare(self._block)

    def check_layout(self) -> None:
        """Find the legal dims, and whether the family's own class can describe a slice."""
        own, divisors = self._own("hidden_size"), ()
        if self._refuses(**{own: self._width - 2}) and not self._refuses(**{own: self._width - 4}):
            divisors = ("num_attention_heads",)
        obstacle = ""
        dim = self._width - 2 * SIZES["num_attention_heads"]
        dimensions = self.adapter.dimensions(self._tiny.to_dict())
        try:
            fields = self._tiny.to_dict() | {own: dim, "head_dim": dimensions.head_dim, "tie_word_embeddings": False}
            sliced = _shapes(type(self._tiny).from_dict(fields), self._trusted)
        except Exception:  # config and model classes raise what they like
            obstacle = f"{type(self._config).__name__} refuses a head width that is not hidden size over heads."
        else:
            sizes = dimensions.stream_parameters()
            tied = [
                name for name, shape in sliced.items() if math.prod(shape) != math.prod(sizes.get(name, (0,))) * dim
            ]
            others = dimensions.other_parameters()
            tied = [name for name in tied if math.prod(sliced[name]) != math.prod(others.get(name, (0,)))]
            if tied:
                obstacle = f"its class takes the size of {tied[0]} from the hidden size."
        self.adapter = dataclasses.replace(self.adapter, dim_divisors=divisors, stock_obstacle=obstacle)
        self.found["layout"] = obstacle or "stock"

    def _refuses(self, **changes: Any) -> bool:
        fields = self._tiny.to_dict() | changes
        try:
            type(self._tiny).from_dict(fields)
        except Exception:  # config classes raise what they like
            return True
        return False

    def check_proof(self) -> None:
        """Prove the declaration on the tiny model."""
        dimensions = self.adapter.dimensions(self._tiny.to_dict())
        shapes = {name: tuple(value.shape) for name, value in self._model.named_parameters()}
        dimensions.require_declared(shapes)
        real = self.adapter.dimensions(self._config.to_dict())
        real.require_declared(_shapes(self._config, self._trusted))
        if self._has_head_dim:
            prove_accounting({self._width: shapes, 2 * self._width: self._wider_shapes}, dimensions)
        errors = [prove_rotation(self._model, dimensions, self._ids, TOLERANCE, seed) for seed in range(2)]
        self.error = max(*errors, prove_refit(self._model, dimensions, self._ids, TOLERANCE))

    def _declare(self, block: Block) -> Adapter:
        kind = type(self._config)
        usual = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "num_experts")
        names = {name: self._own(name) for name in usual if self._own(name) != name}
        assert self._norm is not None
        return Adapter(
            name=str(self._config.model_type),
            model_types=(str(self._config.model_type),),
            block=block,
            blocks=self._blocks,
            embeddings=self._tables,
            final_norm=self._final_norm.path,
            head=self._head,
            norm=self._norm,
            scales_embeddings_by_width=self._is_scaled,
            names=MappingProxyType(names),
            defaults=MappingProxyType(_defaults(kind, block, self._norm)),
        )


def _defaults(kind: type, block: Block, norm: Norm) -> dict[str, Any]:
    """Return the config class's own values of the fields that a declaration uses and a config may leave out."""
    used = {"num_key_value_heads", "head_dim", "tie_word_embeddings", norm.epsilon}
    for branch in block.branches:
        linears = [*branch.readers, *([branch.writer] if branch.writer else [])]
        used |= {branch.multiplier, *(linear.bias for linear in linears)}
    own = {field.name: field.default for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    return {
        name: own[name]
        for name in sorted(name for name in used if isinstance(name, str))
        if own.get(name) not in (None, False) and own[name] is not dataclasses.MISSING
    }


def _describe_block(block: Block) -> list[str]:
    """Describe a block in a line for each branch, for people."""
    lines = []
    for branch in block.branches:
        readers = [reader.path for reader in branch.readers]
        writers = [branch.writer.path] if branch.writer is not None else []
        if branch.experts is not None:
            readers.append(branch.experts.reader_path)
            writers.append(branch.experts.writer_path)
        times = f" times {branch.multiplier}" if branch.multiplier else ""
        lines.append(f"{branch.norm}: read by {', '.join(readers)}; written by {', '.join(writers)}{times}")
    if block.is_parallel:
        lines.append("in parallel")
    return lines + [f"kept: {kept.path}" for kept in block.kept]


def _explain(rest: torch.Tensor, calls: Sequence[Call]) -> list[tuple[Call, float, str]] | None:
    """Explain a change of the stream as fixed multiples of what modules returned; `None` if it is not.

    Returns:
        The modules whose multiple is not zero, with it (and no gate).
    """
    # a module that only hands on what one inside it returned explains nothing; the inner one ended first
    calls = [
        call for i, call in enumerate(calls) if not any(_equal(call.leaving, other.leaving) for other in calls[:i])
    ]
    if not calls:
        return None
    columns = torch.stack([call.leaving.flatten() for call in calls], dim=1)
    solution = torch.linalg.lstsq(columns, rest.flatten()[:, None]).solution.squeeze(1)
    if not _close(columns @ solution, rest.flatten()):
        return None
    return [(call, float(c), "") for call, c in zip(calls, solution, strict=True) if abs(float(c)) > 1e-9]


def _rows_behind(table: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Return the table's rows that an embedding returned, undoing a scale of its own."""
    direction = nn.functional.normalize(made, dim=-1) @ nn.functional.normalize(table, dim=-1).mT
    return table[direction.argmax(-1)]


def _flat(steps: Sequence[tuple[list[Call], list[tuple[Call, float, str]]]]) -> list[Call]:
    return [call for _, written in steps for call, _, _ in written]


def _head_of(path: str, prefix: str) -> str:
    """Return the module of the block in which a path lies; empty where it hangs on the block itself."""
    head, _, rest = path.removeprefix(prefix).partition(".")
    return head if rest else ""


def _is_experts(module: nn.Module) -> bool:
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _biased(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    return {name.removesuffix(".bias") for name in shapes if name.endswith(".bias")}


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and _close(one, other)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two float64 results are the same but for rounding."""
    if one.shape != other.shape:
        return False
    return float((one - other).detach().norm()) <= TOLERANCE * float(other.detach().norm())
