"""Rewriting a slice in another class of transformers that computes the same.

Tensors are read and written one by one. The new folder takes its name only once it has been loaded and its logits are
those of the old one.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicecli.checkpoint.configs import portable_config
from slicecli.checkpoint.dense_weights import DenseWeights, stored_values
from slicecli.checkpoint.folder import RECORD_FILE, check_apart, require_disk_space, whole_folder
from slicecli.checkpoint.loading import load_model
from slicecli.checkpoint.portable import converting_sink
from slicecli.checkpoint.source import Source
from slicecli.checkpoint.weight_headers import INDEX_FILE
from slicecli.checkpoint.weight_writer import ShardWriter
from slicecli.errors import OutputError, RequestError, WeightsError
from slicecli.family.dimensions import nearest_in
from slicecli.family.slice_plan import DTYPE_BYTES, SlicePlan
from slicecli.family.written_class import AUTO, OWN, SliceClasses, WrittenClass
from slicecli.hub.card import CARD_FILE
from slicecli.hub.writing import enter_class, own_files
from slicecli.jobs.options import SliceOptions
from slicecli.jobs.plan import find_adapter, full_fields
from slicecli.jobs.preparation import CONFIG_FILE, check_loads, write_config
from slicecli.record.record import read_sound_record
from slicecli.runtime.libraries import quiet_libraries, running
from slicecli.runtime.options import option_of

__all__ = ["Converted", "convert_slice"]

ROWS, LENGTH = 2, 32
# of logits in float32; weights that are scaled are rounded once more to their dtype
TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Converted:
    """What came out of a conversion.

    Attributes:
        output: The folder.
        before: Model type of the class that it was written in.
        after: Model type of the class that it is written in.
        parameters: Number of its parameters.
        difference: Relative difference of the logits.
    """

    output: Path
    before: str
    after: str
    parameters: int
    difference: float


def convert_slice(folder: Path, write_as: str, output: Path | None = None, overwrite: bool = False) -> Converted:
    """Write a slice in a portable class of its own class.

    Args:
        write_as: Model type of the class.
        output: The folder to write; `None` replaces the slice.
        overwrite: Whether another slice may be replaced.

    Raises:
        SlicecliError: The folder is no slice, or it cannot be written in that class.
    """
    record = read_sound_record(folder)
    if record is None:
        raise OutputError(f"{folder.name!r} has no valid {RECORD_FILE}.", "Pass the folder of a slice.")
    if write_as in (AUTO, OWN):
        raise RequestError(f"A slice cannot be converted to {write_as!r}.", "Name a class; see slicecli inspect.")
    source = Source.find(str(folder))
    written = _written_class(source, record, write_as)
    target = output or folder
    if output is not None:
        check_apart(output, folder)
    require_disk_space(target, written.parameters(record["dim"]) * DTYPE_BYTES[record["dtype"]])
    with quiet_libraries(), running(source.name), whole_folder(target, overwrite or output is None) as partial:
        difference = _write(source, record, written, partial)
    return Converted(target, source.fields["model_type"], write_as, written.parameters(record["dim"]), difference)


def _written_class(source: Source, record: Mapping[str, Any], write_as: str) -> WrittenClass:
    """Return the class to write; refuse one that does not compute the same, or that cannot have the hidden size."""
    from slicecli.proof.portable import prove_portable_class

    chosen = find_adapter(source)
    config = source.config()
    own, _ = source.dimensions(chosen.adapter, full_fields(source, config))
    written = SliceClasses.of(own, str(source.fields["model_type"]), write_as, source.has_own_model_code).at()
    if record["dim"] % written.dim_multiple:
        nearest = " and ".join(map(str, nearest_in(written.legal_dims(), record["dim"])))
        raise RequestError(
            f"A slice of dim {record['dim']} cannot be written as {write_as}, whose dims are multiples of "
            f"{written.dim_multiple}.",
            f"Slice the model to a dim such as {nearest}.",
        )
    with quiet_libraries(), running(source.name):
        prove_portable_class(written, config)
    return written


def _write(source: Source, record: Mapping[str, Any], written: WrittenClass, folder: Path) -> float:
    """Write the whole slice into a folder, and return by how much its logits differ."""
    import torch

    dim, dtype = record["dim"], record["dtype"]
    for file in [*own_files(source.folder), CARD_FILE, RECORD_FILE]:
        if file not in (CONFIG_FILE, INDEX_FILE, *record["weights"]) and (source.folder / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / file, folder / file)
    config = portable_config(source.config(), written, dim, dtype)
    write_config(config, folder, source, written.dimensions.adapter.names)
    plan = SlicePlan(
        model=source.name,
        model_type=str(source.fields["model_type"]),
        adapter=written.own.adapter.name,
        hidden_size=record["hidden_size"],
        dim=dim,
        dtype=dtype,
        dense_parameters=record["parameters"]["dense"],
        sliced_parameters=written.parameters(dim),
        dense_dtype=dtype,
        is_tied=written.own.keeps_tie,
        written_type=written.model_type,
        activation=written.own.activation,
    )
    meta_model = check_loads(folder, plan, source, source.tokenizer())
    stored = getattr(torch, dtype)
    shapes = {name: tuple(value.shape) for name, value in stored_values(meta_model)}
    writer = ShardWriter(folder, shapes, stored, SliceOptions().max_shard_size)
    try:
        sink = converting_sink(written, meta_model, stored, writer.write)
        weights = DenseWeights(source)
        for name in weights.names:
            sink(name, weights.tensor(name).to(stored))
        digests = writer.finish()
    finally:
        writer.close()
    enter_class(folder, _changes(record, plan, written), digests)
    return _compare(source, folder, dtype)


def _changes(record: Mapping[str, Any], plan: SlicePlan, written: WrittenClass) -> dict[str, Any]:
    """Return the fields of the record that differ in the new class."""
    words = shlex.split(record["command"])
    flag = option_of(SliceOptions, "write_as").flag
    if flag in words:
        position = words.index(flag)
        del words[position : position + 2]

    def recounted(one: Mapping[str, Any]) -> dict[str, Any]:
        if one["parameters"] is None:
            return dict(one)
        more = written.dimensions.parameters(one["dim"]) - written.own.parameters(one["dim"])
        return {**one, "parameters": one["parameters"] + more}

    def is_legal(one: Mapping[str, Any]) -> bool:
        return bool(one["dim"] % written.dim_multiple == 0)

    return {
        "written_type": plan.written_type,
        "command": shlex.join([*words, flag, plan.written_type]),
        "parameters": {**record["parameters"], "sliced": plan.sliced_parameters},
        "bytes": {**record["bytes"], "sliced": plan.sliced_bytes},
        "other_dims": [recounted(one) for one in record["other_dims"] if is_legal(one)],
        "predictions": [
            {**one, "estimates": [recounted(row) for row in one["estimates"]]} for one in record["predictions"]
        ],
    }


def _compare(source: Source, folder: Path, dtype: str) -> float:
    """Load both slices, one after the other, and compare their logits."""
    found = [_logits(one) for one in (source, Source.find(str(folder)))]
    difference = float((found[1] - found[0]).norm() / found[0].norm())
    if not difference <= TOLERANCES[dtype]:
        raise WeightsError(
            f"The converted slice does not compute the same: its logits differ by {difference:.1e}.",
            "The slice was left as it is.",
        )
    return difference


def _logits(source: Source) -> Any:
    import torch

    model = load_model(source, "float32")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (ROWS, LENGTH), generator=generator).to(model.device)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double().cpu()
