"""Job specification: what a client of the service asks for. Frozen, closed and versioned.

Torch-free. A specification may name what only a service can find: a model on the Hub or uploaded
before, the map or the learned parameters of an earlier job, an uploaded map. `JobSpec.config` gives
what the library works with, once these lie here. A stored specification carries `schema_version`;
readers refuse others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.closed import Closed
from bitmill.config.codes import check_widths
from bitmill.config.effort import Effort, with_effort
from bitmill.config.quantization import (
    Allocation,
    BaseAllocation,
    BaseOmniQuant,
    BaseRefinement,
    Budget,
    Calibration,
    Evaluation,
    FileText,
    LocalOmniQuant,
    QuantizationConfig,
    Refinement,
    Stored,
    parse_part,
    refuse_shared_learning,
    refuse_unmeasured_loss,
)
from bitmill.errors import SpecError
from bitmill.formats.export_plan import MOST_EXPORTS, ExportTarget, with_exports

RepoId = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_.-]{1,96}(/[A-Za-z0-9_.-]{1,96})?$", max_length=193)
]


class HubModel(Closed):
    """A model repository on the Hugging Face Hub (or the host named by HF_ENDPOINT)."""

    source: Literal["hub"] = "hub"
    repo_id: RepoId
    revision: str = Field(default="main", pattern=r"^[A-Za-z0-9_./-]{1,128}$")
    file: str | None = Field(default=None, max_length=512)

    @field_validator("repo_id")
    @classmethod
    def _names_something(cls, repo_id: str) -> str:
        if {".", ".."} & set(repo_id.split("/")):
            raise ValueError(f"{repo_id!r} is no repository: a name is more than dots")
        return repo_id


class PathModel(Closed):
    """A folder below one of the service's allow-listed roots (any folder without a service)."""

    source: Literal["path"] = "path"
    path: str = Field(min_length=1, max_length=4096)
    file: str | None = Field(default=None, max_length=512)


class UploadModel(Closed):
    """A model uploaded to the service beforehand."""

    source: Literal["upload"] = "upload"
    upload_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    file: str | None = Field(default=None, max_length=512)


ModelRef = Annotated[HubModel | PathModel | UploadModel, Field(discriminator="source")]


class InlineMap(Closed):
    """A bit-width map given in the specification itself."""

    source: Literal["inline"] = "inline"
    map: BitWidthMap


class JobMap(Closed):
    """The map of an earlier job of the same service."""

    source: Literal["job"] = "job"
    job_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")


class UploadedMap(Closed):
    """A map uploaded to the service beforehand."""

    source: Literal["upload"] = "upload"
    map_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")


class JobAllocation(BaseAllocation):
    """How widths are given to groups; the map may lie elsewhere."""

    map: Annotated[InlineMap | JobMap | UploadedMap, Field(discriminator="source")] | None = None


class JobParameters(Closed):
    """What an earlier job of the same service learned."""

    source: Literal["job"] = "job"
    job_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")


class UploadParameters(Closed):
    """A published folder that was uploaded to the service beforehand."""

    source: Literal["upload"] = "upload"
    upload_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")


class PathParameters(Closed):
    """A published folder, below an allow-listed root (any folder without a service)."""

    source: Literal["path"] = "path"
    path: str = Field(min_length=1, max_length=4096)


class JobOmniQuant(BaseOmniQuant):
    """Block-wise learning; parameters to resume may be those of an earlier job."""

    resume_parameters: (
        Annotated[JobParameters | PathParameters | UploadParameters, Field(discriminator="source")]
        | None
    ) = None


class JobRefinement(BaseRefinement):
    """How codes are found."""

    omniquant: JobOmniQuant = JobOmniQuant()


JobKind = Literal["quantize", "export", "push"]


class JobSpec(Stored):
    """Everything that determines a job's result, besides the model's own files.

    effort: how much is done for quality where `refinement` and the number of calibration windows
    leave it open (`bitmill.config.effort`).
    threads: CPU threads of the runner (part of the result's identity: sums depend on it).
    devices: accelerators that work on the job together, of one machine (part of its identity too).
    format: in which the result is stored. code: of its groups.
    exports: formats of other runtimes that the result is written in by jobs of their own, once this
    one has succeeded; what they need decides what `allocation` leaves open.
    """

    kind: ClassVar[JobKind] = "quantize"

    schema_version: Literal[1] = 1
    model: ModelRef
    budget: Budget
    effort: Effort = "fast"
    allocation: JobAllocation = JobAllocation()
    refinement: JobRefinement = JobRefinement()
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    seed: int = Field(default=0, ge=0, lt=2**31)
    threads: int | None = Field(default=None, ge=1, le=1024)
    devices: int = Field(default=1, ge=1, le=64)
    label: str | None = Field(default=None, max_length=200)
    deadline_s: int | None = Field(default=None, ge=1)
    exports: tuple[ExportTarget, ...] = Field(
        default=(), max_length=MOST_EXPORTS, exclude_if=lambda targets: not targets
    )

    _filled_by_effort = model_validator(mode="before")(with_effort)
    _filled_by_exports = model_validator(mode="before")(with_exports)

    @model_validator(mode="after")
    def _has_widths(self) -> Self:
        try:
            check_widths(self.code_name, self.allocation.widths, "allocation.widths")
        except SpecError as error:
            raise ValueError(error.message) from error
        return self

    @model_validator(mode="after")
    def _learns_alone(self) -> Self:
        refuse_shared_learning(self.devices, self.refinement)
        refuse_unmeasured_loss(self.budget, self.allocation, self.refinement, self.calibration)
        return self

    @field_validator("model")
    @classmethod
    def _plain_file(cls, model: ModelRef) -> ModelRef:
        if model.file is not None:
            parts = PurePosixPath(model.file).parts
            if len(parts) != 1 or ".." in parts or not model.file.endswith(".gguf"):
                raise ValueError(f"file {model.file!r} must be the plain name of a .gguf file")
        return model

    def config(
        self,
        *,
        text: Path | None = None,
        bit_widths: BitWidthMap | None = None,
        parameters: Path | None = None,
    ) -> QuantizationConfig:
        """What the library is asked for, with what the specification refers to.

        text: where the file of the calibration text lies; bit_widths: the map, where the
        specification names another's; parameters: the local folder of those to resume. Paths that
        are not given are taken as they stand. Raises `SpecError` for a reference to another job or
        an upload that nothing is given for.
        """
        calibration = self.calibration
        if text is not None and isinstance(calibration.text, FileText):
            local = calibration.text.model_copy(update={"path": str(text)})
            calibration = calibration.model_copy(update={"text": local})
        omniquant = self.refinement.omniquant
        resumed = self._parameters(parameters)
        learning = LocalOmniQuant.model_validate(dict(omniquant) | {"resume_parameters": resumed})
        return QuantizationConfig(
            code=self.code,
            budget=self.budget,
            effort=self.effort,
            allocation=Allocation.model_validate(
                {key: getattr(self.allocation, key) for key in self.allocation.model_fields_set}
                | {"map": self._map(bit_widths)}
            ),
            refinement=Refinement.model_validate(dict(self.refinement) | {"omniquant": learning}),
            calibration=calibration,
            evaluation=self.evaluation,
            seed=self.seed,
            threads=self.threads,
            devices=self.devices,
            format=self.format,
        )

    def _map(self, given: BitWidthMap | None) -> BitWidthMap | None:
        named = self.allocation.map
        if named is None:
            return None
        if isinstance(named, InlineMap):
            return named.map
        if given is None:
            raise SpecError(
                f"the map of another {named.source} needs a service: give it inline",
                param="allocation.map",
            )
        return given

    def _parameters(self, given: Path | None) -> Path | None:
        named = self.refinement.resume_parameters
        if named is None or given is not None:
            return given if named else None
        if not isinstance(named, PathParameters):
            raise SpecError(
                "learned parameters of another job need a service: give the path of its folder",
                param=Refinement.place("resume_parameters"),
            )
        return Path(named.path)


class ExportSpec(ExportTarget):
    """A finished job's result in the format of another runtime.

    job_id: of that job. model: what it quantized.
    """

    kind: ClassVar[JobKind] = "export"

    schema_version: Literal[1] = 1
    model: ModelRef
    job_id: str
    label: str | None = None
    deadline_s: int | None = None


class PushTarget(Closed):
    """A repository of the Hub to send a finished job's files to.

    private: of a repository that is made. base_model: Hub repository of the source, where the job
    does not name one; license: its identifier on the Hub, looked up where not given.
    """

    repo_id: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,96}/[A-Za-z0-9_.-]{1,96}$", max_length=193)
    private: bool = True
    base_model: RepoId | None = None
    license: str | None = Field(default=None, pattern=r"^[A-Za-z0-9.+-]{1,64}$")


class PushSpec(PushTarget):
    """A finished job's files sent to a repository; its token is stored elsewhere, encrypted.

    job_id: of that job. model: what was quantized. calibration: what on. packed_job: whose quality
    report the card shows.
    """

    kind: ClassVar[JobKind] = "push"

    schema_version: Literal[1] = 1
    model: ModelRef
    job_id: str
    packed_job: str
    calibration: Calibration | None = None
    label: str | None = None
    deadline_s: int | None = None


AnySpec = JobSpec | ExportSpec | PushSpec

BEFORE_EFFORT: Mapping[str, Mapping[str, Any]] = {
    "allocation": {"kept_dtype": "source", "check": "off"},
    "calibration": {"framing": "none"},
    "evaluation": {"framing": "none"},
}
"""What jobs did before their specifications could say it; `effort` came with the last of these."""


def parse_stored(kind: JobKind, data: Mapping[str, Any]) -> AnySpec:
    """The specification of a job of this kind, from what was stored.

    One from before `effort` keeps what its job did. Raises `SpecError` as `parse_spec` does.
    """
    if kind == "export":
        return parse_part(ExportSpec, data)
    if kind == "push":
        return parse_part(PushSpec, data)
    if "effort" not in data:
        then = {part: {**did, **data.get(part, {})} for part, did in BEFORE_EFFORT.items()}
        data = {**data, **then}
    return parse_spec(data)


def parse_spec(data: object) -> JobSpec:
    """Build a `JobSpec` from decoded JSON.

    Raises `SpecError` naming the first offending key, its value's problem and the rule.
    """
    return parse_part(JobSpec, data)
