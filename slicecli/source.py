"""Where a model comes from: a Hub id or a folder, read cheap things first.

`Source.find` fetches only the small files, so that every refusal that a config can justify comes before a
single weight is downloaded. The weights are opened by transformers and accelerate with every module on the
`disk` device: nothing is copied, and a tensor is read from the checkpoint when it is asked for.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint import file_digest
from slicecli.errors import SourceError, UnsupportedModelError, WeightsError, reason_of
from slicecli.hub.client import patiently, quiet_client
from slicecli.hub.errors import describe_hub_error, is_transient, remedy_of_hub_error
from slicecli.plan import DTYPE_CODES

if TYPE_CHECKING:
    import torch

__all__ = [
    "DESCRIPTION_FILES",
    "DenseWeights",
    "Source",
    "checkpoint_tensors",
    "empty_model",
    "parameter_shapes",
    "with_plain_experts",
]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LONGEST_NAME = 255
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# what a slice takes over from its source byte for byte
COMPANION_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
DESCRIPTION_FILES = ("config.json", "README.md", "slicecli.json")  # what says what a model is, without loading it
SMALL_FILES = (*DESCRIPTION_FILES, INDEX_FILE, *COMPANION_FILES)


@dataclass(frozen=True)
class Source:
    """A model whose small files are at hand.

    Attributes:
        name: The Hub id, or the folder's own name: what records and cards may show.
        folder: The local folder with the files.
        revision: The revision asked for; `None` for a local folder or the default branch.
        commit: The commit hash on the Hub; `None` for a local folder.
        fields: The content of `config.json`.
        token: Hub token, kept for later downloads only.
        trust_remote_code: Whether code from the repository may run.
    """

    name: str
    folder: Path
    revision: str | None
    commit: str | None
    fields: Mapping[str, Any]
    token: str | None = None
    trust_remote_code: bool = False

    def __repr__(self) -> str:
        # never the token nor the folder: this may end in a log
        return f"Source(name={self.name!r}, revision={self.revision!r}, commit={self.commit!r})"

    @classmethod
    def find(
        cls,
        model: str,
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        files: tuple[str, ...] = SMALL_FILES,
    ) -> Source:
        """Find a model by Hub id or folder and read its config.

        Args:
            model: Hub id or folder.
            revision: Revision on the Hub.
            token: Hub token.
            trust_remote_code: Whether code from the repository may run; it is fetched then.
            files: What is fetched from the Hub.

        Raises:
            SourceError: It does not exist, cannot be reached, or has no readable config.
        """
        path = Path(model).expanduser()
        if path.is_dir():
            folder, name, commit = path, path.resolve().name, None
        elif path.exists():
            raise SourceError(f"{model!r} is a file.", "Give the folder of a model, or a Hub id such as owner/name.")
        elif model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise SourceError(f"There is no folder {model!r}.", "Check the path, or give a Hub id such as owner/name.")
        else:
            folder = _download(model, revision, token, files + (("*.py",) if trust_remote_code else ()))
            name, commit = model, folder.name
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise SourceError(
                f"The name {name!r} is too long, or has characters that cannot be printed, for a record to hold it.",
                "Rename the folder.",
            )
        return cls(name, folder, revision, commit, _read_config(folder, name), token, trust_remote_code)

    def check_is_decoder(self) -> None:
        """Refuse what cannot be a dense decoder language model, judging by the config alone.

        Raises:
            UnsupportedModelError: Encoder, encoder-decoder, multimodal or quantised.
        """
        kind = self.fields.get("model_type", "?")
        architectures = [str(name) for name in self.fields.get("architectures") or []]
        if self.fields.get("is_encoder_decoder"):
            raise UnsupportedModelError(
                f"{self.name} ({kind}) is an encoder-decoder model.", "Only decoder language models can be sliced."
            )
        if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
            raise UnsupportedModelError(
                f"{self.name} ({', '.join(architectures)}) is not a decoder language model.",
                "Only models with a causal language-modelling head can be sliced.",
            )
        quantization = self.fields.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else "?"
            raise UnsupportedModelError(
                f"{self.name} is quantised ({method}).", "Slice the original weights, then quantise the slice."
            )

    def config(self) -> Any:
        """Return the transformers config.

        Raises:
            SourceError: transformers refuses it.
        """
        import transformers

        try:
            return transformers.AutoConfig.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:  # transformers raises many kinds for a bad config
            raise SourceError(
                f"transformers refuses the config of {self.name}: {reason_of(error)}.", "Check config.json."
            ) from error

    def tokenizer(self) -> Any:
        """Return the tokenizer.

        Raises:
            SourceError: There is none, or transformers cannot load it.
        """
        import transformers

        try:
            return transformers.AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:
            raise SourceError(
                f"The tokenizer of {self.name} cannot be loaded: {reason_of(error)}.",
                "The folder needs the tokenizer's files next to config.json.",
            ) from error

    def stored_dtype(self) -> str:
        """Return the dtype of the checkpoint: what the config says, else the first weight file, else float32."""
        dtype = str(self.fields.get("dtype") or self.fields.get("torch_dtype")).removeprefix("torch.")
        if dtype in DTYPE_CODES:
            return dtype
        names = {code: name for name, code in DTYPE_CODES.items()}
        for path in sorted(self.folder.glob("model*.safetensors")):
            for entry in _read_header(path).values():
                if isinstance(entry, dict) and entry.get("dtype") in names:
                    return names[entry["dtype"]]
        return "float32"

    def companion_files(self) -> Iterator[Path]:
        """Yield the files a slice takes over unchanged: tokenizer, generation config, chat template, licences."""
        found = {path for pattern in COMPANION_FILES for path in self.folder.glob(pattern) if path.is_file()}
        yield from sorted(found)

    def code_files(self) -> list[Path]:
        """Return the Python files that the model's classes come from; none where they are transformers' own."""
        if not (self.trust_remote_code and self.fields.get("auto_map")):
            return []
        return sorted(path for path in self.folder.glob("*.py") if path.is_file())

    def weight_files(self) -> list[str]:
        """Return the names of the safetensors files of the checkpoint.

        Raises:
            WeightsError: There are none, only pickled ones, or the index is damaged or points elsewhere.
        """
        if (self.folder / INDEX_FILE).is_file():
            return _indexed_files(self.folder / INDEX_FILE)
        if (self.folder / SINGLE_FILE).exists() or self.commit is not None:
            return [SINGLE_FILE]
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt")):
            raise WeightsError(
                f"{self.name} has its weights only as pickle files, which can run code when they are read.",
                "Convert them to safetensors, or take a revision that has them.",
            )
        raise WeightsError(f"{self.name} has no weights ({SINGLE_FILE} or {INDEX_FILE}).", "Check the folder.")

    def weights_identity(self) -> Any:
        """Return what changes when the weights do: the commit, or names, sizes and times of a folder's files.

        To read them all would take as long as to slice.

        Raises:
            WeightsError: There are none.
        """
        if self.commit is not None:
            return self.commit
        states = [(name, (self.folder / name).stat()) for name in self.weight_files() if (self.folder / name).is_file()]
        return [[name, state.st_size, state.st_mtime_ns] for name, state in states]

    def fetch_weights(self) -> None:
        """Make sure the weight files are whole and on this machine, downloading them where needed.

        Raises:
            SourceError: The download fails.
            WeightsError: A file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        files = self.weight_files()
        if self.commit is not None:
            new = [file for file in files if not (self.folder / file).is_file()]
            try:
                _download(self.name, self.commit, self.token, tuple(files))
            except SourceError:
                # the next run takes for whole what is there
                self._remove_damaged(new)
                raise
            if damaged := self._remove_damaged(new):
                raise WeightsError(
                    f"{_listed(damaged)} of {self.name} arrived damaged: the hash is not the one that the Hub states.",
                    "What was damaged is removed; run it again to fetch it anew.",
                )
        for file in files:
            if not (self.folder / file).is_file():
                raise WeightsError(
                    f"The weight file {file} of {self.name} is missing.", "Download the checkpoint again."
                )
            try:
                with safe_open(self.folder / file, framework="pt"):
                    pass
            except (SafetensorError, OSError, ValueError) as error:
                raise WeightsError(
                    f"The weight file {file} of {self.name} is damaged: {reason_of(error)}.",
                    "Download the checkpoint again.",
                ) from None

    def _remove_damaged(self, files: list[str]) -> list[str]:
        """Remove those of some new files whose hash is not what the Hub states, and return them.

        The cache keeps each under that hash.
        """
        damaged = []
        for file in files:
            path = self.folder / file
            blob = path.resolve()
            is_named_by_hash = re.fullmatch("[0-9a-f]{64}", blob.name)
            if path.is_file() and is_named_by_hash and file_digest(blob) != blob.name:
                path.unlink()
                blob.unlink(missing_ok=True)
                damaged.append(file)
        return damaged


class DenseWeights:
    """The weights of a checkpoint, read tensor by tensor through transformers' own loading.

    Names are those of the model's modules, whatever the names on disk. Nothing stays in memory.

    Args:
        source: The model; its weight files must be at hand (`Source.fetch_weights`).

    Raises:
        WeightsError: A tensor is missing, has another shape than the config says, or cannot be read.
    """

    def __init__(self, source: Source) -> None:
        import transformers

        # accelerate would tell the user that weights are on disk, which is the point
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
        self._name = source.name
        self._scratch = tempfile.TemporaryDirectory(prefix="slicecli-")
        try:
            self._model, report = transformers.AutoModelForCausalLM.from_pretrained(
                source.folder,
                trust_remote_code=source.trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                dtype="auto",
                device_map={"": "disk"},
                offload_folder=self._scratch.name,
                output_loading_info=True,
            )
        except Exception as error:
            raise WeightsError(
                f"The weights of {source.name} cannot be loaded: {reason_of(error)}.",
                "Check that config.json belongs to these weights.",
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise WeightsError(
                f"The checkpoint of {source.name} lacks {len(missing)} tensors, the first of them {missing[0]}.",
                "Download it again, or check that config.json belongs to it.",
            )
        own = dict(self._model.named_parameters())
        shared = {name for name, _ in self._model.named_parameters(remove_duplicate=False)} - own.keys()
        self._names = [name for name in self._model.state_dict() if name not in shared]
        self.dtype: torch.dtype = self._model.dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Read one parameter or persistent buffer, on the CPU, in the checkpoint's dtype.

        Raises:
            WeightsError: It cannot be read, or holds NaN or infinity.
        """
        import torch
        from accelerate.utils import align_module_device

        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        try:
            with align_module_device(module, torch.device("cpu")):
                tensor: torch.Tensor = getattr(module, leaf).detach()
        except Exception as error:
            raise WeightsError(
                f"{name} of {self._name} cannot be read: {reason_of(error)}.",
                "Check that config.json belongs to these weights.",
            ) from error
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"{name} of {self._name} holds NaN or infinity.", "The checkpoint is damaged: get it again."
            )
        return tensor

    def module(self, path: str) -> dict[str, torch.Tensor]:
        """Read all parameters and persistent buffers below a module, by their names inside it."""
        prefix = f"{path}."
        return {name[len(prefix) :]: self.tensor(name) for name in self._names if name.startswith(prefix)}


def empty_model(config: Any, trust_remote_code: bool = False) -> Any:
    """Build a model of a config without memory for its parameters (all on `meta`), ready for evaluation.

    Raises:
        SourceError: transformers cannot build it.
    """
    import transformers
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise SourceError(
            f"transformers cannot build a model of this config: {reason_of(error)}.", "Check config.json."
        ) from error
    return with_plain_experts(model.eval())


def with_plain_experts(model: Any) -> Any:
    """Let a model's experts, if it has any, run in the plain loop, whose parts can be looked at; return the model."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by name."""
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def checkpoint_tensors(model: Any, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter as checkpoints of its family store it.

    Most are stored as they are; experts that transformers fuses into one tensor lie in the checkpoint one by one,
    which is how other programs expect them.

    Args:
        model: A model of the family, with or without weights.
        name: The parameter's name in the model.
        tensor: Its value.

    Returns:
        One or more tensors by their names in the checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, torch.Tensor] = revert_weight_conversion(model, {name: tensor})
    return stored


def _listed(files: list[str]) -> str:
    """Name a weight file, or the first of several."""
    return f"The weight file {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _read_config(folder: Path, name: str) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{name} has no config.json.", "Give the folder of a transformers model.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"The config.json of {name} cannot be read: {reason_of(error)}.") from None
    if not isinstance(fields, dict):
        raise SourceError(f"The config.json of {name} is not a JSON object.", "Give the folder of a model.")
    return fields


def _read_header(path: Path) -> dict[str, Any]:
    """Return the table at the head of a safetensors file; empty where it is damaged, which is found out later."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(size, MAX_HEADER_BYTES)))
        except (ValueError, RecursionError):
            return {}
    return header if isinstance(header, dict) else {}


def _indexed_files(path: Path) -> list[str]:
    """Return the shards an index names, refusing any that does not lie beside it."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"The index {path.name} is damaged: {reason_of(error)}.", "Get it again.") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise WeightsError(
                f"The index {path.name} points to {file!r}, which is not a safetensors file beside it.",
                "Do not use this checkpoint unless you know why.",
            )
    if not files:
        raise WeightsError(f"The index {path.name} names no files.", "Get it again.")
    return files


def _download(model: str, revision: str | None, token: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub

    def fetch() -> str:
        # what has arrived whole is not asked for again
        return huggingface_hub.snapshot_download(
            model, revision=revision, token=token, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )

    try:
        with quiet_client():
            return Path(patiently(fetch))
    except Exception as error:
        remedy = remedy_of_hub_error(error)
        if is_transient(error):
            remedy = f"{remedy[:-1]}; files that have arrived whole are kept."
        raise SourceError(f"The model {model!r} cannot be fetched: {describe_hub_error(error)}.", remedy) from error
