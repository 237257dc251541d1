"""What can be asked of a measurement, each option defined once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slicecli.errors import RequestError
from slicecli.runtime import options
from slicecli.runtime.inputs import NUMPY_SEEDS, check_count, check_seed, local_path, parse_names, parse_text
from slicecli.runtime.options import Option

if TYPE_CHECKING:
    from slicecli.runtime.placement import DeviceMap, MaxMemory

__all__ = ["EvaluationOptions"]


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure, and how; each field says what it is.

    Texts are as of `slicecli.data.text.read_text`, tasks as of `slicecli.evaluation.tasks.load_tasks`; what is given
    twice is measured once. The default seed is lm-eval's.

    Raises:
        RequestError: A number is out of range, or the folder of tasks does not exist.
    """

    texts: tuple[str, ...] = Option(
        "--perplexity",
        "Text to measure perplexity on; repeatable.  [default: wikitext2, or none with --tasks]",
        default=(),
        reads=parse_text,
        metavar="NAME|FILE|HUB_ID",
        is_multiple=True,
    ).field()
    tasks: tuple[str, ...] = Option(
        "--tasks",
        "Tasks: lm-eval task names (with * as wildcard), .jsonl files of questions, or demo.",
        default=(),
        reads=parse_names,
        metavar="NAME|FILE,...",
    ).field()
    include_path: Path | None = Option(
        "--include-path", "Folder with your own task YAML files, for --tasks.", reads=local_path, metavar="DIR"
    ).field()
    num_fewshot: int | None = Option(
        "--num-fewshot", "Solved examples before each question.  [default: set by the task]", reads=int, metavar="N"
    ).field()
    limit: int | None = Option(
        "--limit", "Use only the first N rows of each text and N questions of each task.", reads=int, metavar="N"
    ).field()
    apply_chat_template: bool = Option(
        "--apply-chat-template", "Ask tasks through the tokenizer's chat template.", default=False, reads=bool
    ).field()
    system_instruction: str | None = Option(
        "--system-instruction",
        "System message of --tasks, or text before the prompt.",
        reads=parse_text,
        metavar="TEXT",
    ).field()
    fewshot_as_multiturn: bool = Option(
        "--fewshot-as-multiturn",
        "Give solved examples as turns of the conversation; needs --apply-chat-template.",
        default=False,
        reads=bool,
    ).field()
    seed: int = Option("--seed", "Seed for drawing the examples.", default=1234, reads=int, metavar="N").field()
    sequence_length: int | None = options.SEQUENCE_LENGTH.field()
    batch_size: int | None = options.BATCH_SIZE.field()
    dtype: str | None = options.DTYPE.field()
    device_map: DeviceMap = options.DEVICE_MAP.field()
    max_memory: MaxMemory | None = options.MAX_MEMORY.field()
    revision: str | None = options.REVISION.field()
    token: str | None = options.TOKEN.field()
    trust_remote_code: bool = options.TRUST_REMOTE_CODE.field()

    def __post_init__(self) -> None:
        for name, value, least in (
            ("limit", self.limit, 1),
            ("batch size", self.batch_size, 1),
            ("number of examples", self.num_fewshot, 0),
            ("sequence length", self.sequence_length, 2),
        ):
            check_count(value, f"A {name} of {{}} is", "Use", least)
        check_seed(self.seed, NUMPY_SEEDS)
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise RequestError("Only a chat has turns.", "Add --apply-chat-template, or drop --fewshot-as-multiturn.")
        if self.include_path is not None and not local_path(self.include_path).is_dir():
            raise RequestError(
                f"There is no folder {str(self.include_path)!r}.", "Pass the folder of the task YAML files."
            )

    def check(self) -> None:
        """Refuse to measure nothing.

        Raises:
            RequestError: Neither a text nor a task is given.
        """
        if not self.texts and not self.tasks:
            raise RequestError("There is nothing to measure.", "Pass a text, a task or both.")
