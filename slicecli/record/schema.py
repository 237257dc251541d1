"""What a record may hold: the models of its fields.

A record may come from anybody's repository. What passes here has every field of the kind and form that the rest of the
program relies on; that what it says is true is another matter, see `slicecli.hub.verify`.

The JSON schema in `docs/record-1.schema.json` is generated from the models, see `slicecli.record.json_schema`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from slicecli.family.dimensions import MOST_WIDTH
from slicecli.family.slice_plan import Layout, Method
from slicecli.runtime.json_object import (
    CONTROL,
    LINE,
    Count,
    Digest,
    Figure,
    JsonObject,
    Name,
    NotNegative,
    Share,
    Size,
    faults_of,
)
from slicecli.runtime.versions import __version__

__all__ = [
    "RECORDS",
    "RECORD_VERSION",
    "Alternative",
    "Calibration",
    "Curve",
    "CurveSettings",
    "Curves",
    "DenseFigure",
    "Estimate",
    "Metric",
    "Parameter",
    "Perplexity",
    "Point",
    "Prediction",
    "PublishedRecord",
    "Record",
    "Recovery",
    "RefitRecord",
    "Task",
    "schema_errors",
]

RECORD_VERSION = 1
ABSENT: Any = None  # the value of a field that a record need not have, and never has as null
MOST_CURVES = 100
MOST_POINTS = 100  # each is predicted from all the others
LEAST_SPARSITY = 1e-6
_HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_PART = rf"[^/\\{CONTROL}]+"  # of a path
_FILE_PART = rf"[^./\\:{CONTROL}][^/\\:{CONTROL}]*"
_LANGUAGE = "^([a-z]{2,3}(-[A-Za-z0-9]{2,8})?|multilingual)$"

Sentence = Annotated[str, Field(max_length=1000, pattern=LINE)]
Version = Annotated[str, Field(max_length=50, pattern=r"^[A-Za-z0-9_.+!-]+$")]
PackageVersion = Annotated[str, Field(min_length=1, max_length=100, pattern=LINE)]
ModelName = Annotated[str, Field(max_length=255, pattern=f"^{_PART}(/{_PART})?$")]
HubId = Annotated[str, Field(pattern=f"^{_HUB_NAME}/{_HUB_NAME}$")]
LicenceName = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
File = Annotated[str, Field(max_length=255, pattern=f"^{_FILE_PART}(/{_FILE_PART})*$")]
WeightFile = Annotated[str, Field(max_length=255, pattern=rf"^{_FILE_PART}\.safetensors$")]
Width = Annotated[int, Field(ge=1, le=MOST_WIDTH)]
Sparsity = Annotated[float, Field(ge=0, lt=1)]
MeasuredSparsity = Annotated[float, Field(ge=LEAST_SPARSITY, le=1 - LEAST_SPARSITY)]
# a sum of rounded numbers may be a little more than the whole
EnergyShare = Annotated[float, Field(ge=0, le=1.000001)]
Quantity = Literal["perplexity", "accuracy"]
RecoveryMode = Literal["full", "lora", "blocks"]
Command = Annotated[str, Field(min_length=1, max_length=4000, pattern=LINE)]
DatasetId = Annotated[str, Field(max_length=255, pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$")]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]


class ModelIdentity(JsonObject):
    """Which model it is."""

    model: ModelName = Field(description="Hub id (owner/name), or the name of its folder without the path to it.")
    revision: Annotated[str, Field(min_length=1, max_length=255, pattern=LINE)] | None = Field(
        description="Branch, tag or commit that was asked for; null for the default branch or a folder."
    )
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = Field(
        description="Commit on the Hub; null for a folder."
    )
    content: Digest = Field(
        description="SHA-256 of what the model is: fields of its config, and names, dtypes, shapes and values of its "
        "tensors; see docs/record.md."
    )
    model_type: Name = Field(description="Its model_type in transformers.")


class Source(ModelIdentity):
    """A model that was sliced."""


class Ancestor(Source):
    """A model that was sliced to make the source."""

    method: Method = Field(description="How it was sliced.")
    hidden_size: Width = Field(description="Its hidden size.")
    dim: Width = Field(description="Hidden size of the slice of it.")
    mlp_size: Size | None = Field(description="Its MLP channels; null where the slice has all of them.")
    mlp_dim: Size | None = Field(description="MLP channels of the slice of it; likewise.")
    slicecli_version: Version = Field(description="Version of slicecli that sliced it.")
    trained_tokens: Count = Field(description="Tokens that the slice of it was then trained on; 0 where it was not.")


class Inherited(JsonObject):
    """What the card of the source says, where it is well formed; a field is there or not, and never null."""

    license: LicenceName = Field(default=ABSENT, description="Name of the licence, as the Hub knows it.")
    license_name: LicenceName = Field(default=ABSENT, description="Name of a licence that the Hub does not know.")
    license_link: Annotated[str, Field(pattern=r"^(https://)?[A-Za-z0-9_./%-]{1,200}$")] = Field(
        default=ABSENT, description="Where its text is."
    )
    language: Annotated[list[Annotated[str, Field(pattern=_LANGUAGE)]], Field(min_length=1)] = Field(
        default=ABSENT, description="Codes of the languages."
    )


class WidthChange(JsonObject):
    """A width of MLPs, before and after."""

    dense: Size = Field(description="Channels in the source.")
    sliced: Size = Field(description="Channels in the slice.")


class Schedule(JsonObject):
    """Widths of the stream."""

    blocks: Annotated[list[Annotated[list[Width], Field(min_length=1)]], Field(min_length=1)] = Field(
        description="For each block the width at each of its steps."
    )
    head: Width = Field(description="The width before the head.")


class Change(JsonObject):
    """A number of the dense model and of the slice."""

    dense: Size = Field(description="Of the dense model.")
    sliced: Size = Field(description="Of the slice.")


class Calibration(JsonObject):
    """What a slice was fitted to."""

    text: Name = Field(
        description="Name of the text; a file's name with as many of its folders as tell it from other texts of the "
        "record."
    )
    dataset: DatasetId | None = Field(
        description="Hub id of the dataset it comes from; null where it comes from elsewhere."
    )
    samples: Size = Field(description="Rows.")
    sequence_length: Size = Field(description="Tokens per row.")
    tokens: Size = Field(description="Tokens in all rows.")
    seed: Seed = Field(description="Seed of their draw.")
    sha256: Digest = Field(description="SHA-256 of the token ids as little-endian int64.")
    text_sha256: Digest | None = Field(
        description="SHA-256 of a text from a file, as of a perplexity; null where the name identifies the text."
    )


class EnergyAtDim(JsonObject):
    """How much of the stream's energy a slice of some dim keeps."""

    dim: Width = Field(description="The dim.")
    kept: EnergyShare = Field(description="Share that it keeps.")


class ImportanceAtDim(EnergyAtDim):
    """How much of the stream's energy, and of what its readers see, a slice of some dim keeps."""

    importance_kept: EnergyShare = Field(description="Share that it keeps of what the readers of the stream see.")


class Energy(JsonObject):
    """How much of the stream's energy on the calibration text the slice keeps, and slices of other dims would."""

    of: Literal["normalised stream", "stream"] = Field(description="Whose energy.")
    kept: EnergyShare = Field(description="Share that the slice keeps.")


class StreamEnergy(Energy):
    """Energy of the stream, the mean over the places where it is read."""

    of: Literal["stream"] = Field(description="Of the stream as it is at each place, the mean over the places.")
    spectrum: list[EnergyAtDim] = Field(description="The same for other dims.")


class NormalisedEnergy(Energy):
    """Energy of the normalised stream, in one basis."""

    of: Literal["normalised stream"] = Field(description="Of the normalised stream, in one basis.")
    importance_kept: EnergyShare = Field(
        description="Share that the slice keeps of what the readers of the stream see."
    )
    spectrum: list[ImportanceAtDim] = Field(description="The same for other dims.")


class Perplexity(JsonObject):
    """A measured perplexity."""

    value: Annotated[Figure, Field(ge=1)] = Field(description="The perplexity.")
    nll: NotNegative = Field(description="Mean negative log-likelihood per predicted token, in nats.")
    stderr: NotNegative | None = Field(description="Standard error of the value; null for a single row.")
    tokens: Size = Field(description="Predicted tokens.")
    seq_len: Size = Field(description="Tokens per row.")
    bits_per_byte: NotNegative = Field(
        description="The negative log-likelihood in bits per UTF-8 byte of the text, which compares across tokenizers."
    )
    rows_sha256: Digest = Field(description="SHA-256 of the token ids as little-endian int64.")
    text_sha256: Digest | None = Field(
        description="SHA-256 of a text from a file: of its documents, each after its length in bytes as little-endian "
        "int64; null where the name identifies the text."
    )


class Metric(JsonObject):
    """A metric of a task."""

    value: float | None = Field(description="Its value; null where it is not finite.")
    stderr: NotNegative | None = Field(description="Its standard error; null where there is none.")


class Task(JsonObject):
    """A measured task."""

    metric: Name = Field(
        description="The metric that counts: acc_norm, acc or exact_match, whichever it has first, else its first."
    )
    value: float | None = Field(description="Its value; null where it is not finite.")
    stderr: NotNegative | None = Field(description="Its standard error; null where there is none.")
    chance: Share | None = Field(description="What a guess would give; null where that is not known.")
    samples: Size = Field(description="Questions.")
    num_fewshot: Count = Field(description="Solved examples before each question.")
    metrics: dict[Name, Metric] = Field(description="All metrics of the task, by name.")
    requests_sha256: Digest = Field(
        description="SHA-256 of all that the model was asked, examples included, and of what is right."
    )
    questions_sha256: Digest | None = Field(
        description="SHA-256 of the questions of a file; null where the name identifies the task."
    )


class Figures(JsonObject):
    """What was measured of a model; a field is there or not, and never null."""

    perplexity: dict[Name, Perplexity] = Field(default=ABSENT, description="Measured perplexities, by text.")
    tasks: dict[Name, Task] = Field(default=ABSENT, description="Measured tasks, by name.")


class Results(Figures):
    """What was measured of the slice, and of the dense model on the same rows and questions."""

    dense: Figures = Field(default=ABSENT, description="The same of the dense model.")
    versions: dict[Name, PackageVersion] = Field(
        default=ABSENT, description="Versions of the packages that measured it."
    )


class RowSet(JsonObject):
    """Rows of token ids."""

    rows: Size = Field(description="Rows.")
    tokens: Size = Field(description="Tokens in all rows.")
    sha256: Digest = Field(description="SHA-256 of the token ids as little-endian int64.")


class HeldOutDivergence(JsonObject):
    """The divergence on the held-out rows at some moment of a training."""

    tokens: Count = Field(description="Tokens trained on by then.")
    kl: NotNegative = Field(description="Mean KL(teacher ‖ slice) per predicted token, in nats.")


class BlockError(JsonObject):
    """Mean squared error of a block's output on the held-out rows, relative to the mean square of the dense stream."""

    before: NotNegative = Field(description="Before the block was trained, behind the trained blocks before it.")
    after: NotNegative = Field(description="After it was trained.")


class Recovery(JsonObject):
    """A training of a slice to predict as a teacher does."""

    slice: ModelIdentity = Field(description="The slice before this training.")
    teacher: ModelIdentity = Field(description="The model whose predictions it was trained to give.")
    mode: RecoveryMode = Field(
        description="full: all weights at once. lora: low-rank adapters, merged at the end. blocks: all weights of the "
        "blocks, one block after the other."
    )
    lora_rank: Size | None = Field(description="Rank of the adapters; null but for mode lora.")
    epochs: Size | None = Field(description="How often each block has seen the rows; null but for mode blocks.")
    stored_logits: Size | None = Field(
        description="Of how many tokens at each position the teacher's probabilities were stored, the others summed "
        "up; the divergences are over these. Null for all tokens."
    )
    text: Name = Field(description="Name of the text.")
    dataset: DatasetId | None = Field(
        description="Hub id of the dataset it comes from; null where it comes from elsewhere."
    )
    text_sha256: Digest | None = Field(
        description="SHA-256 of a text from a file, as of a perplexity; null where the name identifies the text."
    )
    sequence_length: Size = Field(description="Tokens per row.")
    seed: Seed = Field(description="Seed of the draw of the rows and of their order.")
    training: RowSet = Field(description="The rows that were trained on.")
    held_out: RowSet = Field(description="The rows that the divergence was measured on; none is trained on.")
    tokens: Size = Field(description="Tokens trained on; rows that were read again count again.")
    tokens_per_step: Size = Field(description="Tokens of one step of the optimiser.")
    steps: Size = Field(description="Steps of the optimiser; of mode blocks, for each block.")
    best_step: Size = Field(description="The step whose weights were kept: those of the lowest held-out divergence.")
    learning_rate: Annotated[Figure, Field(gt=0)] = Field(description="Largest learning rate.")
    kl_before: NotNegative = Field(
        description="Mean KL(teacher ‖ slice) per predicted token of the held-out rows before training, in nats."
    )
    kl_after: NotNegative = Field(description="The same of the weights as they are stored.")
    history: Annotated[list[HeldOutDivergence], Field(min_length=1)] = Field(
        description="The same on the way, in float32."
    )
    block_errors: Annotated[list[BlockError], Field(min_length=1)] | None = Field(
        description="What the training of each block but the last, which has the divergence for its error, did to its "
        "error; null but for mode blocks."
    )
    seconds: NotNegative = Field(description="Wall-clock time of the training, without what an interrupted run took.")
    command: Command = Field(description="The command that trained it; text files and folders appear by their names.")
    results: Figures = Field(description="What had been measured of the slice before.")
    versions: dict[Name, PackageVersion] = Field(description="Versions of the packages that trained it.")


class Alternative(JsonObject):
    """A relation that was fitted."""

    relation: Name = Field(description="Its name.")
    parameters: list[float] = Field(description="Its parameters, in their order.")
    loo_error: NotNegative | None = Field(description="Its leave-one-out error; null where there is none.")


class CurveSettings(JsonObject):
    """How it was measured; what is not there was left to the text, model or task."""

    sequence_length: Size = Field(default=ABSENT, description="Tokens per row.")
    limit: Size = Field(default=ABSENT, description="Only the first so many rows or questions.")
    num_fewshot: Count = Field(default=ABSENT, description="Solved examples before each question.")
    apply_chat_template: bool = Field(default=ABSENT, description="Tasks were asked through the chat template.")
    system_instruction: str = Field(default=ABSENT, description="System message that tasks began with.")


class Point(JsonObject):
    """A measured slice."""

    dim: Width | None = Field(description="Its dim; null where it is not known.")
    sparsity: MeasuredSparsity = Field(description="s, the fraction of the hidden size removed.")
    value: Figure = Field(description="What was measured.")
    stderr: Figure | None = Field(description="Its standard error; null where it is not known.")
    fitted: float = Field(description="What the curve gives there.")


class Curve(JsonObject):
    """A relation fitted to measured slices of this model."""

    relation: Name = Field(description="Name of the relation (docs/relations.md).")
    formula: Sentence = Field(description="The relation as a formula.")
    quantity: Quantity = Field(description="What is predicted.")
    parameters: dict[Name, float] = Field(description="Fitted parameters, by name.")
    covariance: list[list[float]] | None = Field(
        description="Covariance of the parameters, row by row; null where there are no points to spare."
    )
    loo_error: NotNegative | None = Field(
        description="Mean absolute error of predicting each point from the others, in ln PPL or accuracy; null for one "
        "point."
    )
    loo_relative_error: NotNegative | None = Field(description="The same of the perplexity as a fraction.")
    valid_sparsity: Annotated[list[Sparsity], Field(min_length=2, max_length=2)] = Field(
        description="The least and the largest s of the points."
    )
    reason: Sentence = Field(description="Why this relation.")
    alternatives: list[Alternative] = Field(description="All relations that were fitted, best first.")
    model: ModelName = Field(description="The dense model.")
    model_type: Name = Field(description="Its model_type in transformers.")
    method: Method = Field(description="How it was sliced.")
    calibration: Annotated[str, Field(min_length=1, max_length=400, pattern=LINE)] = Field(
        description="What its slices were calibrated on, in words."
    )
    evaluation: Name = Field(description="The text or task.")
    evaluation_sha256: Digest | None = Field(
        description="SHA-256 of a text or of questions from a file; null where the name identifies them."
    )
    settings: CurveSettings = Field(
        description="How it was measured; what is not there was left to the text, model or task."
    )
    dense: Figure = Field(description="The dense model's figure.")
    chance: Share | None = Field(description="Chance level of a task; null where it is not known.")
    points: Annotated[list[Point], Field(min_length=1, max_length=MOST_POINTS)] = Field(
        description="The measured slices."
    )


class Curves(JsonObject):
    """Curves fitted to measured slices."""

    curves: Annotated[list[Curve], Field(min_length=1, max_length=MOST_CURVES)] = Field(
        description="One for each text and task."
    )


class DenseFigure(JsonObject):
    """A dense model's figure."""

    value: NotNegative = Field(description="The figure.")
    source: Sentence = Field(description="Source of the figure.")


class Parameter(JsonObject):
    """A parameter of a relation."""

    value: float = Field(description="Its value.")
    stderr: NotNegative | None = Field(
        description="Its standard error; null where it was not fitted to points to spare."
    )


class Estimate(JsonObject):
    """A prediction for one dim."""

    dim: Width = Field(description="Hidden size of such a slice.")
    sparsity: Sparsity = Field(description="s, the fraction of the hidden size removed.")
    parameters: Size | None = Field(description="Its parameters; null where they are not known.")
    value: NotNegative = Field(description="The prediction.")
    low: NotNegative = Field(description="Lower end of the 90 % interval.")
    high: NotNegative = Field(description="Upper end of the 90 % interval.")
    is_outside: bool = Field(description="Whether s is outside the range of the data the prediction is based on.")
    paper: float | None = Field(
        description="The prediction of the relation of arXiv 2503.04377; null if it gives none."
    )
    measured: NotNegative | None = Field(description="What was measured at this dim; null where nothing was.")


class Prediction(JsonObject):
    """What is predicted of slices of the same model on one text or task. No measurement."""

    quantity: Quantity = Field(description="What is predicted.")
    evaluation: Name = Field(description="The text or task.")
    dense: DenseFigure = Field(description="The dense model's figure.")
    chance: Share | None = Field(description="Chance level of a task; null where it is not known.")
    relation: Name = Field(description="Name of the relation (docs/relations.md).")
    formula: Sentence = Field(description="The relation as a formula.")
    parameters: dict[Name, Parameter] = Field(description="Parameters of the relation, by name.")
    valid_sparsity: Annotated[list[Sparsity], Field(min_length=2, max_length=2)] = Field(
        description="The smallest and the largest s of the data it is based on."
    )
    basis: Sentence = Field(description="The data it is based on.")
    measured_slices: Count = Field(description="Number of measured slices of this model among the data.")
    notes: list[Sentence] = Field(description="Remarks on the prediction.")
    estimates: list[Estimate] = Field(description="Predictions for the usual dims, and for those that were measured.")


class OtherDim(JsonObject):
    """A dim that was not sliced to."""

    dim: Width = Field(description="The dim.")
    parameters: Size = Field(description="Parameters of such a slice.")


class LeftOut(JsonObject):
    """Files that do not go along for one reason."""

    reason: Name = Field(description="The reason.")
    count: Size = Field(description="Number of files; a folder of which nothing is copied counts as one.")
    files: list[Name] = Field(
        description="The first names, relative to the source's folder; one that ends in a slash is a folder."
    )


class Record(JsonObject):
    """slicecli.json: where a slice comes from, how it was made, what it weighs, and what was measured and predicted.

    It holds no token, no user name and no local path.
    """

    record_version: Annotated[int, Field(ge=RECORD_VERSION, le=RECORD_VERSION)] = Field(
        description="Version of this schema."
    )
    slicecli_version: Version = Field(description="Version of slicecli that made the slice.")
    source: Source = Field(description="The dense model, or the slice, that was sliced.")
    ancestry: list[Ancestor] = Field(
        description="If the source is itself a slice, the models it was made from, back to the dense model; otherwise "
        "empty."
    )
    repository: HubId | None = Field(description="Hub repository of the slice (owner/name); null if it was not pushed.")
    command: Command = Field(
        description="The command that reproduces the slice, before any training; text files and folders appear by "
        "their names only."
    )
    inherited: Inherited = Field(
        description="Licence and languages on the card of the source, as far as they are well formed."
    )
    adapter: Name = Field(description="Name of the adapter that describes the family; auto if it was inferred.")
    method: Method = Field(
        description="refit: one basis for the whole stream, every map refitted by least squares. slicegpt: a basis at "
        "every norm site, weights projected, as published in arXiv 2401.15024."
    )
    layout: Layout = Field(
        description="stock: a checkpoint of a transformers class. custom-code: one that includes its class."
    )
    written_type: Name = Field(
        description="model_type of the class that the slice is written in: that of the source, of another class of "
        "transformers that computes the same, or of slicecli's custom code."
    )
    activation: Name = Field(
        default=ABSENT,
        description="Activation of its MLPs, as hidden_act in the config names it; only of layout stock.",
    )
    needs_remote_code: bool = Field(
        description="Whether transformers must run code stored with the weights (trust_remote_code); true for layout "
        "custom-code."
    )
    is_tied: bool = Field(
        description="Whether the slice shares one table between embedding and head, as the source does."
    )
    hidden_size: Width = Field(description="d, the hidden size of the source.")
    dim: Width = Field(description="k, the hidden size of the slice; for a schedule of several widths, their mean.")
    sparsity: Sparsity = Field(description="s = 1 - k/d, the fraction of the hidden size removed.")
    mlp_size: Size | None = Field(
        description="MLP channels of the source, in each block; of mixtures, of each expert that tokens are sent to; "
        "null where the slice has all of them."
    )
    mlp_dim: Size | None = Field(description="m, the MLP channels of the slice; null where it has all of them.")
    other_mlp_widths: dict[Name, WidthChange] = Field(
        default=ABSENT,
        description="Where MLPs have other widths besides (a shared expert, blocks without experts): those, by the "
        "usual name of the config field.",
    )
    schedule: Schedule | None = Field(
        description="Widths of the stream for method slicegpt; null for method refit, which has one width."
    )
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = Field(description="Dtype of the weights.")
    parameters: Change = Field(description="Parameters, before and after; buffers do not count.")
    bytes: Change = Field(description="Bytes of the parameters, before and after.")
    calibration: Calibration = Field(description="What the slice was fitted to.")
    energy: Energy = Field(
        description="How much of the stream's energy on the calibration text the slice keeps, and slices of other dims "
        "would keep."
    )
    recovery: Annotated[list[Recovery], Field(min_length=1)] = Field(
        default=ABSENT, description="How the slice was trained after slicing, first to last; absent if it was not."
    )
    results: Results = Field(
        description="Measurements of the slice, and of the dense model on the same rows and questions."
    )
    curve: Curves | None = Field(
        description="Curves fitted to measured slices of the source, or null. `slicecli estimate` reads them."
    )
    predictions: list[Prediction] = Field(
        description="Predictions for slices to other dims; the card shows them as tables."
    )
    other_dims: list[OtherDim] = Field(description="Parameters of slices to other dims.")
    weights: Annotated[dict[WeightFile, Digest], Field(min_length=1)] = Field(
        description="SHA-256 of each weight file, by name."
    )
    files: dict[File, Digest] = Field(
        description="SHA-256 of every other file except the card and this record, by name."
    )
    left_out: list[LeftOut] = Field(
        description="Files of the source that were not copied, by reason; excludes its config, weights and card."
    )
    versions: dict[Name, PackageVersion] = Field(description="Versions of the packages that made the slice.")


class RefitRecord(Record):
    """The record of a slice by method refit."""

    method: Literal["refit"] = Field(description="One basis for the whole stream, every map refitted by least squares.")
    schedule: None = Field(description="The stream has one width.")
    energy: NormalisedEnergy = Field(description="How much of the stream's energy the basis keeps.")

    @field_validator("mlp_dim")
    @classmethod
    def _check_channels(cls, value: int | None, about: ValidationInfo) -> int | None:
        size = about.data.get("mlp_size")
        if (value is None) != (size is None) or (value is not None and size is not None and value >= size):
            raise PydanticCustomError("channels", "it should be below mlp_size, or null like it")
        return value

    @field_validator("needs_remote_code")
    @classmethod
    def _check_code(cls, value: bool, about: ValidationInfo) -> bool:
        if about.data.get("layout") == "custom-code" and not value:
            raise PydanticCustomError("code", "it should be true, since layout is custom-code")
        return value


class PublishedRecord(Record):
    """The record of a slice by method slicegpt."""

    method: Literal["slicegpt"] = Field(
        description="A basis at every place, weights projected, as published in arXiv 2401.15024."
    )
    layout: Literal["custom-code"] = Field(description="A checkpoint that brings its class along.")
    mlp_size: None = Field(description="The MLPs have all their channels.")
    mlp_dim: None = Field(description="The MLPs have all their channels.")
    needs_remote_code: Literal[True] = Field(description="transformers has to run code that lies beside the weights.")
    schedule: Schedule = Field(description="Widths of the stream.")
    energy: StreamEnergy = Field(description="How much of the stream's energy the bases keep.")


RECORDS: TypeAdapter[RefitRecord | PublishedRecord] = TypeAdapter(
    Annotated[RefitRecord | PublishedRecord, Field(discriminator="method")]
)


def schema_errors(record: Any) -> list[str]:
    """Say what in a record is not as its schema has it."""
    version = record.get("record_version") if isinstance(record, dict) else None
    if isinstance(version, int) and not isinstance(version, bool) and version != RECORD_VERSION:
        return [f"$.record_version is {version}, which slicecli {__version__} does not support"]
    try:
        RECORDS.validate_python(record)
    except ValidationError as error:
        return faults_of(error, skips=1)
    return []
