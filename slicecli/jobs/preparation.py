"""What is in a slice's folder before its weights are computed, and whether it loads: hours are at stake otherwise.

Config, tokenizer, licences and code are known in planning. They are put into the unfinished folder first and read back
as whoever loads the slice will read them: the config and the generation config, the empty model, and the tokenizer,
which has to do what the dense model's does.
"""

from __future__ import annotations

import json
import operator
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.folder import clear_folder
from slicecli.checkpoint.legacy_fields import with_legacy_fields
from slicecli.checkpoint.meta_model import build_runnable_meta_model
from slicecli.checkpoint.source import TOKENIZER_CONFIG, load_tokenizer, tokenizer_code
from slicecli.errors import OutputError, PluginError, SourceError, reason_of, shown
from slicecli.modeling import CODE_FILES
from slicecli.runtime.json import read_json
from slicecli.runtime.libraries import quiet_libraries, running
from slicecli.slicing.journal import is_progress

if TYPE_CHECKING:
    from slicecli.checkpoint.source import Source
    from slicecli.family.slice_plan import SlicePlan
    from slicecli.jobs.plan import Job, PlannedSlice

__all__ = ["check_loads", "copy_companions", "prepare_folders", "rehearse", "write_config"]

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
# what tokenizers treat in different ways
TEXTS = (
    "",
    "The quick brown fox jumps over 13 lazy dogs.",
    "  two spaces,\ta tab\n\n and the end of a line \n",
    "Grüße, привет, 你好, שלום, नमस्ते; e\u0301, \u200b\ufb01, 🤷🏽\u200d♀️",
    "def f(x):\n    return {'a': x != 0.5e-10}  # <|end|> [INST] </s>",
)
CONVERSATION = (
    {"role": "user", "content": "What is a slice?"},
    {"role": "assistant", "content": "A smaller model."},
    {"role": "user", "content": "Thank you!"},
)
SETTINGS = ("special_tokens_map", "all_special_ids", "model_max_length", "padding_side", "truncation_side")


def prepare_folders(job: Job, folders: Sequence[Path]) -> list[Any]:
    """Put config, tokenizer, licences and code into the folders of a job's slices, and make sure that they load.

    What an interrupted run has computed stays there, everything else is written anew.
    """
    tokenizer = job.source.tokenizer()
    return [_prepare_folder(job, one, folder, tokenizer) for one, folder in zip(job.slices, folders, strict=True)]


def _prepare_folder(job: Job, one: PlannedSlice, folder: Path, tokenizer: Any) -> Any:
    source, plan = job.source, one.plan
    clear_folder(folder, is_progress)
    copy_companions(source, folder, has_code=plan.layout != "stock")
    adapter = job.adapter if one.written is None else one.written.dimensions.adapter
    write_config(one.config, folder, source, adapter.names)
    return check_loads(folder, plan, source, tokenizer)


def check_loads(folder: Path, plan: SlicePlan, source: Source, tokenizer: Any) -> Any:
    """Make sure that all but the weights of a slice load from its folder; return its empty model."""
    meta_model = _load_meta_model(folder, plan, source)
    _check_generation_config(folder, source)
    _check_tokenizer(folder, plan, source, tokenizer)
    return meta_model


def copy_companions(source: Source, folder: Path, has_code: bool) -> None:
    """Copy the files of a model that go along with a slice, and the code of ours where it needs that."""
    for file in source.companions.files:
        _take_over(source, file, folder)
    if has_code:
        for path in CODE_FILES:
            shutil.copyfile(path, folder / path.name)


def rehearse(job: Job) -> None:
    """Prepare folders for a job's slices where they go away again, to find out whether the slices would load."""
    try:
        with ExitStack() as stack:
            folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix="slicecli-")) for _ in job.slices]
            stack.enter_context(running(job.source.name))
            prepare_folders(job, [Path(folder) for folder in folders])
    except OSError as error:
        raise OutputError(
            f"The slice cannot be checked in the temporary folder: {error.strerror or error}.",
            "Set TMPDIR to a folder with more space.",
        ) from error


def _take_over(source: Source, file: str, folder: Path) -> None:
    """Copy a file of the dense model into a slice's folder."""
    target = folder / file
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        content = (source.folder / file).open("rb")
    except OSError as error:
        raise SourceError(
            f"{file} of {source.name} cannot be read: {error.strerror}.", "Check its permissions, or remove it."
        ) from error
    with content, target.open("wb") as copy:
        shutil.copyfileobj(content, copy)


def write_config(config: Any, folder: Path, source: Source, names: Mapping[str, str]) -> None:
    """Write the config as its class does, also where the class would rather not: the slice then loads as its source.

    Fields that transformers 4 spelled differently are written in both spellings. What only generation reads has no
    place in a config any more, and its classes drop it; transformers still looks for it in the file where there is no
    generation config.
    """
    import transformers

    try:
        fields = with_legacy_fields(json.loads(config.to_json_string()), names)
        if not (folder / GENERATION_FILE).is_file():
            lost = {name for name in vars(transformers.GenerationConfig()) if not hasattr(config, name)}
            fields |= {name: value for name, value in source.fields.items() if name in lost}
    except Exception as error:  # config classes raise what they like
        raise SourceError(
            f"The config of a slice of {source.name} cannot be written: {reason_of(error)}.", "Check config.json."
        ) from error
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")


def _load_meta_model(folder: Path, plan: SlicePlan, source: Source) -> Any:
    """Return the empty model of the config that is in a folder."""
    import transformers

    try:
        with quiet_libraries():
            config = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=source.trust_remote_code, local_files_only=True
            )
    except Exception as error:
        raise SourceError(
            f"transformers rejects the config of a slice of {source.name}: {reason_of(error)}.",
            "Check config.json.",
        ) from error
    meta_model = build_runnable_meta_model(config, source.trust_remote_code)
    count = sum(parameter.numel() for parameter in meta_model.parameters())
    if count != plan.sliced_parameters:
        raise PluginError(
            f"Adapter {plan.adapter!r} counts {plan.sliced_parameters:,} parameters at dim {plan.dim}, but the model "
            f"has {count:,}.",
            "Fix the widths and biases it declares.",
        )
    return meta_model


def _check_generation_config(folder: Path, source: Source) -> None:
    """Refuse a generation config that transformers cannot load; a missing one is fine."""
    from transformers import GenerationConfig

    try:
        with quiet_libraries():
            try:
                GenerationConfig.from_pretrained(folder, local_files_only=True)
            except OSError:  # there is none, or it cannot be read: then the config has to do
                GenerationConfig.from_pretrained(
                    folder, config_file_name=CONFIG_FILE, local_files_only=True, _from_model_config=True
                )
    except Exception as error:
        raise SourceError(
            f"transformers rejects the generation config of {source.name}: {reason_of(error)}.",
            f"Check {GENERATION_FILE}.",
        ) from error


def _check_tokenizer(folder: Path, plan: SlicePlan, source: Source, tokenizer: Any) -> None:
    """Make sure that a slice's tokenizer, loaded from its folder, does what the dense model's does."""
    problem = _problem_with_tokenizer(folder, source, tokenizer)
    if problem is not None and plan.written_type != plan.model_type and not tokenizer_code(folder):
        # the type of the dense model may have chosen the class, and the slice is of another type
        _name_tokenizer_class(folder, type(tokenizer).__name__)
        problem = _problem_with_tokenizer(folder, source, tokenizer)
    if problem is not None:
        left_out = "; ".join(one.describe() for one in source.companions.left_out)
        raise SourceError(
            f"The tokenizer of {source.name} {problem}.",
            f"These files are not copied: {left_out}." if left_out else "Check the tokenizer's files.",
        )


def _problem_with_tokenizer(folder: Path, source: Source, tokenizer: Any) -> str | None:
    """Say in a clause what is wrong with the tokenizer in a slice's folder; `None` where nothing is."""
    try:
        own = load_tokenizer(folder, source.trust_remote_code)
    except Exception as error:
        return f"cannot be loaded from a slice: {reason_of(error)}"
    with quiet_libraries():
        for what, look in _looks(tokenizer):
            seen = _outcome(look, tokenizer)
            # some draw at random, or tell the time
            if _outcome(look, own) != seen and _outcome(look, tokenizer) == seen:
                return f"would not be the same in a slice: {what} would differ"
    return None


def _name_tokenizer_class(folder: Path, name: str) -> None:
    path = folder / TOKENIZER_CONFIG
    fields = read_json(path)
    named = {**(fields if isinstance(fields, dict) else {}), "tokenizer_class": name}
    path.write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _looks(tokenizer: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Yield what can be seen of a tokenizer: a name for it, and how to look."""
    yield "its vocabulary", lambda one: (len(one), one.get_vocab())
    for setting in SETTINGS:
        yield f"its {setting}", operator.attrgetter(setting)
    special = _outcome(lambda one: "".join(one.all_special_tokens), tokenizer)
    for text in (*TEXTS, f"a {special} b"):
        for adds in (False, True):
            yield f"the tokens of {shown(text)}", partial(_encoded, text=text, adds_special_tokens=adds)
        yield f"the text of the tokens of {shown(text)}", partial(_decoded, text=text)
    templates = getattr(tokenizer, "chat_template", None)
    yield "its chat templates", operator.attrgetter("chat_template")
    for template in templates if isinstance(templates, dict) else [None] if templates else []:
        for prompts in (False, True):
            name = shown(template or "default")
            yield f"a conversation by the chat template {name}", partial(_rendered, name=template, prompts=prompts)


def _encoded(tokenizer: Any, text: str, adds_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=adds_special_tokens)["input_ids"])


def _decoded(tokenizer: Any, text: str) -> list[str]:
    ids = _encoded(tokenizer, text, adds_special_tokens=True)
    return [tokenizer.decode(ids, skip_special_tokens=skips) for skips in (False, True)]


def _rendered(tokenizer: Any, name: str | None, prompts: bool) -> Any:
    return tokenizer.apply_chat_template(
        list(CONVERSATION), chat_template=name, tokenize=False, add_generation_prompt=prompts
    )


def _outcome(look: Callable[[Any], Any], tokenizer: Any) -> Any:
    """Return what is seen, or the kind of error: a tokenizer need not be able to do everything."""
    try:
        return look(tokenizer)
    except Exception as error:
        return type(error).__name__
