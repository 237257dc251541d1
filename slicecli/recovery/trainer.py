"""Training by distillation: transformers' own trainer with the divergence from a teacher as its loss.

What is saved on the way is what is trained, by the names of the model's parameters: names of checkpoints, which differ
by family, layout and mode, play no part. Weights are kept in float32.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from slicecli.errors import OutputError, reason_of
from slicecli.recovery.block_training import LARGEST_GRADIENT, WARM_UP_SHARE
from slicecli.runtime.placement import mixed_precision

if TYPE_CHECKING:
    from slicecli.data.packing import Rows
    from slicecli.progress import Progress
    from slicecli.recovery.data import TrainingRows
    from slicecli.recovery.teacher import Teacher

__all__ = ["DistillationTrainer", "Schedule", "last_checkpoint", "recompute_activations", "without_dropout"]

WEIGHTS_FILE, STATE_FILE = "trained.safetensors", "trainer_state.json"
METRIC = "eval_kl"


@dataclass(frozen=True)
class Schedule:
    """How long, in what portions and how fast is trained.

    Attributes:
        rows_per_pass: Rows that go through the model at once; a divisor of the rows of a step.
        eval_every: Steps between two measurements on the held-out rows.
    """

    steps: int
    rows_per_step: int
    rows_per_pass: int
    learning_rate: float
    eval_every: int
    seed: int


class DistillationTrainer(transformers.Trainer):
    """Trains a model to predict the next token as its teacher does, and keeps the state that does so best.

    Args:
        model: The model, its parameters in float32.
        teacher: What it is to predict.
        folder: Where checkpoints go.
        progress: Hears of every step.

    Attributes:
        diverged_at: The step at which the loss was not a number, if it came to that; training stopped there.
    """

    def __init__(
        self, model: Any, teacher: Teacher, rows: TrainingRows, schedule: Schedule, folder: Path, progress: Progress
    ) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=not torch.cuda.is_available(),
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.rows_per_pass,
            per_device_eval_batch_size=schedule.rows_per_pass,
            gradient_accumulation_steps=schedule.rows_per_step // schedule.rows_per_pass,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(WARM_UP_SHARE * schedule.steps),
            max_grad_norm=LARGEST_GRADIENT,
            weight_decay=0.0,
            optim="adamw_torch",
            eval_strategy="steps",
            eval_on_start=True,
            eval_steps=schedule.eval_every,
            save_strategy="steps",
            save_steps=schedule.eval_every,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model=METRIC,
            greater_is_better=False,
            remove_unused_columns=False,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            seed=schedule.seed % 2**32,  # numpy takes no others
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # one process trains on one GPU; more are for the teacher
        if arguments.device.type == "cuda":
            recompute_activations(model)
        self.diverged_at: int | None = None
        self.teacher = teacher
        self.latest = math.nan
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=_as_dataset(rows.training, 0),
            eval_dataset=_as_dataset(rows.held_out, len(rows.training.ids)),
            compute_metrics=_mean_divergence,
            callbacks=[_Reporter(self, progress, rows.training.sequence_length * schedule.rows_per_step)],
        )
        self.remove_callback(transformers.PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss of a pass is a mean, and a step takes the mean of its passes

    @property
    def history(self) -> dict[int, float]:
        """The held-out divergence by step, from 0 before training on, as far as it was a number."""
        measured = ((one["step"], one[METRIC]) for one in self.state.log_history if METRIC in one)
        return {step: value for step, value in measured if math.isfinite(value)}

    def measure(self) -> float:
        """Return the mean divergence on the held-out rows."""
        return float(self.evaluate()[METRIC])

    def compute_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], *_options: Any, **_more: Any) -> Any:
        """Return the mean divergence of the predictions from the teacher's."""
        return self._divergences(model, inputs).mean()

    def _divergences(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean divergence of each row."""
        ids = inputs["input_ids"]
        with torch.no_grad():
            expected = self.teacher.expect(ids, inputs["number"])
        # not the trainer's own, which would copy all logits to float32
        with mixed_precision(ids.device):
            logits = model(input_ids=ids, use_cache=False).logits
        return self.teacher.divergences(logits, expected)

    def training_step(self, model: Any, inputs: dict[str, Any], *count: Any, **more: Any) -> torch.Tensor:
        """Take the gradient of one pass; stop where the loss is not finite."""
        loss: torch.Tensor = super().training_step(model, inputs, *count, **more)
        self.latest = float(loss) * self.current_gradient_accumulation_steps
        if not math.isfinite(self.latest):
            self.diverged_at = self.state.global_step + 1
            self.control.should_training_stop = True
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_options: Any, **_more: Any) -> Any:
        """Return the divergences of some held-out rows, which the trainer gathers from all processes."""
        with torch.no_grad():
            found = self._divergences(model, self._prepare_inputs(inputs))
        return found.mean(), found, found

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        try:
            super()._save_checkpoint(*arguments, **options)
        except OSError:
            raise
        except Exception as error:  # torch and safetensors have errors of their own for a full disk
            raise OutputError(
                f"A checkpoint cannot be written: {reason_of(error)}.",
                "Free some space, or choose an --output on another disk.",
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: value.detach().contiguous() for name, value in self._trained().items()}
            save_file(tensors, folder / WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trained = self._trained()
        with torch.no_grad():
            for name, value in load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE).items():
                trained[name].copy_(value)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}


class _Reporter(transformers.TrainerCallback):
    """Tells of every step, and has the last one measured too."""

    def __init__(self, trainer: DistillationTrainer, progress: Progress, tokens_per_step: int) -> None:
        self._trainer = trainer
        self._progress = progress
        self._tokens_per_step = tokens_per_step
        self._held_out = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        """Begin the phase, behind what an interrupted run has done."""
        self._began, self._first = time.perf_counter(), state.global_step
        self._progress.start("training", state.max_steps - state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        """Say how far it has come."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        passed = time.perf_counter() - self._began
        speed = (state.global_step - self._first) * self._tokens_per_step / passed
        held_out = "" if math.isnan(self._held_out) else f", held out {self._held_out:.4f}"
        self._progress.advance(f"KL {self._trainer.latest:.4f}{held_out}, {speed:,.0f} tokens/s")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_more: Any) -> None:
        """Keep the figure for the steps that follow."""
        self._held_out = metrics[METRIC]


def without_dropout(model: Any) -> Any:
    """Let a model in training predict as it does when it is used; return it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith(("dropout", "layerdrop")) and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def recompute_activations(model: Any) -> None:
    """Let a model keep the input of each block for the backward pass and compute the rest again, where it can."""
    if not model.supports_gradient_checkpointing:
        return
    # what versions of transformers 5 call it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last whole checkpoint of an interrupted run, and remove what it was killed in the middle of."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(path)
        else:
            whole.append((step, path))
    return max(whole)[1] if whole else None


def _mean_divergence(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {METRIC.removeprefix("eval_"): float(prediction.predictions.mean(dtype="float64"))}


def _as_dataset(rows: Rows, first: int) -> list[dict[str, Any]]:
    """Return rows as the trainer takes them, each with its number among all rows."""
    return [{"input_ids": row, "number": number} for number, row in enumerate(rows.ids, first)]
