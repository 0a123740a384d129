"""Options that set a specification, defined once for `submit`, `quantize` and `map allocate`.

An option names the field of `JobSpec` that it sets; type, choices and default are the field's own.
A command takes groups of them by the decorator `takes`, and gets what was given as `given`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from bitmill.config.references import text_reference
from bitmill.errors import InputError
from bitmill.io import bounded_json
from bitmill_service.cli.spec import (
    comma_separated,
    map_file,
    map_reference,
    parameters_folder,
    parameters_reference,
)
from bitmill_service.units import parse_size
from bitmill_workers.job_spec import JobSpec


@dataclass(frozen=True)
class SpecOption:
    """An option and the field that it sets.

    field: path in the specification, e.g. "calibration.held_out".
    read: JSON value of the option's text, where the text is not the field's value itself.
    """

    name: str
    field: str
    help: str
    read: Callable[[str], Any] | None = None
    metavar: str | None = None

    @property
    def argument(self) -> str:
        """The command's argument."""
        return self.name.removeprefix("--").replace("-", "_")

    def parameter(self, group: str) -> inspect.Parameter:
        """What Typer makes the option from; None stands for an option that was not given."""
        found = field_of(self.field)
        kinds = [kind for kind in _alternatives(found.annotation) if kind is not NoneType]
        kind = str if self.read is not None else kinds[0]
        default = _typed(found.default)
        option = typer.Option(
            f"{self.name}/--no-{self.name.removeprefix('--')}" if kind is bool else self.name,
            help=self.help + (f" [default: {default}]" if default else ""),
            metavar=self.metavar,
            rich_help_panel=group,
        )
        return inspect.Parameter(
            self.argument,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, option],
        )


def export_targets(text: str) -> list[Any]:
    """Formats by name, or with their settings as a JSON array."""
    if text.lstrip().startswith("["):
        return json_array(text, "--exports", '[{"format": "gguf"}]')
    return [{"format": name} for name in comma_separated(text)]


def json_array(
    text: str, option: str = "--transforms", example: str = '[{"name": "hadamard"}]'
) -> list[Any]:
    """A JSON array given as text of an option."""
    found = _parsed(text, option)
    if not isinstance(found, list):
        raise InputError(
            f"{text!r} is no JSON array: give for example '{example}'",
            param=option,
        )
    return found


def json_object(
    text: str, option: str = "--refine-settings", example: str = '{"rounds": 2}'
) -> dict[str, Any]:
    """A JSON object given as text of an option."""
    found = _parsed(text, option)
    if not isinstance(found, dict):
        raise InputError(
            f"{text!r} is no JSON object: give for example '{example}'",
            param=option,
        )
    return found


def _parsed(text: str, option: str) -> Any:
    try:
        return bounded_json.loads(text.encode())
    except ValueError as error:
        raise InputError(f"{text!r} is no JSON: {error}", param=option) from error


BUDGET, ALLOCATION, REFINEMENT = "Budget (exactly one)", "Allocation", "Refinement"
CALIBRATION, EVALUATION, RUN = "Calibration", "Evaluation", "Model and run"
LOCAL_RESULTS, SERVICE_RESULTS, JOB = "Earlier results", "Results of earlier jobs", "Job"

GROUPS: dict[str, tuple[SpecOption, ...]] = {
    BUDGET: (
        SpecOption("--bits", "budget.bits", "Bits per quantized weight, scales included."),
        SpecOption("--code-bits", "budget.code_bits", "Mean bits of the codes alone."),
        SpecOption(
            "--size", "budget.size", "Bytes of the checkpoint, e.g. 120MB.", parse_size, "SIZE"
        ),
        SpecOption(
            "--memory",
            "budget.memory",
            "Bytes where it is run, e.g. 8GB, for weights, cache and workspace; with --context.",
            parse_size,
            "SIZE",
        ),
        SpecOption(
            "--max-loss",
            "budget.max_loss_increase",
            "Nats a token that the loss may rise; the smallest checkpoint within it is searched.",
        ),
        SpecOption("--context", "budget.context", "Tokens of a sequence that memory must hold."),
        SpecOption("--cache-batch", "budget.batch", "Sequences that memory must hold at once."),
        SpecOption("--cache-dtype", "budget.cache_dtype", "Of the keys and values in memory."),
    ),
    ALLOCATION: (
        SpecOption("--method", "allocation.method", "How widths are chosen."),
        SpecOption(
            "--widths",
            "allocation.widths",
            "Widths to choose from; 0 drops groups.",
            comma_separated,
            "N,...",
        ),
        SpecOption(
            "--outliers",
            "allocation.outliers",
            "Numbers of columns that a linear may keep in 16 bits.",
            comma_separated,
            "N,...",
        ),
        SpecOption("--min-bits", "allocation.min_bits", "Smallest width."),
        SpecOption("--max-bits", "allocation.max_bits", "Largest width."),
        SpecOption(
            "--edge-min-bits",
            "allocation.edge_min_bits",
            "Smallest width in the first and the last decoder block.",
        ),
        SpecOption("--order", "allocation.order", "Order of the columns before grouping."),
        SpecOption("--fuse-siblings", "allocation.fuse_siblings", "One map for q/k/v, gate/up."),
        SpecOption("--per-linear", "allocation.per_linear", "One width for all of a linear."),
        SpecOption(
            "--keep",
            "allocation.keep",
            "Linears that are not quantized, by patterns of their full names.",
            comma_separated,
            "GLOB,...",
        ),
        SpecOption(
            "--check",
            "allocation.check",
            "Measure the knapsack's map and others before one is taken.",
        ),
        SpecOption("--embeddings", "allocation.embeddings", "Input embedding and output head."),
        SpecOption(
            "--kept-dtype",
            "allocation.kept_dtype",
            "Matrices that are not quantized: in 16 bits where exact enough, or as they are.",
        ),
    ),
    REFINEMENT: (
        SpecOption(
            "--effort", "effort", "How much is done for quality where the options below are open."
        ),
        SpecOption("--refine", "refinement.method", "How codes are found."),
        SpecOption("--clip-search", "refinement.clip_search", "Clip ranges where that helps."),
        SpecOption(
            "--compensated-grid",
            "refinement.compensated_grid",
            "Then search grids by GPTQ's own loss.",
        ),
        SpecOption("--scale-refit", "refinement.scale_refit", "Refit scales and codes at the end."),
        SpecOption(
            "--asymmetric", "refinement.asymmetric", "Correct for the quantized prefix (gptq)."
        ),
        SpecOption("--learn", "refinement.omniquant.mode", "What omniquant learns."),
        SpecOption("--epochs", "refinement.omniquant.epochs", "Passes over the calibration text."),
        SpecOption("--batch", "refinement.omniquant.batch", "Sequences of a learning step."),
        SpecOption(
            "--augmented-loss",
            "refinement.omniquant.augmented_loss",
            "Learn on inputs of the float model too.",
        ),
        SpecOption(
            "--tune-scales-steps",
            "refinement.omniquant.tune_scales_steps",
            "Steps that tune all scales end to end after the blocks.",
        ),
        SpecOption(
            "--refine-settings",
            "refinement.settings",
            "Other settings of the method, as a JSON object.",
            json_object,
            "JSON",
        ),
        SpecOption(
            "--transforms",
            "refinement.transforms",
            "What rewrites linears before they are solved, as a JSON array of objects with a name "
            "each.",
            json_array,
            "JSON",
        ),
    ),
    CALIBRATION: (
        SpecOption(
            "--calibration-text",
            "calibration.text",
            "A text or .jsonl file (of a service: below a model root), dataset:NAME of the Hub, or "
            "bundled:NAME (wiki_calibration, mixture_calibration, blend_calibration).",
            text_reference,
            "TEXT",
        ),
        SpecOption("--calibration-field", "calibration.text.field", "Field of a record's text."),
        SpecOption("--calibration-config", "calibration.text.config", "Configuration of the set."),
        SpecOption("--calibration-split", "calibration.text.split", "Split of the data set."),
        SpecOption(
            "--calibration-sequences",
            "calibration.sequences",
            "Windows; 160 by --effort best in trellis codes (docs/quality.md).",
        ),
        SpecOption("--calibration-length", "calibration.length", "Tokens of a window."),
        SpecOption("--calibration-framing", "calibration.framing", "How windows begin."),
        SpecOption("--held-out", "calibration.held_out", "Further windows, for decisions alone."),
        SpecOption(
            "--held-out-text", "calibration.held_out_text", "Bundled text that half of them are of."
        ),
        SpecOption(
            "--profile-sequences",
            "calibration.profile_sequences",
            "Windows that the profile is measured on, from the first; all where not given.",
        ),
    ),
    EVALUATION: (
        SpecOption(
            "--evaluation-texts",
            "evaluation.texts",
            "Texts to measure.",
            comma_separated,
            "TEXT,...",
        ),
        SpecOption("--evaluation-sequences", "evaluation.sequences", "At most so many windows."),
        SpecOption("--evaluation-length", "evaluation.length", "Tokens of a window."),
        SpecOption("--evaluation-framing", "evaluation.framing", "How windows begin."),
        SpecOption(
            "--baselines",
            "evaluation.baselines",
            "Measure plain GPTQ too: uniform (the map's mean width), uniform-2, -3, -4; "
            "embeddings: the result with packed ones; activations-8, -4, -fp8, cache-8, -4, -2: "
            "the result with these rounded; activations-8-RULE: by a rule of docs/methods.md.",
            comma_separated,
            "NAME,...",
        ),
        SpecOption(
            "--tasks",
            "evaluation.tasks",
            "Tasks of lm-evaluation-harness to measure.",
            comma_separated,
            "TASK,...",
        ),
    ),
    RUN: (
        SpecOption("--file", "model.file", "GGUF file in the model's folder.", metavar="NAME"),
        SpecOption("--seed", "seed", "Seed of everything random."),
        SpecOption("--threads", "threads", "CPU threads."),
        SpecOption("--devices", "devices", "Accelerators to work on together."),
        SpecOption("--code", "code", "How groups are written as bits."),
        SpecOption("--format", "format", "What the result is stored in.", metavar="NAME"),
    ),
    LOCAL_RESULTS: (
        SpecOption(
            "--map",
            "allocation.map",
            "Bit-width map for --method map: JSON, a packed folder or a SliM-LLM file (.pt).",
            map_file,
            "PATH",
        ),
        SpecOption(
            "--resume-parameters",
            "refinement.omniquant.resume_parameters",
            "Train nothing: take what a run with the same settings learned.",
            parameters_folder,
            "DIR",
        ),
    ),
    SERVICE_RESULTS: (
        SpecOption(
            "--map",
            "allocation.map",
            "Bit-width map for --method map: job:ID, upload:ID, or a local one (JSON, a packed "
            "folder, a SliM-LLM file).",
            map_reference,
            "MAP",
        ),
        SpecOption(
            "--resume-parameters",
            "refinement.omniquant.resume_parameters",
            "Train nothing: take what a job with the same settings learned, the service's folder "
            "of one, path:ROOT/FOLDER, or an uploaded one, upload:ID.",
            parameters_reference,
            "JOB",
        ),
    ),
    JOB: (
        SpecOption("--label", "label", "A name to find the job by."),
        SpecOption(
            "--exports",
            "exports",
            "Formats to write the result in, too, by jobs of their own: names, or a JSON array of "
            "objects with format and settings.",
            export_targets,
            "NAME,...",
        ),
        SpecOption("--deadline", "deadline_s", "Fail the job after this.", metavar="SECONDS"),
    ),
}
COMMON = (BUDGET, ALLOCATION, REFINEMENT, CALIBRATION, EVALUATION, RUN)
"""What `quantize` and `submit` share."""

SpecFile = Annotated[
    str | None,
    typer.Option(
        "--spec", metavar="FILE", help="JSON specification to start from, - for standard input."
    ),
]


class GroupedCommand(TyperCommand):
    """A command whose help lists options under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, the command's own options, then those of groups."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            argument = parameter.param_type_name == "argument"
            group = getattr(parameter, "rich_help_panel", None)
            if record is not None:
                heading = "Arguments" if argument else group or "Options"
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def takes(*groups: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add groups of options to a command, after its own; it gets what was given as `given`."""
    options = [(group, option) for group in groups for option in GROUPS[group]]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "given"]
        added = [option.parameter(group) for group, option in options]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            texts = {option: arguments.pop(option.argument) for _, option in options}
            given = {
                option.field: option.read(text) if option.read else text
                for option, text in texts.items()
                if text is not None
            }
            command(**arguments, given=given)

        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, *added]
        )
        return run

    return decorate


def field_of(path: str) -> FieldInfo:
    """The field of `JobSpec` at a path; where it may hold several models, of the first with it."""
    models: Sequence[type[BaseModel]] = [JobSpec]
    for name in path.split("."):
        found = next(model.model_fields[name] for model in models if name in model.model_fields)
        models = list(_models(found.annotation))
    return found


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for kind in _alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union; anything else is its own only alternative."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member)
    elif origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    else:
        yield annotation


def _typed(default: Any) -> str:
    """A default as it would be typed; empty where there is none."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default) if isinstance(default, str | int | float) else ""
