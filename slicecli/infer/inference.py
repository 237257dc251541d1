"""From an observed run to a declaration, and its proof.

The run is that of a tiny random model of the same config class. The stream is what enters the first block. Going
through a block's norms in order, the stream that a norm sees must be the one before plus fixed multiples of what
some modules returned: those modules are writers, and what saw the norm's output are readers. Whatever cannot be
explained so ends the inference with a sentence.

A declaration that was found is then proved: every parameter is accounted for, on the tiny model and on the real
config, exactly those grow with the hidden size that are said to, and neither a rotation of the stream nor a refit at
full width changes anything (`slicecli.proof.declaration`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import nn

from slicecli.adapters import Adapter, Block, Branch, Embedding, Experts, Linear, PassedThrough
from slicecli.checkpoint.meta_model import parameter_shapes
from slicecli.errors import NotInferredError, SlicecliError, UnsupportedModelError, reason_of
from slicecli.family.dimensions import Dimensions
from slicecli.family.schedule import slices_head
from slicecli.infer.explain import TOLERANCE, Written, classify_norm, explain_change, is_close, linear_form, rows_behind
from slicecli.infer.observe import Call, Observation, observe
from slicecli.infer.probe import ConfigProbe
from slicecli.proof.declaration import (
    prove_accounting,
    prove_channels,
    prove_refit,
    prove_rotation,
    prove_shortcuts,
    prove_tie,
)
from slicecli.proof.tiny import HEAD_DIM, SIZES, random_model

__all__ = ["Inference", "infer_adapter"]

ROWS, LENGTH = 3, 12
_OF_ATTENTION = ("query", "key_value", "query_key_value", "head_dim", "num_attention_heads")
CHECKS = ("blocks", "head", "embeddings", "branches", "parameters", "layout", "proof", "channels")


@dataclass(frozen=True)
class Inference:
    """A declaration that was inferred and proved.

    Attributes:
        error: The largest relative error of a tiny model's logits in the proof, in float64.
    """

    adapter: Adapter
    error: float
    checks: tuple[str, ...] = CHECKS


@dataclass(frozen=True)
class _Sublayer:
    """What reads the stream at one place, and what is then added to it."""

    norms: tuple[Call, ...]
    written: tuple[Written, ...]


def infer_adapter(config: Any, trust_remote_code: bool = False) -> Inference:
    """Infer the declaration of a model's family from its config, and prove it on a tiny random model."""
    inferring = _Inferring(config, trust_remote_code)
    check = CHECKS[0]
    try:
        for check in CHECKS:
            getattr(inferring, f"check_{check}")()
    except SlicecliError as error:
        raise _not_inferred(config, check, error.cause, inferring.found) from error
    except Exception as error:  # a model of any family is built and run with sizes nobody tried
        raise _not_inferred(config, check, f"{type(error).__name__}: {reason_of(error)}", inferring.found) from error
    return Inference(inferring.adapter, inferring.error)


def _not_inferred(config: Any, check: str, reason: str, found: Mapping[str, Any]) -> NotInferredError:
    return NotInferredError(
        f"No adapter serves models of type {config.model_type!r}, and none could be inferred ({check}): "
        f"{reason.rstrip('.')}.",
        check,
        found,
    )


class _Inferring:
    """The inference under way: each check adds to the adapter, or ends it.

    Attributes:
        found: What has been found so far, for people.
    """

    adapter: Adapter
    error: float

    def __init__(self, config: Any, trust_remote_code: bool) -> None:
        self._config = config
        self._trusted = trust_remote_code
        self._ids = torch.randint(2, SIZES["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        self.found: dict[str, Any] = {}

    # what is there

    def check_blocks(self) -> None:
        """Build and run the tiny model, and find the list of blocks."""
        try:
            self._probe, self._seen = self._run_tiny(has_head_dim=True)
        except Exception:  # a class that ties the heads' width to the hidden size fails in ways of its own
            self._probe, self._seen = self._run_tiny(has_head_dim=False)
        self._model, self._width = self._seen.model, self._probe.width
        count = int(self._probe.tiny.num_hidden_layers)
        lists = [
            path
            for path, module in self._model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count and f"{path}.0" in self._seen.calls
        ]
        if not lists:
            raise UnsupportedModelError(f"the model has no list of {count} blocks")
        self._blocks = lists[0]
        self.found["blocks"] = self._blocks
        self._block_calls = [self._seen.calls[f"{self._blocks}.{index}"] for index in range(count)]
        for call in self._block_calls:
            if call.entering.shape[-1] != self._width or call.leaving.shape != call.entering.shape:
                raise UnsupportedModelError(
                    f"{call.path} does not take and return a residual stream of width {self._width}"
                )
        for before, after in itertools.pairwise(self._block_calls):
            if not is_close(before.leaving, after.entering):
                raise UnsupportedModelError(f"the output of {before.path} is not the input of {after.path}")

    def _run_tiny(self, has_head_dim: bool) -> tuple[ConfigProbe, Observation]:
        probe = ConfigProbe(self._config, has_head_dim, self._trusted)
        model = random_model(probe.tiny, dtype="float64", trust_remote_code=self._trusted)
        sizes = {size for parameter in model.parameters() for size in parameter.shape}
        if has_head_dim and HEAD_DIM * SIZES["num_attention_heads"] not in sizes:
            raise UnsupportedModelError("the class ignores head_dim")
        return probe, observe(model, self._ids)

    def check_head(self) -> None:
        """Find the head and the norm before it."""
        head = self._model.get_output_embeddings()
        call = next((call for call in self._seen.calls.values() if call.module is head), None)
        if call is None:
            raise UnsupportedModelError("the model calls no head")
        form = linear_form(call)
        if form is None:
            raise UnsupportedModelError(f"the head {call.path} is not a linear map")
        self._head = Linear(call.path, "vocab_size", form.has_bias, form.is_transposed)
        self.found["head"] = call.path
        last = self._block_calls[-1].leaving
        between = [
            one
            for one in self._seen.outside(self._blocks)
            if is_close(one.entering, last) and is_close(one.leaving, call.entering)
        ]
        if not between:
            raise UnsupportedModelError(f"no norm lies between the last block and {call.path}")
        norm = classify_norm(between[0], self._width, self._probe.epsilons)
        if norm is None:
            raise UnsupportedModelError(f"{between[0].path} is neither an RMSNorm nor a LayerNorm")
        self._final_norm, self._norm = between[0].path, norm
        self.found["final_norm"], self.found["norm"] = self._final_norm, str(norm)

    def check_embeddings(self) -> None:
        """Find the tables that add into the stream, and what multiplies them."""
        tables = [
            call
            for call in self._seen.outside(self._blocks)
            if isinstance(call.module, nn.Embedding) and call.leaving.shape[-1] == self._width
        ]
        paths = [call.path for call in tables]
        self.found["embeddings"] = paths
        wider = random_model(self._probe.wider(), dtype="float64", trust_remote_code=self._trusted)
        growth = self._embedding_scale(observe(wider, self._ids), paths) / self._embedding_scale(self._seen, paths)
        self._is_scaled = abs(growth - math.sqrt(2)) < 1e-6
        if not self._is_scaled and abs(growth - 1) > 1e-6:
            raise UnsupportedModelError(
                "the embedding multiplier depends on the hidden size, but not as its square root"
            )
        tokens = self._model.get_input_embeddings()
        self._tables = tuple(
            Embedding(
                call.path,
                *self._probe.table_rows(len(call.module.get_parameter("weight")), call.module is tokens, call.path),
            )
            for call in tables
        )

    def _embedding_scale(self, seen: Observation, paths: Sequence[str]) -> float:
        """Return c where the stream that enters the first block is c times the sum of the tables' rows."""
        stream = seen.calls[f"{self._blocks}.0"].entering
        total = torch.zeros_like(stream)
        for path in paths:
            call = seen.calls[path]
            # positions are looked up once for all rows
            total += rows_behind(call.module.get_parameter("weight").detach(), call.leaving).repeat(
                len(stream) // len(call.leaving), 1
            )
        scale = float((stream * total).sum() / total.square().sum().clamp_min(TOLERANCE))
        if not is_close(stream, scale * total):
            raise UnsupportedModelError(
                "the stream that enters the first block is not a multiple of the sum of "
                f"{', '.join(paths) or 'any tables'}: something else changes the embeddings"
            )
        return scale

    # who reads and who writes

    def check_branches(self) -> None:
        """Explain every block as norms, readers and writers."""
        blocks = [self._declare_block(call, self._steps(call)) for call in self._block_calls]
        self.found["block"] = _describe(blocks[0])
        if any(block != blocks[0] for block in blocks[1:]):
            raise UnsupportedModelError("its blocks differ from one another")
        self._block = blocks[0]

    def _steps(self, block: Call) -> list[_Sublayer]:
        """Follow the stream through a block: which norms see it, and what is added to it in between."""
        calls = self._seen.below(block.path)
        norms = [call for call in calls if classify_norm(call, self._width, self._probe.epsilons) == self._norm]
        leaves = [
            call
            for call in calls
            if call.has_parameters and call not in norms and call.leaving.shape == block.entering.shape
        ]
        gates = [call for call in calls if call.leaving.shape == (len(block.entering), 1)]
        steps: list[_Sublayer] = []
        stream, group = block.entering, [norm for norm in norms if is_close(norm.entering, block.entering)]
        if not group:
            raise UnsupportedModelError(f"no norm of {block.path} reads the stream as it enters the block")
        for norm in norms:
            if norm in group:
                continue
            written = explain_change(norm.entering - stream, [call for call in leaves if call.order < norm.order])
            if written:
                steps.append(_Sublayer(tuple(group), tuple(written)))
                leaves = [call for call in leaves if call not in [one.call for one in written]]
                stream, group = norm.entering, [norm]
        written = explain_change(block.leaving - stream, leaves, gates)
        if not written:
            self._complain(block, block.leaving - stream, leaves, [norm for norm in norms if norm not in group])
        return [*steps, _Sublayer(tuple(group), tuple(written))]

    def _complain(self, block: Call, change: torch.Tensor, leaves: Sequence[Call], norms: Sequence[Call]) -> NoReturn:
        """Say why what a block adds to the stream cannot be explained."""
        passed = explain_change(change, [*leaves, *norms]) or []
        names = [one.call.path for one in passed if one.call in norms]
        if names:
            raise UnsupportedModelError(
                f"what {block.path} adds to the stream passes through {' and '.join(names)}, but a norm's weight does "
                "not commute with a rotation"
            )
        raise UnsupportedModelError(f"what {block.path} adds to the stream is not the sum of its linear maps' outputs")

    def _declare_block(self, block: Call, steps: Sequence[_Sublayer]) -> Block:
        """Put what was seen of a block into a declaration."""
        prefix = f"{block.path}."
        branches: list[Branch] = []
        for step in steps:
            modules = dict.fromkeys(_module_of(one.call.path, prefix) for one in step.written)
            if len(steps) > 1 and (len(modules) > 1 or len(step.norms) > 1):
                raise UnsupportedModelError(f"{block.path} is neither sequential nor parallel")
            branches += [self._declare_branch(prefix, module, step) for module in modules]
        if any(not branch.module for branch in branches[:-1]):
            raise UnsupportedModelError(f"the branches of {block.path} are not each a module")
        return Block(tuple(branches), is_parallel=len(branches) > len(steps))

    def _declare_branch(self, prefix: str, module: str, step: _Sublayer) -> Branch:
        """Declare the branch of a step that lies in one module of the block."""
        name = module or prefix[:-1]
        written = [one for one in step.written if _module_of(one.call.path, prefix) == module]
        reading = [
            (norm, call)
            for call in self._seen.below(prefix[:-1])
            for norm in step.norms
            if call.has_parameters and _module_of(call.path, prefix) == module and is_close(call.entering, norm.leaving)
        ]
        experts = [call for _, call in reading if _holds_experts(call)]
        writers = [one for one in written if not _holds_experts(one.call)]
        multipliers = {round(one.multiplier, 9) for one in written}
        if len({norm.path for norm, _ in reading}) != 1 or len(multipliers) != 1:
            raise UnsupportedModelError(f"the branch {name} has no single norm and multiplier")
        if len(writers) > 1 or len(experts) > 1:
            raise UnsupportedModelError(f"the branch {name} has several writers")
        readers = [call for _, call in reading if call not in experts]
        return Branch(
            norm=reading[0][0].path.removeprefix(prefix),
            readers=tuple(self._declare_linear(prefix, call) for call in readers),
            writer=self._declare_linear(prefix, writers[0].call, writers[0]) if writers else None,
            module=module,
            activation="" if module else self._find_activation(prefix, readers, writers),
            multiplier=self._probe.multiplier_name(multipliers.pop()),
            experts=self._declare_experts(prefix, experts[0]) if experts else None,
        )

    def _find_activation(self, prefix: str, readers: Sequence[Call], writers: Sequence[Written]) -> str:
        """Return the path of the module between one reader and one writer; empty where there is none to be found."""
        if len(readers) != 1 or len(writers) != 1:
            return ""
        for call in self._seen.below(prefix[:-1]):
            takes_it = is_close(call.entering, readers[0].leaving)
            if takes_it and is_close(call.leaving, writers[0].call.entering) and not call.has_parameters:
                return call.path.removeprefix(prefix)
        return ""

    def _declare_linear(self, prefix: str, call: Call, written: Written | None = None) -> Linear:
        """Declare a reader, or a writer where `written` says what it wrote."""
        form = linear_form(call)
        if form is None:
            raise UnsupportedModelError(
                f"{call.path} {'writes to' if written else 'reads'} the stream but is not a linear map"
            )
        return Linear(
            path=call.path.removeprefix(prefix),
            width=self._probe.size_name(form.inputs if written else form.outputs, call.path),
            bias=self._probe.bias(call.path, form.has_bias),
            is_transposed=form.is_transposed,
            gate=written.gate.path.removeprefix(prefix) if written and written.gate else "",
        )

    def _declare_experts(self, prefix: str, call: Call) -> Experts:
        three = {name: value for name, value in call.module.named_parameters(recurse=False) if value.dim() == 3}
        readers = [name for name, value in three.items() if value.shape[2] == self._width]
        writers = [name for name, value in three.items() if value.shape[1] == self._width]
        if len(three) != 2 or len(readers) != 1 or len(writers) != 1:
            raise UnsupportedModelError(
                f"{call.path} does not hold its experts in two tensors (experts, outputs, inputs)"
            )
        reader, writer = three[readers[0]], three[writers[0]]
        return Experts(
            module=call.path.removeprefix(prefix),
            count=self._probe.size_name(reader.shape[0], call.path),
            reader_width=self._probe.size_name(reader.shape[1], call.path),
            writer_width=self._probe.size_name(writer.shape[2], call.path),
            reader=readers[0],
            writer=writers[0],
        )

    # what else there is, and whether it is true

    def check_parameters(self) -> None:
        """Put the declaration together, and account for every parameter of the tiny model."""
        self.adapter = self._declare(self._block)
        dimensions = Dimensions(self.adapter, self._probe.fields)
        declared = dimensions.stream_parameters() | dimensions.other_parameters()
        passed_through, prefix = [], f"{self._blocks}.0."
        for name, shape in parameter_shapes(self._model).items():
            if name in declared:
                continue
            if not name.startswith(f"{self._blocks}."):
                raise UnsupportedModelError(f"the parameter {name} has no explanation")
            if name.startswith(prefix):
                passed_through.append(
                    PassedThrough(name.removeprefix(prefix), self._probe.size_name(math.prod(shape), name))
                )
        self._block = dataclasses.replace(self._block, passed_through=tuple(passed_through))
        self.found["block"] = _describe(self._block)
        self.adapter = self._declare(self._block)

    def check_layout(self) -> None:
        """Find the legal dims, and whether the family's own class can describe a slice."""
        probe, dimensions = self._probe, Dimensions(self.adapter, self._probe.fields)
        dim = self._width - 2 * SIZES["num_attention_heads"]
        obstacle = ""
        try:
            sliced = probe.shapes(type(probe.tiny).from_dict(probe.fields | dimensions.sliced_fields(dim)))
        except Exception:  # config and model classes raise what they like
            obstacle = f"{type(self._config).__name__} requires a head width of hidden size / heads."
        else:
            declared = dimensions.stream_parameters() | dimensions.other_parameters()
            wanted = {name: math.prod(size or dim for size in shape) for name, shape in declared.items()}
            tied = [name for name, shape in sliced.items() if math.prod(shape) != wanted.get(name)]
            if tied:
                obstacle = f"its class derives the size of {tied[0]} from the hidden size."
        self.adapter = dataclasses.replace(self.adapter, dim_divisors=probe.dim_divisors(), stock_obstacle=obstacle)
        self.found["layout"] = obstacle or "stock"

    def check_proof(self) -> None:
        """Prove the declaration: on the tiny model, and on the parameters of the real config."""
        dimensions = Dimensions(self.adapter, self._probe.fields)
        shapes = parameter_shapes(self._model)
        dimensions.require_declared(shapes)
        Dimensions(self.adapter, self._config.to_dict()).require_declared(self._probe.shapes(self._config))
        if self._probe.has_head_dim:
            # where heads have no width of their own, what a head computes grows with the hidden size too
            wider = self._probe.shapes(self._probe.wider())
            prove_accounting({self._width: shapes, 2 * self._width: wider}, dimensions)
        if dimensions.keeps_tie and (obstacle := self._why_untied(dimensions)):
            self.adapter = dataclasses.replace(self.adapter, tie_obstacle=obstacle)
            dimensions = Dimensions(self.adapter, self._probe.fields)
        errors = [prove_rotation(self._model, dimensions, self._ids, TOLERANCE, seed) for seed in range(2)]
        self.error = max(*errors, prove_refit(self._model, dimensions, self._ids, TOLERANCE))
        self._try_shortcuts(dimensions)

    def check_channels(self) -> None:
        """Find out whether MLP channels can be removed; a family whose channels cannot keeps them."""
        dimensions = Dimensions(self.adapter, self._probe.fields)
        obstacle = dimensions.mlp_obstacle
        if not obstacle:
            try:
                prove_channels(self._model, dimensions, self._ids, TOLERANCE)
            except SlicecliError as error:
                obstacle = error.cause
                self.adapter = replace(self.adapter, mlp_obstacle=obstacle)
        self.found["MLP"] = obstacle or ", ".join(dimensions.mlp_widths)

    def _why_untied(self, dimensions: Dimensions) -> str:
        """Say why a slice of the tied tiny model cannot share its table; empty where it can."""
        try:
            prove_tie(self._model, dimensions, self._ids, TOLERANCE)
        except SlicecliError as error:
            return f"one table does not serve as embedding and head here: {error.cause}"
        return ""

    def _try_shortcuts(self, dimensions: Dimensions) -> None:
        """Find out whether the published method can slice the model too, and whether it wants its width kept."""
        wants_sliced_head = slices_head(dimensions, None)
        try:
            prove_shortcuts(self.adapter, self._config, wants_sliced_head)
            return
        except SlicecliError as error:
            obstacle = error.cause
        if not wants_sliced_head:
            with suppress(SlicecliError):
                prove_shortcuts(self.adapter, self._config, slices_head=True)
                self.adapter = replace(self.adapter, keeps_width=True)
                return
        self.adapter = replace(self.adapter, shortcut_obstacle=obstacle)

    def _declare(self, block: Block) -> Adapter:
        names = {name: own for name in sorted(_sizes_used(block)) if (own := self._probe.own_name(name)) != name}
        used = {"num_key_value_heads", "head_dim", "tie_word_embeddings", self._norm.epsilon}
        for branch in block.branches:
            used |= {branch.multiplier, *(linear.bias for linear in branch.linears)}
        return Adapter(
            name=str(self._config.model_type),
            model_types=(str(self._config.model_type),),
            block=block,
            blocks=self._blocks,
            embeddings=self._tables,
            final_norm=self._final_norm,
            head=self._head,
            norm=self._norm,
            scales_embeddings_by_width=self._is_scaled,
            names=MappingProxyType(names),
            mlp_widths=_mlp_widths(block),
            defaults=MappingProxyType(self._probe.class_defaults({name for name in used if isinstance(name, str)})),
        )


def _mlp_widths(block: Block) -> tuple[str, ...]:
    """Return the config fields that give a block's experts and MLPs their widths: of writers and readers alike."""
    found = []
    for branch in block.branches:
        pairs = [] if branch.experts is None else [(branch.experts.writer_width, branch.experts.reader_width)]
        if branch.writer is not None:
            pairs += [(branch.writer.width, reader.width) for reader in branch.readers]
        for writer, reader in pairs:
            name = writer.rpartition("*")[2]
            if name == reader.rpartition("*")[2] and name not in _OF_ATTENTION and not name.isdecimal():
                found.append(name)
    return tuple(dict.fromkeys(found)) or Adapter.mlp_widths


def _sizes_used(block: Block) -> set[str]:
    """Return the usual names of the config fields that give a declaration its sizes."""
    widths = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    widths += ["max_position_embeddings", *(one.width for one in block.passed_through)]
    for branch in block.branches:
        widths += [linear.width for linear in branch.linears]
        if branch.experts is not None:
            widths += [branch.experts.count, branch.experts.reader_width, branch.experts.writer_width]
    return {width.rpartition("*")[2] for width in widths}


def _describe(block: Block) -> list[str]:
    """Describe a block in a line for each branch, for people."""
    lines = []
    for branch in block.branches:
        times = f" times {branch.multiplier}" if branch.multiplier else ""
        readers, writers = ", ".join(branch.reader_paths), ", ".join(branch.writer_paths)
        lines.append(f"{branch.norm}: read by {readers}; written by {writers}{times}")
    if block.is_parallel:
        lines.append("in parallel")
    return lines + [f"passed through: {one.path}" for one in block.passed_through]


def _module_of(path: str, prefix: str) -> str:
    """Return the module of the block in which a path lies; empty where it hangs on the block itself."""
    module, _, rest = path.removeprefix(prefix).partition(".")
    return module if rest else ""


def _holds_experts(call: Call) -> bool:
    return any(parameter.dim() == 3 for parameter in call.module.parameters(recurse=False))
