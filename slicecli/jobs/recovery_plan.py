"""What a training of a slice will be, decided before any weight is read; and what can be refused that early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.folder import check_apart, check_output, require_disk_space
from slicecli.checkpoint.source import Source
from slicecli.errors import RequestError, TrainingError
from slicecli.family.context_length import pick_sequence_length
from slicecli.family.slice_plan import DTYPE_BYTES
from slicecli.jobs.options import RecoverOptions
from slicecli.record.record import read_sound_record
from slicecli.recovery.data import held_out_rows
from slicecli.runtime.cache_folder import cache_folder
from slicecli.runtime.distributed import Processes
from slicecli.runtime.placement import batch_rows

if TYPE_CHECKING:
    import torch

    from slicecli.jobs.block_plan import BlockPlan
    from slicecli.record.schema import RecoveryMode

__all__ = ["LORA_RANK", "RecoveryJob", "check_mode", "plan_recovery"]

USUAL_LENGTH = 512
USUAL_MEASUREMENTS = 10
USUAL_TOKENS = {"full": 2_000_000, "lora": 2_000_000, "blocks": 131_072}
USUAL_EPOCHS = 4
USUAL_LEARNING_RATES = {"full": 2e-4, "lora": 2e-4, "blocks": 5e-4}
LORA_RANK = 32
# float32 weights and gradients and both moments of AdamW; a checkpoint has all but the gradients
BYTES_IN_MEMORY, BYTES_IN_CHECKPOINT = 16, 12
CHECKPOINTS = 3  # the best, the last, and the one that is being written


@dataclass(frozen=True)
class RecoveryJob:
    """A training, decided and found possible before any weight is read.

    Attributes:
        record: The record of the slice.
        folder: Where the result will lie.
        steps: Steps of the optimiser; of mode blocks, for each block.
        epochs: How often each block sees the rows, in mode blocks; else 1, and short texts are read again.
        blocks: What mode blocks needs beyond this.
    """

    source: Source
    record: Mapping[str, Any]
    teacher: Source
    teacher_parameters: int
    folder: Path
    sequence_length: int
    rows_per_step: int
    steps: int
    epochs: int
    eval_every: int
    options: RecoverOptions
    processes: Processes
    blocks: BlockPlan | None = None

    @property
    def learning_rate(self) -> float:
        """The largest learning rate."""
        chosen = self.options.learning_rate
        return USUAL_LEARNING_RATES[self.options.mode] if chosen is None else chosen

    @property
    def tokens(self) -> int:
        """The tokens that are trained on, those that are read again counted again."""
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """The tokens of one step."""
        return self.rows_per_step * self.sequence_length

    @property
    def own_rows_per_step(self) -> int:
        """The rows of one step in this process."""
        return self.rows_per_step // self.processes.count

    @property
    def logits_folder(self) -> Path:
        """The folder of the cache, where stored predictions of teachers lie too."""
        return self.options.cache_folder or cache_folder()

    @property
    def logits_bytes(self) -> int:
        """What stored predictions of the teacher take on disk at most."""
        from slicecli.recovery.teacher import bytes_per_token

        rows = self.steps * self.rows_per_step
        tokens = (rows + held_out_rows(rows)) * self.sequence_length
        return tokens * bytes_per_token(self.options.store_logits or 0)

    @property
    def remedy(self) -> str:
        """What helps where a training did not."""
        return f"Nothing was written. Use a smaller --lr than {self.learning_rate:g}, or more --tokens."

    def rows_per_pass(self, device: torch.device) -> int:
        """Return how many rows of a step are computed at once."""
        fitting = batch_rows(device, self.sequence_length)
        own = self.own_rows_per_step
        return max(size for size in range(1, own + 1) if own % size == 0 and size <= fitting)

    def no_gain(self, before: float, after: float) -> TrainingError:
        """Return the error of a training that did not make the slice better."""
        return TrainingError(
            f"Training made {self.source.name} no better: its held-out KL was {before:.4f} before and is {after:.4f} "
            "after.",
            self.remedy,
        )

    def describe(self) -> str:
        """Say in a line what will be trained, and what that takes."""
        parameters, options = self.record["parameters"]["sliced"], self.options
        teacher_bytes = self.teacher_parameters * DTYPE_BYTES[self.teacher.stored_dtype()]
        what = f"{self.source.name} ({parameters:,} parameters) learns from {self.teacher.name} "
        what += f"({self.teacher_parameters:,}): "
        steps = f"{self.steps:,} steps of {self.tokens_per_step:,}, mode {options.mode}"
        if self.blocks is not None:
            times = "once" if self.epochs == 1 else f"{self.epochs} times"
            memory = f"{BYTES_IN_MEMORY * self.blocks.block_parameters / 1e9:.2f} GB of memory"
            return (
                f"{what}{self.tokens // self.epochs:,} tokens {times} for each block, {steps}; "
                f"{memory} for one block with its gradients and optimiser; {self.blocks.describe()}"
            )
        stored = ""
        if options.store_logits is not None:
            stored = (
                f"; up to {self.logits_bytes / 1e9:.2f} GB on disk for {options.store_logits} of the teacher's logits "
                f"at each position, in {self.logits_folder}"
            )
        return (
            f"{what}{self.tokens:,} tokens in {steps}; up to {BYTES_IN_MEMORY * parameters / 1e9:.2f} GB of memory for "
            f"weights, gradients and optimiser, {teacher_bytes / 1e9:.2f} GB for the teacher, and activations{stored}"
        )


def plan_recovery(model: str, output: Path | None, options: RecoverOptions) -> RecoveryJob:
    """Decide on a training, and refuse what can be refused without weights."""
    processes = Processes.find()
    check_mode(options.mode)
    if options.mode == "blocks" and options.resume and processes.count > 1:
        raise RequestError(
            "--resume of mode blocks requires a single process.", "Leave out --resume, or start one process."
        )
    source = Source.find(model, options.revision, options.token, options.trust_remote_code)
    source.check_is_decoder()
    source.check_companions()
    record = read_sound_record(source.folder)
    if record is None:
        raise RequestError(
            f"{source.name} has no sound slicecli.json, so it is not known as a slice.",
            "Pass a slice; `slicecli verify` says what is wrong with its record.",
        )
    teacher = _find_teacher(record, options)
    teacher_parameters = _check_teacher(source, teacher, options.store_logits)
    longest = pick_sequence_length(source.name, source.config(), options.sequence_length)
    length = options.sequence_length or min(USUAL_LENGTH, longest)
    pick_sequence_length(teacher.name, teacher.config(), length)
    rows_per_step = options.batch_size // length
    if rows_per_step == 0 or rows_per_step % processes.count:
        raise RequestError(
            f"A batch of {options.batch_size:,} tokens has {rows_per_step} rows of {length:,} tokens, which cannot be "
            f"shared by {processes.count} process{'es' if processes.count > 1 else ''}.",
            f"Use --batch-size {processes.count * length} or a multiple of it.",
        )
    tokens = options.tokens or USUAL_TOKENS[options.mode]
    steps = tokens // (rows_per_step * length)
    if steps == 0:
        raise RequestError(
            f"{tokens:,} tokens are less than one step of {rows_per_step * length:,}.",
            "Use more --tokens, or a smaller --batch-size.",
        )
    folder = output or Path(f"{source.name.rpartition('/')[2]}-recovered")
    if processes.is_main:
        _check_folder(source, teacher, record, folder, options)
    epochs, blocks = 1, None
    if options.mode == "blocks":
        from slicecli.jobs.block_plan import plan_blocks

        epochs = options.epochs or USUAL_EPOCHS
        blocks = plan_blocks(source, record, teacher, options, tokens // processes.count)
    return RecoveryJob(
        source=source,
        record=record,
        teacher=teacher,
        teacher_parameters=teacher_parameters,
        folder=folder,
        sequence_length=length,
        rows_per_step=rows_per_step,
        steps=steps * epochs,
        epochs=epochs,
        eval_every=options.eval_every or max(1, steps // USUAL_MEASUREMENTS),
        options=options,
        processes=processes,
        blocks=blocks,
    )


def check_mode(mode: RecoveryMode) -> None:
    """Refuse a mode whose packages are not installed."""
    if mode == "lora" and find_spec("peft") is None:
        raise RequestError("Mode lora requires peft, which is not installed.", "Run pip install 'slicecli[lora]'.")


def _find_teacher(record: Mapping[str, Any], options: RecoverOptions) -> Source:
    revision, name = None, options.teacher
    if name is None:
        name, revision = record["source"]["model"], record["source"]["commit"]
        if revision is None:
            raise RequestError(
                f"The slice was made from a local model, of which only the name {name!r} is recorded.",
                "Pass its folder with --teacher.",
            )
    teacher = Source.find(name, revision, options.token, options.trust_remote_code)
    teacher.check_is_decoder()
    return teacher


def _check_teacher(source: Source, teacher: Source, stored_logits: int | None) -> int:
    """Refuse a teacher whose predictions are of other tokens; return its number of parameters."""
    from slicecli.checkpoint.meta_model import build_meta_model

    models = [build_meta_model(one.config(), one.trust_remote_code) for one in (source, teacher)]
    own, other = (model.get_input_embeddings().num_embeddings for model in models)
    if own != other:
        raise RequestError(
            f"The vocabularies differ: {source.name} has {own:,} tokens, the teacher {teacher.name} {other:,}.",
            "Use the model that the slice was made from as --teacher.",
        )
    if source.tokenizer().get_vocab() != teacher.tokenizer().get_vocab():
        raise RequestError(
            f"The tokenizers of {source.name} and of the teacher {teacher.name} give different tokens.",
            "Use the model that the slice was made from as --teacher.",
        )
    if stored_logits is not None and stored_logits > own:
        raise RequestError(
            f"{stored_logits:,} logits are more than the {own:,} tokens of the vocabulary.", "Use fewer --store-logits."
        )
    models[1].tie_weights()
    return sum(parameter.numel() for parameter in models[1].parameters())


def _check_folder(
    source: Source, teacher: Source, record: Mapping[str, Any], folder: Path, options: RecoverOptions
) -> None:
    data = Path(options.data).expanduser()
    for one in (source, teacher):
        check_apart(folder, one.folder, [data] if data.is_file() else [])
    check_output(folder, options.overwrite)
    companion_bytes = sum((source.folder / file).stat().st_size for file in source.companions.files)
    parameters = record["parameters"]["sliced"] if options.mode == "full" else 0  # adapters are small
    needed = record["bytes"]["sliced"] + companion_bytes + CHECKPOINTS * BYTES_IN_CHECKPOINT * parameters
    require_disk_space(folder, needed)
