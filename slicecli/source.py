"""Where a model comes from: a Hub id or a folder, read cheap things first.

`Source.find` fetches only the small files, so that every refusal that a config can justify comes before a
single weight is downloaded.
"""

from __future__ import annotations

import functools
import glob
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicecli.checkpoint import file_digest
from slicecli.companions import (
    ABSENT,
    KNOWN_FILES,
    LINKED_FOLDER,
    MOST_KNOWN_BYTES,
    PRIVATE,
    Companions,
    choose_companions,
    list_folder,
    may_be_private,
)
from slicecli.config_files import read_config
from slicecli.errors import (
    SourceError,
    UnsupportedModelError,
    WeightsError,
    reason_of,
    shown,
)
from slicecli.front_matter import MOST_CARD_BYTES
from slicecli.hub.client import patiently, quiet_client
from slicecli.hub.errors import describe_hub_error, is_not_in_cache, is_transient, remedy_of_hub_error
from slicecli.hub.secrets import find_paths, find_tokens
from slicecli.json_files import MOST_JSON_BYTES, load_json, read_json
from slicecli.libraries import quiet_libraries
from slicecli.plan import DTYPE_CODES
from slicecli.shells import outline

__all__ = ["DESCRIPTION_FILES", "Source", "load_tokenizer", "tokenizer_code", "tokenizer_references"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
LONGEST_NAME = 255
MOST_HEADER_BYTES = 16_000_000
TOKENIZER_CONFIG = "tokenizer_config.json"
MOST_INDEX_BYTES = 48_000_000  # some hundred thousand tensors
CLASS_FIELDS = ("attribute_map", "sub_configs")  # that are no functions
DESCRIPTION_FILES = ("config.json", "README.md", "slicecli.json")  # what says what a model is, without loading it
MOST_BYTES_OF = {"config.json": MOST_JSON_BYTES, "README.md": MOST_CARD_BYTES, "slicecli.json": MOST_JSON_BYTES}


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
        with_companions: bool = True,
    ) -> Source:
        """Find a model by Hub id or folder and read its config.

        Args:
            model: Hub id or folder.
            revision: Revision on the Hub.
            token: Hub token.
            trust_remote_code: Whether code from the repository may run; it is fetched then.
            with_companions: Fetch all small files from the Hub, not only those that describe the model and its code.

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
            folder = _download(model, revision, token, DESCRIPTION_FILES)
            name, commit = model, folder.name
            if with_companions or trust_remote_code:
                sizes = _sizes_in_repository(model, commit, token, folder)
                companions = choose_companions(sizes, name, trust_remote_code)
                _download_companions(model, commit, token, companions, with_companions)
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise SourceError(
                f"The name {name!r} is too long, or has characters that cannot be printed, for a record to hold it.",
                "Rename the folder.",
            )
        return cls(name, folder, revision, commit, read_config(folder, name), token, trust_remote_code)

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
        if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
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
            SourceError: There is none, it needs code that is not trusted, or transformers cannot load it.
        """
        self._check_sizes()
        if not self.trust_remote_code:
            self._check_tokenizer_needs_no_code()
        try:
            return load_tokenizer(self.folder, self.trust_remote_code)
        except Exception as error:
            raise SourceError(
                f"The tokenizer of {self.name} cannot be loaded: {reason_of(error)}.",
                "The folder needs the tokenizer's files next to config.json.",
            ) from error

    def _check_tokenizer_needs_no_code(self) -> None:
        """Refuse a tokenizer of a class that transformers does not have: it would quietly take another one.

        Raises:
            SourceError: It is of such a class.
        """
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        references = tokenizer_code(self.folder)
        stems = {name.rpartition(".")[2].removesuffix("Fast") for name in references}
        if references and not any(tokenizer_class_from_name(f"{stem}{end}") for stem in stems for end in ("", "Fast")):
            raise SourceError(
                f"The tokenizer of {self.name} runs code of its own ({shown(references[0])}), which is not trusted.",
                "Give --trust-remote-code if you have read that code and trust it.",
            )

    def check_companions(self) -> None:
        """Refuse files that a slice would take over and that do not belong to the model, see `companions`.

        Raises:
            SourceError: There is one.
        """
        _ = self.companions

    @functools.cached_property
    def companions(self) -> Companions:
        """The files that go along with a slice, and those that do not.

        Raises:
            SourceError: One is a link to somewhere else: what lies there may be nobody else's business; or it is no
                regular file, or larger than any of its kind.
        """
        self._check_sizes()
        sizes, links = list_folder(self.folder)
        wanted = sizes
        if self.commit is not None:
            wanted = _sizes_in_repository(self.name, self.commit, self.token, self.folder)
        # a link to a folder stands for what is in it
        linked = {f"{link}/*": link for link in links}
        found = choose_companions({**wanted, **dict.fromkeys(linked, 0)}, self.name, self.trust_remote_code)
        reasons: dict[str, str] = {}
        for file in found.files:
            if file in linked:
                self._check_belongs(linked[file])
                reasons[file] = LINKED_FOLDER
            elif file not in sizes:
                reasons[file] = ABSENT
            else:
                self._check_belongs(file)
                if not (self.folder / file).is_file():
                    raise SourceError(f"{file} of {self.name} is no regular file.", "Get it again, or remove it.")
                if may_be_private(file, sizes[file]) and self._is_private(file):
                    reasons[file] = PRIVATE
        return found.without(reasons)

    def _is_private(self, file: str) -> bool:
        """Say whether a file holds what must not be published; a path in a file from the Hub was public before."""
        try:
            text = (self.folder / file).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise SourceError(
                f"{file} of {self.name} cannot be read: {error.strerror}.", "Check who may read it, or remove it."
            ) from error
        return bool(find_tokens(text) or (self.commit is None and find_paths(text)))

    def _check_belongs(self, file: str) -> None:
        """Refuse to follow a link out of the model's folder.

        Raises:
            SourceError: It leads out.
        """
        folder = self.folder.resolve()
        blobs = folder.parent.parent / "blobs"  # where the Hub's cache has the files of a model
        real = Path(os.path.realpath(self.folder / file))  # also where it leads nowhere
        if not real.is_relative_to(folder) and real.parent != blobs:
            raise SourceError(
                f"{file} of {self.name} is a link to something outside of the model's folder, and a slice would take "
                "it over.",
                "Copy it into the folder if it belongs to the model, else remove the link.",
            )

    def _check_sizes(self) -> None:
        """Refuse small files that are no such thing, which others would read whole.

        Raises:
            SourceError: One is.
        """
        known = {path for pattern in KNOWN_FILES for path in self.folder.glob(pattern) if not path.is_dir()}
        for path in sorted({*known, *(self.folder / name for name in DESCRIPTION_FILES)}):
            if path.exists() and not path.is_file():
                raise SourceError(f"{path.name} of {self.name} is no regular file.", "Get it again.")
            most = MOST_BYTES_OF.get(path.name, MOST_KNOWN_BYTES)
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

    @property
    def has_own_model_code(self) -> bool:
        """Whether the model's classes come from its own Python files, and not from transformers."""
        has_code = any(file.endswith(".py") for file in self.companions.files)
        return has_code and bool(self.fields.get("auto_map"))

    @property
    def has_own_tokenizer_code(self) -> bool:
        """Whether the tokenizer's class comes from the model's own Python files."""
        return self.trust_remote_code and bool(tokenizer_code(self.folder))

    @property
    def needs_remote_code(self) -> bool:
        """Whether loading the model or its tokenizer runs Python files of its own."""
        return self.has_own_model_code or self.has_own_tokenizer_code

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


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a folder; whatever transformers raises is raised."""
    import transformers

    with quiet_libraries():
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )


def tokenizer_code(folder: Path) -> list[str]:
    """Return where the tokenizer of a folder says that its classes are, see `tokenizer_references`."""
    return tokenizer_references(read_json(folder / TOKENIZER_CONFIG))


def tokenizer_references(fields: Any) -> list[str]:
    """Return where a tokenizer's config says that its classes are, as `file.Class`; nothing of transformers' own.

    Args:
        fields: The content of `tokenizer_config.json`, whatever it is.
    """
    found = fields.get("auto_map") if isinstance(fields, dict) else None
    if isinstance(found, dict):
        found = found.get("AutoTokenizer")
    references = found if isinstance(found, list) else [found]
    return [name for name in references if isinstance(name, str)]


def _sizes_in_repository(model: str, commit: str, token: str | None, folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a repository on the Hub by its path.

    The client keeps the list beside what it has downloaded; where it could not, what is in the cache has to do if the
    Hub cannot be asked.
    """
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        tree: Any = huggingface_hub.get_cached_repo_tree(model, revision=commit)
    except CachedRepoTreeNotFoundError:
        try:
            with quiet_client():
                tree = list(huggingface_hub.HfApi(token=token).list_repo_tree(model, revision=commit, recursive=True))
        except Exception:
            return list_folder(folder)[0]
    return {one.path: one.size for one in tree if isinstance(one, RepoFile)}


def _download_companions(
    model: str, commit: str, token: str | None, companions: Companions, with_companions: bool
) -> None:
    """Fetch what goes along with a slice, or only the code; without a network what loading reads has to do."""
    if not with_companions:
        _download(model, commit, token, tuple(file for file in companions.files if file.endswith(".py")))
        return
    _download(model, commit, token, (INDEX_FILE, *companions.needed()))
    try:
        _download(model, commit, token, companions.files)
    except SourceError as error:
        if not is_not_in_cache(error):
            raise


def _download(model: str, revision: str | None, token: str | None, files: tuple[str, ...]) -> Path:
    """Fetch those of some files that a repository has; return the folder they are in."""
    import huggingface_hub

    def fetch() -> str:
        # what has arrived whole is not asked for again
        return huggingface_hub.snapshot_download(
            model, revision=revision, token=token, allow_patterns=[glob.escape(file) for file in files]
        )

    try:
        with quiet_client():
            return Path(patiently(fetch))
    except Exception as error:
        remedy = remedy_of_hub_error(error)
        if is_transient(error):
            remedy = f"{remedy[:-1]}; files that have arrived whole are kept."
        raise SourceError(f"The model {model!r} cannot be fetched: {describe_hub_error(error)}.", remedy) from error
