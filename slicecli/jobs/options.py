"""What can be asked of a slice, each option defined once, for the command line and the Python API alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slicecli.errors import RequestError, shown
from slicecli.family.slice_plan import METHODS, Method
from slicecli.runtime import options
from slicecli.runtime.inputs import check_count, check_seed, local_path, parse_bytes, parse_text, parse_tokens
from slicecli.runtime.options import Option

if TYPE_CHECKING:
    from slicecli.record.schema import RecoveryMode
    from slicecli.runtime.placement import DeviceMap, MaxMemory
    from slicecli.slicing.slicegpt import Orientation

__all__ = ["RecoverOptions", "SliceOptions"]

CACHE_FOLDER = Option(
    "--cache-dir",
    "Folder of the statistics cache.  [default: SLICECLI_CACHE, or the user's cache folder]",
    reads=local_path,
    metavar="DIR",
    is_folder=True,
    affects_result=False,
)
RECOVERY_MODES = ("full", "lora", "blocks")
MAX_SHARD_SIZE = Option(
    "--max-shard-size",
    "Maximum bytes per weight file.",
    default="5GB",
    reads=parse_bytes,
    metavar="SIZE",
    affects_result=False,
)
OVERWRITE = Option("--overwrite", "Replace an existing slice.", default=False, reads=bool, affects_result=False)
RESUME = Option(
    "--resume", "Continue an interrupted run of the same command.", default=False, reads=bool, affects_result=False
)

ACTIVATIONS = Option(
    "--activations",
    "Where to keep the cached activations of the calibration text; auto takes the first with room.",
    default="auto",
    choices=("auto", "device", "host", "disk"),
    affects_result=False,
)


@dataclass(frozen=True)
class SliceOptions:
    """Everything about a slice that is not its model and width; each field says what it is.

    `None` stands for what the help of the option calls its default. A size such as `5GB` becomes a number of bytes.

    Raises:
        RequestError: A number is out of range.
    """

    method: Method = Option(
        "--method",
        "refit: one shared basis, every map refitted by least squares, a stock checkpoint if the family allows it. "
        "slicegpt: as published, a basis at every norm site, nothing refitted, shortcut matrices in custom code.",
        default="refit",
        choices=METHODS,
    ).field()
    orientation: Orientation = Option(
        "--final-orientation",
        "slicegpt: leave the kept directions in PCA order, or rotate them randomly (--seed).",
        default="pca",
        choices=("pca", "random"),
    ).field()
    slice_head: bool | None = Option(
        "--slice-head/--no-slice-head",
        "slicegpt: also slice the input of the head.  [default: no, as published, if the family allows it]",
        reads=bool,
    ).field()
    unties: bool = Option(
        "--untie",
        "Of a model whose head is its embedding table: give the slice a head of its own.",
        default=False,
        reads=bool,
    ).field()
    write_as: str = Option(
        "--write-as",
        "Class of transformers to write a refitted slice in: auto takes the family's own if vLLM and llama.cpp run it, "
        "else one that computes the same and runs; own, or the type of such a class (see `slicecli inspect`).",
        default="auto",
        reads=parse_text,
        metavar="auto|own|NAME",
    ).field()
    calibration: str = Option(
        "--calibration",
        "Calibration text: wikitext2, c4, alpaca, ptb, demo, a .txt or .jsonl file, or a Hub dataset.",
        default="wikitext2",
        reads=parse_text,
        metavar="NAME|FILE|HUB_ID",
    ).field()
    samples: int = Option("--samples", "Rows of calibration text.", default=128, reads=int, metavar="N").field()
    seed: int = Option("--seed", "Seed for choosing the rows.", default=42, reads=int, metavar="N").field()
    cache: bool = Option(
        "--cache/--no-cache",
        "Reuse cached statistics, and cache new ones.",
        default=True,
        reads=bool,
        affects_result=False,
    ).field()
    cache_folder: Path | None = CACHE_FOLDER.field()
    sequence_length: int | None = options.SEQUENCE_LENGTH.field()
    batch_size: int | None = options.BATCH_SIZE.field()
    dtype: str | None = options.DTYPE.field()
    device_map: DeviceMap = options.DEVICE_MAP.field()
    max_memory: MaxMemory | None = options.MAX_MEMORY.field()
    activations: Literal["auto", "device", "host", "disk"] = ACTIVATIONS.field()
    max_shard_size: int = MAX_SHARD_SIZE.field()
    adapter: str | None = Option(
        "--adapter",
        "Use this adapter instead of the one for the model's type; auto infers one.",
        reads=parse_text,
        metavar="NAME",
    ).field()
    revision: str | None = options.REVISION.field()
    token: str | None = options.TOKEN.field()
    trust_remote_code: bool = options.TRUST_REMOTE_CODE.field()
    overwrite: bool = OVERWRITE.field()
    resume: bool = RESUME.field()

    def __post_init__(self) -> None:
        check_count(self.samples, "{} calibration samples are", "Use --samples", words=("too few", "too many"))
        check_count(self.sequence_length, "A sequence length of {} is", "Use --seq-len", least=2)
        check_count(self.batch_size, "A batch of {} rows is", "Use --batch-size")
        check_seed(self.seed)
        if isinstance(self.max_shard_size, str):
            object.__setattr__(self, "max_shard_size", parse_bytes(self.max_shard_size))


@dataclass(frozen=True)
class RecoverOptions:
    """Everything about the training of a slice; each field says what it is.

    `None` stands for what the help of the option calls its default.

    Raises:
        RequestError: A number is out of range.
    """

    teacher: str | None = Option(
        "--teacher",
        "Model whose predictions the slice is trained to give.  [default: the model it was made from, if that is on "
        "the Hub]",
        reads=parse_text,
        metavar="MODEL",
    ).field()
    data: str = Option(
        "--data",
        "Training text: alpaca, c4, wikitext2, ptb, demo, a .txt or .jsonl file, or a Hub dataset.",
        default="alpaca",
        reads=parse_text,
        metavar="NAME|FILE|HUB_ID",
    ).field()
    tokens: int | None = Option(
        "--tokens",
        "Tokens to train on; a shorter text is read several times.  [default: 2M; of mode blocks 131072]",
        reads=parse_tokens,
        metavar="N",
    ).field()
    mode: RecoveryMode = Option(
        "--mode",
        "full: train all weights at once. lora: train low-rank adapters and merge them (needs slicecli[lora]). blocks: "
        "train one block after the other to follow the teacher's activations, in the memory of one block.",
        default="full",
        choices=RECOVERY_MODES,
    ).field()
    epochs: int | None = Option(
        "--epochs", "blocks: how often each block sees the tokens.  [default: 4]", reads=int, metavar="N"
    ).field()
    learning_rate: float | None = Option(
        "--lr",
        "Largest learning rate; it rises for 10 % of the steps and falls by a cosine.  [default: 2e-4; of mode blocks "
        "5e-4]",
        reads=float,
        metavar="RATE",
    ).field()
    sequence_length: int | None = Option(
        "--seq-len", "Tokens per row.  [default: 512, or the model's longest]", reads=int, metavar="N"
    ).field()
    batch_size: int = Option(
        "--batch-size",
        "Tokens per step; as many as fit are computed at once.",
        default="2048",
        reads=parse_tokens,
        metavar="N",
    ).field()
    seed: int = Option("--seed", "Seed for choosing and ordering the rows.", default=42, reads=int, metavar="N").field()
    eval_every: int | None = Option(
        "--eval-every",
        "full, lora: steps between measurements on the held-out rows, each with a checkpoint.  [default: a tenth of "
        "the steps]",
        reads=int,
        metavar="N",
    ).field()
    store_logits: int | None = Option(
        "--store-logits",
        "full, lora: keep what the teacher predicts on disk, of each position the K likeliest tokens and the sum of "
        "the others, and reuse it in later runs on the same text.",
        reads=int,
        metavar="K",
    ).field()
    cache_folder: Path | None = dataclasses.replace(
        CACHE_FOLDER,
        help="Where --store-logits keeps it.  [default: SLICECLI_CACHE, or the user's cache folder]",
    ).field()
    device_map: DeviceMap = dataclasses.replace(
        options.DEVICE_MAP,
        help="Where to place the teacher: auto, balanced, sequential, a device (cpu, cuda:N), or a .json file that "
        "maps modules to devices, cpu or disk.",
    ).field()
    max_memory: MaxMemory | None = dataclasses.replace(
        options.MAX_MEMORY,
        help="Maximum bytes of the teacher's weights on each device; those that fit nowhere are read from disk.",
    ).field()
    activations: Literal["auto", "device", "host", "disk"] = dataclasses.replace(
        ACTIVATIONS, help="blocks: where to keep the cached activations; auto takes the first with room."
    ).field()
    max_shard_size: int = MAX_SHARD_SIZE.field()
    revision: str | None = options.REVISION.field()
    token: str | None = options.TOKEN.field()
    trust_remote_code: bool = options.TRUST_REMOTE_CODE.field()
    overwrite: bool = OVERWRITE.field()
    resume: bool = RESUME.field()

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, parse_tokens(value))
        if isinstance(self.max_shard_size, str):
            object.__setattr__(self, "max_shard_size", parse_bytes(self.max_shard_size))
        if self.tokens is not None and self.tokens < 1:
            raise RequestError(f"{self.tokens} training tokens are too few.", "Use --tokens 1 or more.")
        check_count(self.sequence_length, "A sequence length of {} is", "Use --seq-len", least=2)
        check_count(self.batch_size, "A batch of {} tokens is", "Use --batch-size", least=2)
        check_count(
            self.eval_every, "A measurement every {} steps is", "Use --eval-every", words=("too often", "too rare")
        )
        check_count(self.store_logits, "{} stored logits are", "Use --store-logits", words=("too few", "too many"))
        check_count(self.epochs, "{} epochs are", "Use --epochs", words=("too few", "too many"))
        check_seed(self.seed)
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise RequestError(f"A learning rate of {self.learning_rate} is out of range.", "Use --lr between 0 and 1.")
        if self.mode not in RECOVERY_MODES:
            raise RequestError(f"{shown(self.mode)} is not a mode of training.", f"Use {', '.join(RECOVERY_MODES)}.")
        if self.mode == "blocks" and (self.eval_every is not None or self.store_logits is not None):
            raise RequestError(
                "--eval-every and --store-logits are of modes full and lora.", "Leave them out, or use another --mode."
            )
        if self.mode != "blocks" and (self.epochs is not None or self.activations != "auto"):
            raise RequestError(
                "--epochs and --activations are of mode blocks.", "Leave them out, or use --mode blocks."
            )
