"""Where a model comes from: a Hub id or a folder, read cheap things first.

`Source.find` fetches only the small files, so that every refusal that a config can justify comes before a
single weight is downloaded.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.companions import (
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
from slicecli.checkpoint.comparison import Comparison, compare, find_stored, loaded_fields
from slicecli.checkpoint.config_files import CONFIG_FILE, read_config
from slicecli.checkpoint.folder import file_digest
from slicecli.checkpoint.foreign import FOREIGN_FILES, check_is_whole, check_not_quantised, refuse_without_config
from slicecli.checkpoint.load_report import check_stored
from slicecli.checkpoint.meta_model import build_meta_model
from slicecli.checkpoint.tokenizer_errors import has_vocabulary, tokenizer_error, why_not_loaded
from slicecli.checkpoint.weight_headers import (
    INDEX_FILE,
    LONGEST_NAME,
    SINGLE_FILE,
    StoredTensor,
    content_digest,
    entry_file,
    stored_tensors,
    weight_file_names,
)
from slicecli.errors import (
    OutputError,
    RequestError,
    SlicecliWarning,
    SourceError,
    UnsupportedModelError,
    WeightsError,
    reason_of,
    shown,
)
from slicecli.family.dimensions import Dimensions
from slicecli.family.slice_plan import DTYPE_CODES
from slicecli.modeling import CONFIG_TYPE
from slicecli.runtime.front_matter import MOST_CARD_BYTES
from slicecli.runtime.hub_client import patiently, quiet_client
from slicecli.runtime.hub_errors import describe_hub_error, is_not_in_cache, is_transient, remedy_of_hub_error
from slicecli.runtime.inputs import describe_shadow, find_folder
from slicecli.runtime.json import MOST_JSON_BYTES, read_json
from slicecli.runtime.libraries import quiet_libraries
from slicecli.runtime.secrets import find_paths, find_tokens

if TYPE_CHECKING:
    from slicecli.adapters import Adapter

__all__ = [
    "DESCRIPTION_FILES",
    "HubSnapshot",
    "Source",
    "check_may_change",
    "load_tokenizer",
    "name_of_folder",
    "tokenizer_code",
    "tokenizer_references",
]

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
TOKENIZER_CONFIG = "tokenizer_config.json"
COMMIT = re.compile("[0-9a-f]{40}")
CODE_CLASSES = frozenset({"AutoConfig", "AutoModelForCausalLM"})  # that are not transformers' own where auto_map says
CLASS_FIELDS = ("attribute_map", "sub_configs")  # that are no functions
MODALITY = re.compile(
    r"^(text|vision|visual|image|audio|video|speech|codec|protein|vlm|vq|thinker|talker)(_\w*)?_config$|^visual$"
)
# what says what a model is, without loading it
DESCRIPTION_FILES = ("config.json", "README.md", "slicecli.json", *FOREIGN_FILES)
MOST_BYTES_OF = {"config.json": MOST_JSON_BYTES, "README.md": MOST_CARD_BYTES, "slicecli.json": MOST_JSON_BYTES}


@dataclass(frozen=True)
class HubSnapshot:
    """A revision of a model in a cache of the Hub's client."""

    name: str
    commit: str
    cache: Path

    @classmethod
    def of(cls, folder: Path) -> HubSnapshot | None:
        """Return what a folder is if it lies where the client puts a revision, in whichever cache; else `None`."""
        real = folder.resolve()
        repository = real.parent.parent
        kind, _, name = repository.name.partition("--")
        if kind != "models" or not name or real.parent.name != "snapshots" or not COMMIT.fullmatch(real.name):
            return None
        return cls(name.replace("--", "/"), real.name, repository.parent)


def name_of_folder(folder: Path) -> str:
    """Return what records and cards call the model in a folder: its Hub id in a cache, else the folder's own name."""
    snapshot = HubSnapshot.of(folder)
    return folder.resolve().name if snapshot is None else snapshot.name


def check_may_change(folder: Path) -> None:
    """Refuse to change the files of a slice in the Hub's cache, where they stand for what was published."""
    if (snapshot := HubSnapshot.of(folder)) is not None:
        raise OutputError(
            f"{snapshot.name} is in the Hub cache, which must not be changed.",
            "Copy the folder to another place first.",
        )


@dataclass(frozen=True)
class Source:
    """A model whose small files are at hand.

    Attributes:
        name: The Hub id, or the folder's own name: what records and cards may show.
        revision: The revision asked for; `None` for a local folder or the default branch.
        commit: The commit hash on the Hub; `None` for a local folder.
        cache: The Hub's cache that the folder was found in, where the model was named by its path there.
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
        with_companions: bool = True,
    ) -> Source:
        """Find a model by Hub id or folder and read its config."""
        if revision is not None and not revision.strip():
            raise RequestError("The revision is empty.", "Pass a branch, tag or commit, or leave out --revision.")
        local = find_folder(model)
        if local is not None and revision is not None:
            raise RequestError(
                f"{shown(model)} is a local folder, which has no revisions.",
                f"Leave out --revision. {describe_shadow(model)}",
            )
        snapshot = None if local is None else HubSnapshot.of(local)
        cache = None if snapshot is None else snapshot.cache
        if local is not None:
            folder, name = local, name_of_folder(local)
            commit = None if snapshot is None else snapshot.commit
        else:
            folder = _download(model, revision, token, DESCRIPTION_FILES)
            name, commit = model, folder.name
        if commit is not None and (with_companions or trust_remote_code):
            sizes = _sizes_in_repository(name, commit, token, folder, cache)
            companions = choose_companions(sizes, name, trust_remote_code)
            # a revision in a cache may be whole where the Hub cannot be reached
            if cache is None or not all((folder / file).exists() for file in companions.files):
                _download_companions(name, commit, token, companions, with_companions, cache)
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise SourceError(
                f"The name {name!r} cannot be recorded: it is too long or has unprintable characters.",
                "Rename the folder.",
            )
        if not (folder / CONFIG_FILE).exists():
            shadow = "" if local is None else describe_shadow(model)
            refuse_without_config(name, folder, _all_files(folder, model, commit, token, cache), shadow)
        return cls(name, folder, revision, commit, read_config(folder, name), token, trust_remote_code, cache)

    def size(self, field: str, least: int = 1) -> int | None:
        """Return a field of the config that is a size, or `None` where it is missing or null."""
        value = self.fields.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise SourceError(
                f"The config.json of {self.name} gives {field} = {shown(value)}, but an integer of {least} or more is "
                "required.",
                "Check config.json.",
            )
        return value

    def check_is_decoder(self) -> None:
        """Refuse what cannot be a dense decoder language model, judging by the config alone."""
        kind = shown(self.fields.get("model_type", "?")).strip("'")
        architectures = self.fields.get("architectures") or []
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise SourceError(
                f"The config.json of {self.name} gives architectures = {shown(architectures)}, but a list of names is "
                "required.",
                "Check config.json.",
            )
        check_is_whole(self.name, self.folder)
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
        check_not_quantised(self.name, self.folder, self.fields)

    def config(self) -> Any:
        """Return the transformers config."""
        import transformers

        for field in self.fields:
            if field in CLASS_FIELDS or callable(getattr(transformers.PreTrainedConfig, field, None)):
                raise SourceError(
                    f"The config.json of {self.name} has a field {shown(field)}, which is reserved by config classes.",
                    "Remove the field.",
                )
        try:
            with quiet_libraries():
                return transformers.AutoConfig.from_pretrained(
                    self.folder, trust_remote_code=self.trust_remote_code, local_files_only=True
                )
        except Exception as error:  # transformers raises many kinds for a bad config
            raise SourceError(
                f"transformers rejects the config of {self.name}: {reason_of(error)}.", "Check config.json."
            ) from error

    def tokenizer(self) -> Any:
        """Return the tokenizer."""
        self._check_sizes()
        if not self.trust_remote_code:
            self._check_tokenizer_needs_no_code()
        try:
            tokenizer = load_tokenizer(self.folder, self.trust_remote_code)
        except Exception as error:
            raise tokenizer_error(self.name, self.folder, why_not_loaded(error)) from error
        if not has_vocabulary(tokenizer):
            raise tokenizer_error(self.name, self.folder, "its vocabulary has only special tokens")
        return tokenizer

    def _check_tokenizer_needs_no_code(self) -> None:
        """Refuse a tokenizer of a class that transformers does not have: it would quietly take another one."""
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        references = tokenizer_code(self.folder)
        stems = {name.rpartition(".")[2].removesuffix("Fast") for name in references}
        if references and not any(tokenizer_class_from_name(f"{stem}{end}") for stem in stems for end in ("", "Fast")):
            raise SourceError(
                f"The tokenizer of {self.name} runs its own code ({shown(references[0])}), which is not trusted.",
                "Use --trust-remote-code if you have read that code and trust it.",
            )

    def check_companions(self) -> None:
        """Refuse files that a slice would take over and that do not belong to the model, see `companions`."""
        _ = self.companions

    @functools.cached_property
    def companions(self) -> Companions:
        """The files that go along with a slice, and those that do not."""
        self._check_sizes()
        sizes, links = list_folder(self.folder)
        wanted = sizes
        if self.commit is not None:
            wanted = _sizes_in_repository(self.name, self.commit, self.token, self.folder, self.cache)
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
                    raise SourceError(
                        f"{file} of {self.name} is not a regular file.", "Download it again, or remove it."
                    )
                if may_be_private(file, sizes[file]) and self._is_private(file):
                    reasons[file] = PRIVATE
        return found.without(reasons)

    def _is_private(self, file: str) -> bool:
        """Say whether a file holds what must not be published; a path in a file from the Hub was public before."""
        try:
            text = (self.folder / file).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise SourceError(
                f"{file} of {self.name} cannot be read: {error.strerror}.", "Check its permissions, or remove it."
            ) from error
        return bool(find_tokens(text) or (self.commit is None and find_paths(text)))

    def _check_belongs(self, file: str) -> None:
        """Refuse to follow a link out of the model's folder."""
        folder = self.folder.resolve()
        blobs = folder.parent.parent / "blobs"  # where the Hub's cache has the files of a model
        real = Path(os.path.realpath(self.folder / file))  # also where it leads nowhere
        if not real.is_relative_to(folder) and real.parent != blobs:
            raise SourceError(
                f"{file} of {self.name} links to something outside the model's folder, which would be copied into the "
                "slice.",
                "Copy it into the folder if it belongs to the model; otherwise remove the link.",
            )

    def _check_sizes(self) -> None:
        """Refuse small files that are no such thing, which others would read whole."""
        known = {path for pattern in KNOWN_FILES for path in self.folder.glob(pattern) if not path.is_dir()}
        for path in sorted({*known, *(self.folder / name for name in DESCRIPTION_FILES)}):
            if path.exists() and not path.is_file():
                raise SourceError(f"{path.name} of {self.name} is not a regular file.", "Download it again.")
            most = MOST_BYTES_OF.get(path.name, MOST_KNOWN_BYTES)
            if path.exists() and path.stat().st_size > most:
                raise SourceError(
                    f"{path.name} of {self.name} has {path.stat().st_size:,} bytes, too large for such a file.",
                    "Download it again.",
                )

    def stored_dtype(self) -> str:
        """Return the dtype of the checkpoint: what the config says, else the first weight file, else float32."""
        dtype = str(self.fields.get("dtype") or self.fields.get("torch_dtype")).removeprefix("torch.")
        if dtype in DTYPE_CODES:
            return dtype
        names = {code: name for name, code in DTYPE_CODES.items()}
        tensors: Mapping[str, StoredTensor] | None = None
        with suppress(WeightsError):  # said later
            tensors = self.stored_tensors()
        return next((names[one.dtype] for one in (tensors or {}).values() if one.dtype in names), "float32")

    @property
    def has_own_model_code(self) -> bool:
        """Whether the classes of config or model are not transformers' own, but those that its config names."""
        named = self.fields.get("auto_map")
        return self.trust_remote_code and isinstance(named, dict) and not CODE_CLASSES.isdisjoint(named)

    @property
    def has_own_tokenizer_code(self) -> bool:
        """Whether the tokenizer's class comes from the model's own Python files."""
        return self.trust_remote_code and bool(tokenizer_code(self.folder))

    @property
    def needs_remote_code(self) -> bool:
        """Whether loading the model or its tokenizer runs Python files of its own."""
        return self.has_own_model_code or self.has_own_tokenizer_code

    def check_code_is_here(self) -> None:
        """Refuse a model whose code lies in another repository, from which a slice would have to take it too."""
        named = self.fields["auto_map"] if self.has_own_model_code else {}
        elsewhere = next((named[kind] for kind in CODE_CLASSES if "--" in str(named.get(kind, ""))), None)
        if elsewhere is not None:
            raise UnsupportedModelError(
                f"{self.name} loads code from another repository: {shown(elsewhere)}.",
                "Copy the Python files into the model's folder, and point auto_map in config.json to them.",
            )

    def weight_files(self) -> list[str]:
        """Return the names of the files that transformers reads the weights from."""
        files = weight_file_names(self.folder, self.fields)
        if files:
            return files
        names = _all_files(self.folder, self.name, self.commit, self.token, self.cache)
        if any(PurePosixPath(name).suffix in PICKLE_SUFFIXES for name in names):
            raise WeightsError(
                f"{self.name} has only pickle weight files, which can run code when loaded.",
                "Convert them to safetensors, or use a revision that has safetensors files.",
            )
        raise WeightsError(
            f"{self.name} has no weights ({SINGLE_FILE} or {INDEX_FILE}).",
            "Check the folder." if self.commit is None else "Check the repository.",
        )

    def stored_tensors(self) -> dict[str, StoredTensor] | None:
        """Return what the headers of the weight files say, or `None` where the files are not on this machine."""
        files = weight_file_names(self.folder, self.fields)
        if not files or not all((self.folder / file).is_file() for file in files):
            return None
        return stored_tensors(self.folder, files)

    def loaded_fields(self, adapter: Adapter, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return fields of the config as they are once the weights are loaded, as far as weights are at hand.

        Warns:
            SlicecliWarning: They differ.
        """
        found = loaded_fields(adapter, fields, self.folder, self.stored_tensors())
        if found is not fields:
            warnings.warn(
                f"The config.json of {self.name} ties the head to the embeddings (tie_word_embeddings), but the "
                "weight files hold a separate head, which is loaded and counted.",
                SlicecliWarning,
                stacklevel=2,
            )
        return found

    def dimensions(
        self, adapter: Adapter, fields: Mapping[str, Any], unties: bool = False
    ) -> tuple[Dimensions, Comparison]:
        """Return the sizes of the model as it is loaded, and how its weight files differ from its config."""
        tensors = self.stored_tensors()
        check_stored(self.name, tensors or {})
        dimensions = Dimensions(adapter, self.loaded_fields(adapter, fields), unties)
        return dimensions, Comparison((), ()) if tensors is None else compare(dimensions, tensors, self.name)

    @functools.cached_property
    def content(self) -> str:
        """A digest of config and weights (`weight_headers.content_digest`); the weights must be at hand."""
        return content_digest(self.folder, self.fields, stored_tensors(self.folder, self.weight_files()))

    def identity(self) -> dict[str, Any]:
        """Return what changes when the model does, as plain data: content, code, and commit or times of the files.

        The weights must be at hand. Sizes and times of a folder's files tell of changes between the samples that the
        digest of the content takes.
        """
        code = sorted(self.folder.glob("*.py")) if self.trust_remote_code else []
        states = [] if self.commit else [(name, (self.folder / name).stat()) for name in self.weight_files()]
        return {
            "model": self.name,
            "commit": self.commit,
            "content": self.content,
            "code": {path.name: file_digest(path) for path in code if path.is_file()},
            "files": [[name, state.st_size, state.st_mtime_ns] for name, state in states],
        }

    def fetch_weights(self) -> None:
        """Make sure the weight files are whole and on this machine, downloading them where needed."""
        from safetensors import SafetensorError, safe_open

        if self.commit is not None:
            names = _sizes_in_repository(self.name, self.commit, self.token, self.folder, self.cache)
            self._fetch([entry_file(names, self.fields) or SINGLE_FILE])
            self._fetch(self.weight_files())
        for file in self.weight_files():
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

    def _fetch(self, files: list[str]) -> None:
        """Download weight files of a Hub model that are there, and check those that are new."""
        new = [file for file in files if not (self.folder / file).is_file()]
        if not new:
            return
        try:
            _download(self.name, self.commit, self.token, new, self.cache)
        except SourceError:
            # the next run takes for whole what is there
            self._remove_damaged(new)
            raise
        if damaged := self._remove_damaged(new):
            raise WeightsError(
                f"{_listed(damaged)} of {self.name} arrived damaged: the hash differs from the Hub's.",
                "The damaged files were removed; run the command again to download them.",
            )

    def check_describes_weights(self) -> None:
        """Refuse weight files without the weights themselves, or with far fewer than the config describes.

        Whatever is not in them would be made up, and of any size; where less is missing, it is named later.
        """
        tensors = stored_tensors(self.folder, self.weight_files())
        check_stored(self.name, tensors)
        parameters = sum(
            value.numel() for value in build_meta_model(self.config(), self.trust_remote_code).parameters()
        )
        held = sum(one.elements for one in tensors.values())
        if 2 * held < parameters:
            raise WeightsError(
                f"The weight files of {self.name} hold {held:,} numbers, but its config requires {parameters:,}.",
                "Download them again, or check that config.json belongs to them.",
            )

    def loading_error(self, error: Exception) -> WeightsError:
        """Return the error that says why transformers cannot load the weights."""
        remedy = "Check that config.json belongs to these weights."
        with suppress(SourceError):
            tensors = stored_tensors(self.folder, self.weight_files())
            for name, value in build_meta_model(self.config(), self.trust_remote_code).named_parameters():
                stored = find_stored(tensors, name)
                if stored is not None and tensors[stored].shape != tuple(value.shape):
                    sizes = (
                        f"{tensors[stored].shape} in the weight files, but its config.json implies {tuple(value.shape)}"
                    )
                    return WeightsError(f"{stored} of {self.name} is {sizes}.", remedy)
        return WeightsError(f"The weights of {self.name} cannot be loaded: {reason_of(error)}.", remedy)

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
    """Return where a tokenizer's config says that its classes are, as `file.Class`; nothing of transformers' own."""
    found = fields.get("auto_map") if isinstance(fields, dict) else None
    if isinstance(found, dict):
        found = found.get("AutoTokenizer")
    references = found if isinstance(found, list) else [found]
    return [name for name in references if isinstance(name, str)]


def _sizes_in_repository(
    model: str, commit: str, token: str | None, folder: Path, cache: Path | None
) -> dict[str, int]:
    """Return the bytes of each file of a repository on the Hub by its path.

    The client keeps the list beside what it has downloaded; where it could not, what is in the cache has to do if the
    Hub cannot be asked.
    """
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        tree: Any = huggingface_hub.get_cached_repo_tree(model, revision=commit, cache_dir=cache)
    except CachedRepoTreeNotFoundError:
        try:
            with quiet_client():
                tree = list(huggingface_hub.HfApi(token=token).list_repo_tree(model, revision=commit, recursive=True))
        except Exception:
            return list_folder(folder)[0]
    return {one.path: one.size for one in tree if isinstance(one, RepoFile)}


def _all_files(folder: Path, model: str, commit: str | None, token: str | None, cache: Path | None) -> list[str]:
    """Return the names of the files of a folder, or of a repository; of one that cannot be asked, those at hand."""
    if commit is not None:
        return list(_sizes_in_repository(model, commit, token, folder, cache))
    return [path.name for path in folder.iterdir()]


def _download_companions(
    model: str, commit: str, token: str | None, companions: Companions, with_companions: bool, cache: Path | None
) -> None:
    """Fetch what goes along with a slice, or only the code; without a network what loading reads has to do."""
    if not with_companions:
        _download(model, commit, token, [file for file in companions.files if file.endswith(".py")], cache)
        return
    _download(model, commit, token, (INDEX_FILE, *companions.needed()), cache)
    try:
        _download(model, commit, token, companions.files, cache)
    except SourceError as error:
        if not is_not_in_cache(error):
            raise


def _download(
    model: str, revision: str | None, token: str | None, files: Sequence[str], cache: Path | None = None
) -> Path:
    """Fetch those of some files that a repository has; return the folder they are in."""
    import huggingface_hub

    def fetch() -> str:
        # what has arrived whole is not asked for again
        return huggingface_hub.snapshot_download(
            model,
            revision=revision,
            token=token,
            cache_dir=cache,
            allow_patterns=[glob.escape(file) for file in files],
        )

    try:
        with quiet_client():
            return Path(patiently(fetch))
    except Exception as error:
        remedy = remedy_of_hub_error(error)
        if is_transient(error):
            remedy = f"{remedy[:-1]}; completed files are kept."
        raise SourceError(f"The model {model!r} cannot be fetched: {describe_hub_error(error)}.", remedy) from error
