"""What is asked of a quantization: budget, allocation, refinement, texts. Frozen and closed.

Unknown keys are errors that name the key; illegal pairs are refused where they are built, with both
values in the message. Everything named here is local: a service resolves its own references (models
on the Hub, maps and learned parameters of other jobs, uploads) before it hands a configuration on.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import not_
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict

from bitmill.config.bit_width_map import DROPPED, LEGAL_WIDTHS, BitWidthMap
from bitmill.config.closed import Closed
from bitmill.config.codes import AUTO, CODES, DEFAULT_WIDTHS, CodeName, check_widths
from bitmill.config.effort import Effort, with_effort
from bitmill.config.methods import METHODS, MethodConfig
from bitmill.config.rounded import Rounded, rounded_baselines
from bitmill.config.transforms import TRANSFORMS, ColumnOrder, TransformConfig, transform_of
from bitmill.errors import SpecError, first_problem
from bitmill.registry import Registry

DEFAULT_FORMAT = "bitmill-1"
"""What a result is stored in unless a job asks for another (`bitmill.formats.format`)."""
FormatName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]


OF_NO_METHOD = {"method", "omniquant", "settings", "transforms"}
"""Parts of a refinement that are no method's settings by themselves."""
ORDER = ColumnOrder.name
ASKED_ELSEWHERE = {
    ORDER: "allocation.order asks for column orders",
    "outliers": "allocation.outliers asks for outlier columns",
}
"""Transforms that are no part of a refinement."""

Part = TypeVar("Part", bound=Closed)
T = TypeVar("T")
Kind = Literal["code_bits", "bits", "size", "memory", "max_loss_increase"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FILE_KINDS: tuple[Kind, ...] = ("size", "memory", "max_loss_increase")
"""Those that count bytes of files."""


class Budget(Closed):
    """Exactly one limit; it is never exceeded.

    code_bits: sum(b*N*c) / sum(N*K) over the quantized linears, c = columns of a group
    bits:      8 * stored bytes of codes, tails, zeros, scales and orders / sum(N*K)
    size:      bytes of all safetensors files of the checkpoint, headers included
    memory:    bytes where the model is run: those files, the keys and values of `batch` sequences
               of `context` tokens in `cache_dtype`, and workspace (`plan/serving_memory.py`)
    max_loss_increase: nats a token of KL on held-out calibration windows, upper end of the 95 %
               interval; the smallest checkpoint within it (`pipeline/stages/search.py`)
    """

    code_bits: float | None = Field(default=None, gt=0, le=16)
    bits: float | None = Field(default=None, gt=0, le=32)
    size: int | None = Field(default=None, gt=0)
    memory: int | None = Field(default=None, gt=0)
    max_loss_increase: float | None = Field(default=None, gt=0, le=100)
    context: int | None = Field(default=None, ge=1, le=1 << 27)
    batch: int = Field(default=1, ge=1, le=65536)
    cache_dtype: Literal["fp8", "fp16", "bf16", "fp32"] = "bf16"

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            what = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; got {what}")
        if (self.memory is None) != (self.context is None):
            raise ValueError(
                f"memory {self.memory} with context {self.context}: give both, the bytes and the "
                "tokens of each sequence that they must hold, or neither"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_what_counts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """JSON without what belongs to budgets of memory or loss where there is none."""
        found: dict[str, Any] = dump(self)
        for name in ("memory", "context", "batch", "cache_dtype", "max_loss_increase"):
            if self.memory is None and found.get(name) == type(self).model_fields[name].default:
                found.pop(name, None)
        return found

    @property
    def kind(self) -> Kind:
        """Name of the limit that was given."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def in_bytes(self) -> bool:
        """Whether bytes are limited, of files or of memory."""
        return self.kind in ("size", "memory")

    @property
    def value(self) -> float | int:
        """The limit in the unit of `kind`."""
        value = getattr(self, self.kind)
        assert isinstance(value, float | int)
        return value


CalibrationText = Literal["wiki_calibration", "mixture_calibration"]


class BundledText(Closed):
    """A text that ships with the library: English Wikipedia, a mixture of prose, code, technical
    documents and dialogue in several languages, or a blend: half of the windows of each."""

    source: Literal["bundled"] = "bundled"
    name: CalibrationText | Literal["blend_calibration"] = "wiki_calibration"


class FileText(Closed):
    """A UTF-8 text file, or a .jsonl file whose `field` holds the text of each line."""

    source: Literal["file"] = "file"
    path: str = Field(min_length=1, max_length=4096)
    field: str = "text"


class DatasetText(Closed):
    """A data set on the Hub, read through the `datasets` library where it is installed."""

    source: Literal["dataset"] = "dataset"
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,96}(/[A-Za-z0-9_.-]{1,96})?$")
    config: str | None = None
    split: str = "train"
    field: str = "text"


Framing = Literal["tokenizer", "none", "chat"]
"""A window begins with what the tokenizer puts before a text, with the text itself, or is a
conversation in the tokenizer's chat template, with the text's paragraphs as turns."""


class Calibration(Closed):
    """Which text is measured. `sequences` windows of `length` tokens, then `held_out` more.

    profile_sequences: how many of them the profile is measured on, from the first; None for all.
    framing: how windows begin, see `Framing`. held_out_text: half of the held-out windows, rounded
    down, are of this text, so that what they choose has to hold for it too.
    """

    text: Annotated[BundledText | FileText | DatasetText, Field(discriminator="source")] = (
        BundledText()
    )
    sequences: int = Field(default=64, ge=1, le=65536)
    length: int = Field(default=2048, ge=8, le=131072)
    held_out: int = Field(default=16, ge=0, le=4096)
    profile_sequences: int | None = Field(default=None, ge=1)
    framing: Framing = "tokenizer"
    held_out_text: CalibrationText | None = None

    @model_validator(mode="after")
    def _profile_within(self) -> Self:
        if self.profile_sequences is not None and self.profile_sequences > self.sequences:
            raise ValueError(
                f"profile_sequences {self.profile_sequences} is above sequences "
                f"{self.sequences}: give at most as many"
            )
        return self

    @property
    def profiled(self) -> int:
        """Windows that the profile is measured on."""
        return self.profile_sequences or self.sequences


class BaseAllocation(Closed):
    """How widths are given to groups, whatever names the map of method "map".

    order: "activation" sorts the columns of each input by descending diag(H) before grouping;
    linears that read the same input share one order. "natural" keeps the model's own order.
    keep: glob patterns of full linear names that stay in the source precision.
    fuse_siblings: q/k/v and gate/up of a block share one map.
    per_linear: one width for all groups of a linear (for runtimes that need it).
    edge_min_bits: smallest width in the first and the last decoder block.
    check: "maps" measures a knapsack's map and the uniform one of the budget on held-out windows,
    "corrected" one of corrected costs too; the best is taken. "off" measures none. Of trellis codes
    none is measured.
    outliers: numbers of columns that a linear may keep in 16 bits beside its codes; "knapsack"
    chooses one of them, or none, for each.
    embeddings: "quantize" packs the input embedding and the output head too, each with one width
    for the whole matrix (once where they are tied), in affine codes beside linears in any; every
    budget then counts them.
    kept_dtype: of matrices that are not quantized (embeddings, head, linears kept whole): "auto"
    stores those of float32 with 2^20 values or more in float16, as long as that changes them by at
    most 2^-10 of their norm; "source" stores all as they are. Vectors (norms, biases) and routers
    always stay as they are.
    """

    method: Literal["uniform", "sba", "knapsack", "map"] = "knapsack"
    widths: tuple[int, ...] = DEFAULT_WIDTHS
    outliers: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        default=(), max_length=8, exclude_if=not_
    )
    order: Literal["natural", "activation"] = "activation"
    fuse_siblings: bool = False
    per_linear: bool = False
    keep: tuple[str, ...] = ()
    embeddings: Literal["keep", "quantize"] = "keep"
    kept_dtype: Literal["auto", "source"] = "auto"
    min_bits: int | None = Field(default=None, ge=1, le=8)
    max_bits: int | None = Field(default=None, ge=1, le=8)
    edge_min_bits: int | None = Field(default=None, ge=1, le=8)
    check: Literal["off", "maps", "corrected"] = "maps"
    map: Any = None

    @field_validator("widths")
    @classmethod
    def _known_widths(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        unknown = [w for w in widths if w not in LEGAL_WIDTHS]
        if unknown or not widths:
            raise ValueError(
                f"widths {list(widths)} must be a non-empty subset of {list(LEGAL_WIDTHS)}"
            )
        return tuple(sorted(set(widths)))

    @field_validator("outliers")
    @classmethod
    def _ascending(cls, outliers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(outliers)))

    @model_validator(mode="after")
    def _legal_pairs(self) -> Self:
        if (self.method == "map") != (self.map is not None):
            raise ValueError(
                f"method {self.method!r} with map {'given' if self.map else 'missing'}: "
                "give `map` with method 'map' and with no other"
            )
        if self.min_bits and self.max_bits and self.min_bits > self.max_bits:
            raise ValueError(f"min_bits {self.min_bits} is above max_bits {self.max_bits}")
        if DROPPED in self.legal_widths and self.method in ("uniform", "sba"):
            raise ValueError(
                f"widths {list(self.widths)} with method {self.method!r}: width {DROPPED} drops "
                "groups, which only 'knapsack' can choose; leave it out"
            )
        if self.outliers and self.method != "knapsack":
            raise ValueError(
                f"outliers {list(self.outliers)} with method {self.method!r}: only 'knapsack' can "
                "choose them, and a map has its own; leave them out"
            )
        if set(self.legal_widths) == {DROPPED}:
            raise ValueError(
                f"widths {list(self.widths)} drop every group: give a width with codes too"
            )
        if not self.legal_widths:
            raise ValueError(
                f"no width of {list(self.widths)} lies within min_bits {self.min_bits} "
                f"and max_bits {self.max_bits}"
            )
        if self.edge_min_bits and self.edge_min_bits > max(self.legal_widths):
            raise ValueError(
                f"edge_min_bits {self.edge_min_bits} is above the largest legal width "
                f"{max(self.legal_widths)}"
            )
        return self

    @property
    def legal_widths(self) -> tuple[int, ...]:
        """Widths within min_bits and max_bits, ascending."""
        low, high = self.min_bits or min(LEGAL_WIDTHS), self.max_bits or max(LEGAL_WIDTHS)
        return tuple(w for w in self.widths if low <= w <= high)


class Allocation(BaseAllocation):
    """`BaseAllocation` with the map itself."""

    map: BitWidthMap | None = None


class BaseOmniQuant(Closed):
    """Settings of method "omniquant", as `bitmill.config.methods.OmniQuant` explains them."""

    mode: Literal["clipping", "scales", "rounding"] = "rounding"
    epochs: int | None = Field(default=None, ge=0, le=1000)
    batch: int | None = Field(default=None, ge=1, le=256)
    augmented_loss: bool = False
    tune_scales_steps: int = Field(default=0, ge=0, le=100_000)
    resume_parameters: Any = None


class LocalOmniQuant(BaseOmniQuant):
    """`BaseOmniQuant` with the local folder of the parameters to resume."""

    resume_parameters: Path | None = None


class BaseRefinement(Closed):
    """How codes are found: the JSON of all methods' settings (`bitmill.config.methods`).

    A method takes the settings here that it has, and those in `omniquant`. settings: what else a
    method has. transforms: {"name": ..., settings} of each that rewrites the source, or linears
    before they are solved, in turn (`bitmill.config.transforms`).
    """

    method: str = "gptq"
    clip_search: bool = True
    compensated_grid: bool = True
    scale_refit: bool = True
    asymmetric: bool = True
    omniquant: BaseOmniQuant = BaseOmniQuant()
    settings: dict[str, Any] = Field(default={})
    transforms: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _legal_transforms(self) -> Self:
        for i, asked in enumerate(self.transforms):
            _known(TRANSFORMS, str(asked.get("name")))
            try:
                transform_of(asked)
            except ValidationError as error:
                where, problem = first_problem(error)
                raise ValueError(f"transforms.{i}.{where}: {problem}") from error
            if asked["name"] in ASKED_ELSEWHERE:
                raise ValueError(f"transforms.{i}: {ASKED_ELSEWHERE[asked['name']]}")
        of_linears = any(not one.of_source for one in self.typed_transforms)
        if of_linears and not _known(METHODS, self.method).transformed:
            raise ValueError(f"transforms with method {self.method!r}, which takes none")
        return self

    @model_validator(mode="after")
    def _legal_settings(self) -> Self:
        kind = _known(METHODS, self.method)
        resumes = self.resume_parameters is not None
        if resumes and "resume_parameters" not in kind.model_fields:
            raise ValueError(
                f"omniquant.resume_parameters with method {self.method!r}: give method 'omniquant'"
            )
        elsewhere = self.settings.keys() & self._of_many_methods().keys()
        if elsewhere:
            raise ValueError(f"settings.{min(elsewhere)}: give it outside of `settings`")
        given = self._of_method(kind)
        given.pop("resume_parameters", None)  # what a service has not fetched yet is no path
        try:
            method = kind.model_validate(given)
        except ValidationError as error:
            where, problem = first_problem(error)
            raise ValueError(f"settings.{where}: {problem}") from error
        for asked in self.typed_transforms:
            if not asked.needs <= method.needs:
                raise ValueError(
                    f"transform {asked.name!r} with method {self.method!r}, which looks at no "
                    "inputs: give 'rtn' or 'gptq'"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_empty_settings(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """JSON that readers from before `settings` and `transforms` take, where there are none."""
        found: dict[str, Any] = dump(self)
        for key in ("settings", "transforms"):
            if not found[key]:
                del found[key]
        return found

    @property
    def typed_transforms(self) -> tuple[TransformConfig, ...]:
        """The settings of all transforms."""
        return tuple(transform_of(asked) for asked in self.transforms)

    @property
    def resume_parameters(self) -> Any:
        """Learned parameters to take over, or what a service finds them by; None to learn."""
        return self.omniquant.resume_parameters

    def _of_many_methods(self) -> dict[str, Any]:
        shared = dict(self) | dict(self.omniquant)
        return {key: shared[key] for key in shared.keys() - OF_NO_METHOD}

    def _of_method(self, kind: type[MethodConfig]) -> dict[str, Any]:
        shared = self._of_many_methods()
        return {key: shared[key] for key in shared.keys() & kind.model_fields} | self.settings


class Refinement(BaseRefinement):
    """`BaseRefinement` with local parameters."""

    omniquant: LocalOmniQuant = LocalOmniQuant()

    @classmethod
    def of(cls, method: MethodConfig, transforms: tuple[dict[str, Any], ...] = ()) -> Self:
        """The JSON of a method's settings, behind these transforms."""
        given = dict(method)
        own, learning = (
            {key: given.pop(key) for key in given.keys() & part.model_fields}
            for part in (cls, LocalOmniQuant)
        )
        return cls(
            method=method.name,
            **own,
            omniquant=LocalOmniQuant(**learning),
            settings=given,
            transforms=transforms,
        )

    @property
    def typed(self) -> MethodConfig:
        """The method's settings."""
        kind = METHODS[self.method]
        return kind.model_validate(self._of_method(kind))

    def afresh(self) -> Self:
        """The same without parameters to resume."""
        learning = self.omniquant.model_copy(update={"resume_parameters": None})
        return self.model_copy(update={"omniquant": learning})

    @classmethod
    def place(cls, setting: str) -> str:
        """Where the JSON of a configuration has a setting of some method."""
        if setting in cls.model_fields:
            return f"refinement.{setting}"
        part = "omniquant" if setting in LocalOmniQuant.model_fields else "settings"
        return f"refinement.{part}.{setting}"


def _known(registry: Registry[T], name: str) -> T:
    try:
        return registry[name]
    except SpecError as error:
        raise ValueError(error.message) from error


TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{1,128}$")]
QUANTIZED_BASELINES = ("uniform", "uniform-2", "uniform-3", "uniform-4")


def known_baselines() -> tuple[str, ...]:
    """Names that `Evaluation.baselines` takes; those by rules of packages among them."""
    return (*QUANTIZED_BASELINES, "embeddings", *rounded_baselines())


def _known_baseline(name: str) -> str:
    known = known_baselines()
    if name not in known:
        raise ValueError(f"baseline {name!r} is unknown: known are {', '.join(known)}")
    return name


def _list_baselines(schema: JsonDict) -> None:
    schema["enum"] = [*known_baselines()]


Baseline = Annotated[str, AfterValidator(_known_baseline), Field(json_schema_extra=_list_baselines)]


class Evaluation(Closed):
    """What is measured on the packed checkpoint; `sequences` caps the windows of each text.

    tasks: lm-evaluation-harness tasks by name, measured on the source and on the result with the
    whole model in memory; needs the extra `eval`.

    framing: how windows begin; tasks are asked in the chat template too where it is "chat".

    baselines: also quantize and measure these: plain GPTQ in natural column order at one width,
    "uniform" at the legal width nearest to the map's mean, "uniform-3" at 3 bits; "embeddings" is
    the result itself with its input embedding and output head packed too, at 8 bits;
    others are the result with inputs of its linears, or keys and values, rounded while it runs
    (`config/rounded.py`).
    """

    texts: tuple[Literal["wiki_evaluation", "handbook_evaluation"], ...] = (
        "wiki_evaluation",
        "handbook_evaluation",
    )
    sequences: int | None = Field(default=None, ge=1)
    length: int = Field(default=2048, ge=8, le=131072)
    baselines: tuple[Baseline, ...] = ()
    tasks: tuple[TaskName, ...] = ()
    framing: Framing = "tokenizer"

    @property
    def refined_baselines(self) -> tuple[str, ...]:
        """Those that are quantized too, each once."""
        return tuple(name for name in QUANTIZED_BASELINES if name in self.baselines)

    @property
    def rounded(self) -> dict[str, Rounded]:
        """Those that are the result with something rounded, by name."""
        known = rounded_baselines()
        return {name: known[name] for name in self.baselines if name in known}


class Stored(Closed):
    """What names the code and the format of its result. JSON leaves defaults out, so that
    specifications from before these had names stay what they were."""

    code: CodeName = "auto"
    format: FormatName = DEFAULT_FORMAT

    @property
    def code_name(self) -> str:
        """The code, "auto" decided."""
        return AUTO if self.code == "auto" else self.code

    @model_validator(mode="before")
    @classmethod
    def _of_code(cls, data: Any) -> Any:
        return with_code_defaults(data)

    @model_serializer(mode="wrap")
    def _without_default_format(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        for key, usual in (("code", "auto"), ("format", DEFAULT_FORMAT)):
            if found[key] == usual:
                del found[key]
        return found


class QuantizationConfig(Stored):
    """Everything that determines a result, besides the model's own files.

    effort: how much is done for quality where `refinement` and the number of calibration windows
    leave it open (`config/effort.py`).
    threads: CPU threads (part of the result's identity: sums depend on it).
    devices: accelerators that work on it together, of one machine (part of its identity too).
    format: in which the result is stored (`bitmill.formats.format`), one that keeps codes.
    code: of the groups (`config/codes.py`). Of trellis codes, `allocation.widths` are all by
    default, and the format is "bitmill-2".
    """

    budget: Budget
    effort: Effort = "fast"
    allocation: Allocation = Allocation()
    refinement: Refinement = Refinement()
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    seed: int = Field(default=0, ge=0, lt=2**31)
    threads: int | None = Field(default=None, ge=1, le=1024)
    devices: int = Field(default=1, ge=1, le=64)

    _filled_by_effort = model_validator(mode="before")(with_effort)

    @property
    def method(self) -> MethodConfig:
        """How codes are found."""
        return self.refinement.typed.of_code(self.code_name)

    @model_validator(mode="after")
    def _fits_code(self) -> Self:
        code, allocation, method = self.code_name, self.allocation, self.method
        check_widths(code, allocation.widths, "allocation.widths")
        mapped = allocation.map.linears if allocation.map else {}
        for widths in mapped.values():
            check_widths(code, widths, "allocation.map")
        asked = {*allocation.legal_widths} if allocation.map is None else {*chain(*mapped.values())}
        if DROPPED in asked and not method.drops:
            able = [name for name in METHODS.names() if METHODS[name].drops]
            raise SpecError(
                f"width {DROPPED}, which drops groups, with refinement {method.name!r}, which "
                f"cannot: give one of {able}, or leave the width out",
                param="allocation.widths" if allocation.map is None else "allocation.map",
            )
        keeps = allocation.outliers or (allocation.map is not None and allocation.map.outliers)
        if keeps and not method.outliers:
            able = [name for name in METHODS.names() if METHODS[name].outliers]
            raise SpecError(
                f"outlier columns with refinement {method.name!r} and code {code!r}, which have no "
                f"place for them: give one of {able} and code 'affine', or leave them out",
                param="allocation.outliers" if allocation.outliers else "allocation.map",
            )
        if method.judged and not self.calibration.held_out:
            raise SpecError(
                f"refinement {method.name!r} with calibration.held_out 0: held-out windows choose "
                "what is kept of what it learns, so give at least 1, or method 'gptq'",
                code="no_held_out",
                param="calibration.held_out",
            )
        if "embeddings" in self.evaluation.baselines and allocation.embeddings == "quantize":
            raise SpecError(
                "evaluation.baselines has 'embeddings', which this job packs already: leave it out",
                param="evaluation.baselines",
            )
        of_embeddings = set(allocation.legal_widths) & set(CODES["affine"].widths)
        if allocation.embeddings == "quantize" and not of_embeddings:
            raise SpecError(
                f"allocation.widths {list(allocation.legal_widths)} with allocation.embeddings "
                "'quantize': embeddings and heads are in affine codes, which have only "
                f"{list(CODES['affine'].widths)}: allow one of those, or give 'keep'",
                param="allocation.widths",
            )
        if code != AUTO and allocation.check == "corrected":
            raise SpecError(
                f"allocation.check 'corrected' with code {code!r}, whose maps are not measured: "
                "leave it out",
                param="allocation.check",
            )
        return self

    @property
    def packs_embeddings(self) -> Self:
        """The same with `allocation.embeddings` at "quantize", for planning."""
        allocation = self.allocation.model_copy(update={"embeddings": "quantize"})
        return self.model_copy(update={"allocation": allocation})

    @property
    def transforms(self) -> tuple[TransformConfig, ...]:
        """What rewrites linears before they are solved, beside column orders."""
        asked = tuple(one for one in self.refinement.typed_transforms if not one.of_source)
        return asked + self.method.transforms

    @property
    def source_transforms(self) -> tuple[TransformConfig, ...]:
        """What rewrites the source model before all else."""
        return tuple(one for one in self.refinement.typed_transforms if one.of_source)

    @property
    def weighs_in_profile(self) -> bool:
        """Whether the profile's backward pass goes over the windows whose tokens refinement
        weighs by the gradient."""
        alike = self.calibration.profiled == self.calibration.sequences
        profiled = self.allocation.method == "knapsack"
        return alike and profiled and "gradient" in self.method.needs

    @field_validator("refinement", mode="before")
    @classmethod
    def _of_a_method(cls, given: Any) -> Any:
        return Refinement.of(given) if isinstance(given, MethodConfig) else given

    @model_validator(mode="after")
    def _learns_alone(self) -> Self:
        refuse_shared_learning(self.devices, self.refinement)
        refuse_unmeasured_loss(self.budget, self.allocation, self.refinement, self.calibration)
        return self


def with_code_defaults(data: Any) -> Any:
    """A configuration as JSON, or its parts by name, with what its code has by default where
    nothing else is asked for. A format that only one code is stored in brings that."""
    if not isinstance(data, Mapping):
        return data
    name, chosen = data.get("code", "auto"), data.get("format", DEFAULT_FORMAT)
    if name == "auto" and chosen != DEFAULT_FORMAT:
        name = next((code for code, known in CODES.items() if known.format == chosen), name)
    code = CODES.get(str(name))
    if code is None:
        return data
    data = {**data, "code": name}
    filled, allocation = dict(data), data.get("allocation", {})
    if chosen == DEFAULT_FORMAT:
        filled["format"] = code.format
    if isinstance(allocation, Mapping) and "widths" not in allocation:
        filled["allocation"] = {**allocation, "widths": code.usual}
    elif isinstance(allocation, BaseAllocation) and "widths" not in allocation.model_fields_set:
        filled["allocation"] = allocation.model_copy(update={"widths": code.usual})
    return filled


def refuse_unmeasured_loss(
    budget: Budget,
    allocation: BaseAllocation,
    refinement: BaseRefinement,
    calibration: Calibration,
) -> None:
    """Raise `ValueError` where a target of loss cannot be searched for."""
    if budget.max_loss_increase is None:
        return
    if allocation.method != "knapsack":
        raise ValueError(
            f"budget.max_loss_increase with allocation.method {allocation.method!r}: give "
            "'knapsack', which can meet any target"
        )
    if allocation.outliers:
        raise ValueError(
            f"budget.max_loss_increase with allocation.outliers {list(allocation.outliers)}: no "
            "target of loss is searched for with outliers; give another budget, or leave them out"
        )
    if calibration.held_out < 2:
        raise ValueError(
            f"budget.max_loss_increase with calibration.held_out {calibration.held_out}: give at "
            "least 2 windows to measure the loss on"
        )
    if refinement.resume_parameters is not None:
        raise ValueError(
            "budget.max_loss_increase with omniquant.resume_parameters: those belong to one map; "
            "give it with method 'map'"
        )


def refuse_shared_learning(devices: int, refinement: BaseRefinement) -> None:
    """Raise `ValueError` where several devices are to learn together."""
    most = METHODS[refinement.method].max_devices
    if most is not None and devices > most:
        raise ValueError(
            f"devices {devices} with refinement {refinement.method!r}, which works on {most}: "
            f"give devices {most}, or another method"
        )


def parse_config(data: object) -> QuantizationConfig:
    """Build a `QuantizationConfig` from decoded JSON.

    Raises `SpecError` naming the first offending key, its value's problem and the rule.
    """
    return parse_part(QuantizationConfig, data)


def parse_part(kind: type[Part], data: object) -> Part:
    """Build one part of what is asked for; raises `SpecError` as `parse_config` does."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        where, problem = first_problem(error)
        raise SpecError(f"{where or 'spec'}: {problem}", param=where or "spec") from error
