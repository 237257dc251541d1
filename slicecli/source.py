"""Where a model comes from: a Hub id or a folder, read cheap things first.

`Source.find` fetches only the small files, so that every refusal that a config can justify comes before a
single weight is downloaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicecli.checkpoint import file_digest
from slicecli.config_files import read_config
from slicecli.errors import (
    OutputError,
    SourceError,
    UnsupportedModelError,
    WeightsError,
    reason_of,
    shown,
)
from slicecli.front_matter import MOST_CARD_BYTES
from slicecli.hub.client import patiently, quiet_client
from slicecli.hub.errors import describe_hub_error, is_transient, remedy_of_hub_error
from slicecli.json_files import MOST_JSON_BYTES, load_json
from slicecli.libraries import quiet_libraries
from slicecli.modeling import CONFIG_TYPE
from slicecli.plan import DTYPE_CODES
from slicecli.shells import outline

__all__ = ["DESCRIPTION_FILES", "Snapshot", "Source", "check_may_change", "name_of_folder"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
COMMIT = re.compile("[0-9a-f]{40}")
LONGEST_NAME = 255
MOST_HEADER_BYTES = 16_000_000
MOST_COMPANION_BYTES = 200_000_000
MOST_INDEX_BYTES = 48_000_000  # some hundred thousand tensors
CODE_CLASSES = frozenset({"AutoConfig", "AutoModelForCausalLM"})  # that are not transformers' own where auto_map says
CLASS_FIELDS = ("attribute_map", "sub_configs")  # that are no functions
MODALITY = re.compile(
    r"^(text|vision|visual|image|audio|video|speech|codec|protein|vlm|vq|thinker|talker)(_\w*)?_config$|^visual$"
)
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
MOST_BYTES_OF = {"config.json": MOST_JSON_BYTES, "README.md": MOST_CARD_BYTES, "slicecli.json": MOST_JSON_BYTES}
SMALL_FILES = (*DESCRIPTION_FILES, INDEX_FILE, *COMPANION_FILES)


@dataclass(frozen=True)
class Snapshot:
    """A revision of a model in a cache of the Hub's client.

    Attributes:
        name: The Hub id.
        commit: The commit hash.
        cache: The cache.
    """

    name: str
    commit: str
    cache: Path

    @classmethod
    def of(cls, folder: Path) -> Snapshot | None:
        """Return what a folder is if it lies where the client puts a revision, in whichever cache; else `None`."""
        real = folder.resolve()
        repository = real.parent.parent
        kind, _, name = repository.name.partition("--")
        if kind != "models" or not name or real.parent.name != "snapshots" or not COMMIT.fullmatch(real.name):
            return None
        return cls(name.replace("--", "/"), real.name, repository.parent)


def name_of_folder(folder: Path) -> str:
    """Return what records and cards call the model in a folder: its Hub id in a cache, else the folder's own name."""
    snapshot = Snapshot.of(folder)
    return folder.resolve().name if snapshot is None else snapshot.name


def check_may_change(folder: Path) -> None:
    """Refuse to change the files of a slice in the Hub's cache, where they stand for what was published.

    Raises:
        OutputError: It lies there.
    """
    if (snapshot := Snapshot.of(folder)) is not None:
        raise OutputError(
            f"{snapshot.name} lies in the cache of the Hub, which keeps what was published.",
            "Copy the folder to another place first.",
        )


@dataclass(frozen=True)
class Source:
    """A model whose small files are at hand.

    Attributes:
        name: The Hub id, or the folder's own name: what records and cards may show.
        folder: The local folder with the files.
        revision: The revision asked for; `None` for a local folder or the default branch.
        commit: The commit hash on the Hub; `None` for a local folder.
        cache: The Hub's cache that the folder was found in, where the model was named by its path there.
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
    cache: Path | None = None

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
        cache = None
        if path.is_dir():
            folder, name, commit = path, name_of_folder(path), None
            if (snapshot := Snapshot.of(path)) is not None:
                commit, cache = snapshot.commit, snapshot.cache
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
        return cls(name, folder, revision, commit, read_config(folder, name), token, trust_remote_code, cache)

    def size(self, field: str, least: int = 1) -> int | None:
        """Return a field of the config that is a size, or `None` where it is missing or null.

        Raises:
            SourceError: It is no integer, or less than the least there can be.
        """
        value = self.fields.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise SourceError(
                f"The config.json of {self.name} gives {field} = {shown(value)}, where an integer of {least} or more "
                "is needed.",
                "Check config.json.",
            )
        return value

    def check_is_decoder(self) -> None:
        """Refuse what cannot be a dense decoder language model, judging by the config alone.

        Raises:
            SourceError: The config does not say what it is.
            UnsupportedModelError: Encoder, encoder-decoder, multimodal, quantised, or no model of its own.
        """
        kind = shown(self.fields.get("model_type", "?")).strip("'")
        architectures = self.fields.get("architectures") or []
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise SourceError(
                f"The config.json of {self.name} gives architectures = {shown(architectures)}, where a list of names "
                "is needed.",
                "Check config.json.",
            )
        if (self.folder / ADAPTER_FILE).exists():
            # transformers would load the model that is named in it instead
            raise UnsupportedModelError(
                f"{self.name} has an {ADAPTER_FILE}: it holds changes to another model.",
                "Merge them into that model first, or remove the file if this is the merged model.",
            )
        if self.fields.get("is_encoder_decoder"):
            raise UnsupportedModelError(
                f"{self.name} ({kind}) is an encoder-decoder model.", "Only decoder language models can be sliced."
            )
        is_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
        parts = [] if is_causal or self.fields.get("model_type") == CONFIG_TYPE else _modalities(self.fields)
        if parts:
            raise UnsupportedModelError(
                f"{self.name} ({kind}) is a multimodal model: its config has {', '.join(parts)}.",
                "Only decoder language models can be sliced.",
            )
        if architectures and not is_causal:
            raise UnsupportedModelError(
                f"{self.name} ({shown(', '.join(architectures))}) is not a decoder language model.",
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

        for field in self.fields:
            if field in CLASS_FIELDS or callable(getattr(transformers.PreTrainedConfig, field, None)):
                raise SourceError(
                    f"The config.json of {self.name} has {shown(field)}, which is a part of config classes.",
                    "Remove it.",
                )
        try:
            with quiet_libraries():
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

        if self.cache is not None and not any(self.companion_files()):
            # only what describes it has been fetched so far
            _download(self.name, self.commit, self.token, SMALL_FILES, self.cache)
        self._check_sizes()
        try:
            with quiet_libraries():
                return transformers.AutoTokenizer.from_pretrained(
                    self.folder, trust_remote_code=self.trust_remote_code, local_files_only=True
                )
        except Exception as error:
            raise SourceError(
                f"The tokenizer of {self.name} cannot be loaded: {reason_of(error)}.",
                "The folder needs the tokenizer's files next to config.json.",
            ) from error

    def check_companions(self) -> None:
        """Refuse files that a slice would take over and that do not belong to the model, before anything is computed.

        Raises:
            SourceError: One is a link to somewhere else: what lies there may be nobody else's business; or no file of
                its kind is so large.
        """
        folder = self.folder.resolve()
        blobs = folder.parent.parent / "blobs"  # where the Hub's cache has the files of a model
        for path in (*self.companion_files(), *self.code_files()):
            real = path.resolve()
            if not real.is_relative_to(folder) and real.parent != blobs:
                raise SourceError(
                    f"{path.name} of {self.name} is a link to a file outside of the model's folder, and a slice would "
                    "take it over.",
                    "Copy the file into the folder if it belongs to the model.",
                )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Refuse small files that are no such thing, which others would read whole.

        Raises:
            SourceError: One is.
        """
        for path in (*self.companion_files(), *(self.folder / name for name in DESCRIPTION_FILES)):
            if path.exists() and not path.is_file():
                raise SourceError(f"{path.name} of {self.name} is no regular file.", "Get it again.")
            most = MOST_BYTES_OF.get(path.name, MOST_COMPANION_BYTES)
            if path.exists() and path.stat().st_size > most:
                raise SourceError(
                    f"{path.name} of {self.name} has {path.stat().st_size:,} bytes, more than such a file needs.",
                    "Get it again.",
                )

    def stored_dtype(self) -> str:
        """Return the dtype of the checkpoint: what the config says, else the first weight file, else float32."""
        dtype = str(self.fields.get("dtype") or self.fields.get("torch_dtype")).removeprefix("torch.")
        if dtype in DTYPE_CODES:
            return dtype
        names = {code: name for name, code in DTYPE_CODES.items()}
        for path in sorted(self.folder.glob("model*.safetensors")):
            for entry in _read_header(path).values() if path.is_file() else ():
                if isinstance(entry, dict) and str(entry.get("dtype")) in names:
                    return names[entry["dtype"]]
        return "float32"

    def companion_files(self) -> Iterator[Path]:
        """Yield the files a slice takes over unchanged: tokenizer, generation config, chat template, licences."""
        found = {path for pattern in COMPANION_FILES for path in self.folder.glob(pattern) if path.is_file()}
        yield from sorted(found)

    @property
    def has_own_code(self) -> bool:
        """Whether the classes of config or model are not transformers' own, but those that its config names."""
        named = self.fields.get("auto_map")
        return self.trust_remote_code and isinstance(named, dict) and not CODE_CLASSES.isdisjoint(named)

    def check_code_is_here(self) -> None:
        """Refuse a model whose code lies in another repository, from which a slice would have to take it too.

        Raises:
            UnsupportedModelError: It does.
        """
        named = self.fields["auto_map"] if self.has_own_code else {}
        elsewhere = next((named[kind] for kind in CODE_CLASSES if "--" in str(named.get(kind, ""))), None)
        if elsewhere is not None:
            raise UnsupportedModelError(
                f"{self.name} takes its code from another repository: {shown(elsewhere)}.",
                "Copy the Python files into a folder with the model, and let auto_map in config.json name them there.",
            )

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

        if self.cache is not None and not any((self.folder / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
            _download(self.name, self.commit, self.token, (INDEX_FILE,), self.cache)
        files = self.weight_files()
        new = [file for file in files if not (self.folder / file).is_file()]
        if self.commit is not None and (new or self.cache is None):
            try:
                _download(self.name, self.commit, self.token, tuple(files), self.cache)
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
            except (SafetensorError, OSError, ValueError, OverflowError) as error:
                raise WeightsError(
                    f"The weight file {file} of {self.name} is damaged: {reason_of(error)}.",
                    "Download the checkpoint again.",
                ) from None

    def check_describes_weights(self) -> None:
        """Refuse a config that describes a far larger model than the weight files hold.

        Whatever is not in them would be made up, and of any size; where less is missing, it is named later.

        Raises:
            SourceError: transformers cannot build the model.
            WeightsError: There are not half as many numbers in the files as the model has.
        """
        from safetensors import safe_open

        parameters = sum(value.numel() for value in outline(self.config(), self.trust_remote_code).parameters())
        held = 0
        for file in self.weight_files():
            with safe_open(self.folder / file, framework="pt") as tensors:
                held += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        if 2 * held < parameters:
            raise WeightsError(
                f"The weight files of {self.name} hold {held:,} numbers, and a model of its config has {parameters:,}.",
                "Download it again, or check that config.json belongs to it.",
            )

    def check_is_complete(self, report: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of which transformers had to make up a part.

        Args:
            report: What transformers says of the loading.

        Raises:
            WeightsError: A tensor is missing.
        """
        missing = sorted(report["missing_keys"])
        if missing:
            raise WeightsError(
                f"The checkpoint of {self.name} lacks {len(missing)} tensors, the first of them {missing[0]}.",
                "Download it again, or check that config.json belongs to it.",
            )

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


def _modalities(fields: Mapping[str, Any]) -> list[str]:
    """Return the fields of a config that describe models for single modalities inside one."""
    return [
        shown(name).strip("'")
        for name, value in fields.items()
        if MODALITY.search(name) and isinstance(value, dict) and value
    ]


def _listed(files: list[str]) -> str:
    """Name a weight file, or the first of several."""
    return f"The weight file {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _read_header(path: Path) -> dict[str, Any]:
    """Return the table at the head of a safetensors file; empty where it is damaged, which is found out later."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, MOST_HEADER_BYTES)))
    except (OSError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _indexed_files(path: Path) -> list[str]:
    """Return the shards an index names, refusing any that does not lie beside it."""
    try:
        weight_map = load_json(path, MOST_INDEX_BYTES)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"The index {path.name} is damaged: {reason_of(error)}.", "Get it again.") from None
    for file in files:
        if not isinstance(file, str) or not _is_file_name(file) or not file.endswith(".safetensors"):
            raise WeightsError(
                f"The index {path.name} points to {shown(file)}, which is not a safetensors file beside it.",
                "Do not use this checkpoint unless you know why.",
            )
    if not files:
        raise WeightsError(f"The index {path.name} names no files.", "Get it again.")
    return files


def _is_file_name(text: str) -> bool:
    """Say whether a text can be the name of a file in a folder, on any system and in any message."""
    return text.isprintable() and len(text.encode()) <= LONGEST_NAME and not set(text) & set("/\\:")


def _download(
    model: str, revision: str | None, token: str | None, patterns: tuple[str, ...], cache: Path | None = None
) -> Path:
    import huggingface_hub

    def fetch() -> str:
        # what has arrived whole is not asked for again
        return huggingface_hub.snapshot_download(
            model,
            revision=revision,
            token=token,
            cache_dir=cache,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )

    try:
        with quiet_client():
            return Path(patiently(fetch))
    except Exception as error:
        remedy = remedy_of_hub_error(error)
        if is_transient(error):
            remedy = f"{remedy[:-1]}; files that have arrived whole are kept."
        raise SourceError(f"The model {model!r} cannot be fetched: {describe_hub_error(error)}.", remedy) from error
