"""A job from fetched files to a published checkpoint: its stages, in order.

    resolve -> plan -> profile -> allocate -> refine -> pack -> verify -> evaluate -> publish

Every stage (`stages/`) writes one folder of the job directory and is skipped while its inputs are
the same (`stage.py`, `workspace.py`); `profile` and `refine` also go on at the last finished
decoder block. The same settings on the same machine give the same bytes: seed, thread count, device
kind, number of devices and compute precision are inputs too. Nothing here needs a network.

With several devices every rank runs this: `profile`, `refine` and `evaluate` divide the work, the
other stages are the first rank's while the others wait (`runtime/ranks.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from bitmill.allocation.profile import ProfileOrigin, SensitivityProfile, is_of_profiles
from bitmill.allocation.profiled import ProfiledModel
from bitmill.calibration.kept_weights import KeptWeights
from bitmill.calibration.texts import check_text_file
from bitmill.calibration.windows import CalibrationSet, calibration_tokens, evaluation_windows
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.made_for import MadeFor, foreign_map
from bitmill.config.quantization import FileText, QuantizationConfig
from bitmill.errors import (
    STOPS,
    SpecError,
    asked_bytes,
    out_of_memory,
    raise_resource_error,
    refused_memory,
)
from bitmill.io.atomic import sha256_json
from bitmill.io.targets import check_apart, check_kept, check_result
from bitmill.pipeline.admission import Admission, admit
from bitmill.pipeline.learned_parameters import LearnedFor, LearnedParameters
from bitmill.pipeline.progress import Progress
from bitmill.pipeline.requirements import Room, check_room, smaller_jobs
from bitmill.pipeline.result import Result
from bitmill.pipeline.source import Source
from bitmill.pipeline.stage import Environment, content
from bitmill.pipeline.stages import (
    allocate,
    evaluate,
    pack,
    profile,
    publish,
    refine,
    resolve,
    search,
    source_outputs,
)
from bitmill.pipeline.stages import plan as planning
from bitmill.pipeline.stages import resume as resuming
from bitmill.pipeline.stages import verify as verifying
from bitmill.pipeline.stages.allocate import Allocated
from bitmill.pipeline.stages.refine import Inputs as Refining
from bitmill.pipeline.stages.refine import Refined
from bitmill.pipeline.work_folder import (
    BLOCKS_FOLDER,
    FORMER_WEIGHTS_FOLDER,
    WEIGHTS_FOLDER,
    is_of_a_workspace,
    is_of_shared_stages,
)
from bitmill.pipeline.workspace import Made, Turns, Workspace
from bitmill.plan.model_plan import Plan
from bitmill.refinement.kept_blocks import KeptBlocks
from bitmill.results import QualityReport
from bitmill.runtime.device import device_of
from bitmill.runtime.memory import refusal
from bitmill.runtime.process import computing
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.runtime.warm_up import warm_up

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What a run is given. profiles: folder of profiles by id, shared between jobs, or None.

    output: where the result goes; None for a run that ends before there is one. task_folder:
    harness task files beside the harness's own, or None. model_name: what the model is called in
    records and warnings, by default as its folder or GGUF file is.
    """

    config: QuantizationConfig
    model_folder: Path
    space: Workspace
    output: Path | None
    gguf: str | None
    profiles: Path | None
    task_folder: Path | None = None
    model_name: str | None = None

    @cached_property
    def environment(self) -> Environment:
        """What of this process decides the bytes of a result."""
        return Environment.here(self.space.device, self.space.group)

    @cached_property
    def admission(self) -> Admission:
        """That the job can be done at all; raises what `admit` raises."""
        return admit(self.model_folder, self.config, gguf=self.gguf)

    def check_folders(self) -> None:
        """Raise `InputError` for folders that hold what is not Bitmill's, before any is touched."""
        source = self.model_folder / self.gguf if self.gguf else self.model_folder
        folders = {
            "the source": source,
            "the output": self.output,
            "the work folder": self.space.root,
            "the folder of profiles": self.profiles,
            "the folder of stages": self.space.shared,
        }
        check_apart(folders)
        if self.output is not None:
            check_result(self.output)
        check_kept(self.space.root, is_of_a_workspace, param="work")
        if self.profiles is not None:
            check_kept(self.profiles, is_of_profiles, param="profiles")
        if self.space.shared is not None:
            check_kept(self.space.shared, is_of_shared_stages, param="stages")

    def check_machine(self) -> None:
        """Raise `ResourceError` for what this machine cannot hold, before anything is done."""
        here = Room.here(self.space.device, self.space.root, self.output or self.space.root)
        room = Room.of_ranks(self.space.group.gather(here))
        check_room(self.admission.plan, self.config, room, gguf=self.admission.gguf)

    def drop_former(self) -> None:
        """Remove what an earlier version left in the work folder and this one does not read."""
        if self.space.group.first:
            shutil.rmtree(self.space.root / FORMER_WEIGHTS_FOLDER, ignore_errors=True)

    def raise_out_of_memory(self, error: BaseException) -> None:
        """Raise `ResourceError` (code `out_of_memory`) where memory was refused, saying what would
        fit; any other error is left.
        """
        lack = refusal(error, self.space.device)
        if lack is None:
            return
        if "admission" in self.__dict__:  # else it was refused while planning
            asked = asked_bytes(refused_memory(error) or error) or 0
            advice = smaller_jobs(
                self.admission.plan,
                self.config,
                accelerator=self.space.device.type != "cpu",
                less=asked,
            )
            lack = out_of_memory(f"{lack.message}; {advice}")
        raise lack from error

    def resolve(self) -> Source:
        """The source's files by digest."""
        transforms = self.config.source_transforms
        inputs = resolve.Inputs.of(self.model_folder, self.gguf, transforms)
        return resolve.load(self.space.run(resolve.STAGE, inputs).folder, inputs)

    def model_of(self, source: Source) -> MadeFor:
        """Which model the source is."""
        name = self.model_name or self.gguf or self.model_folder.resolve().name
        return MadeFor(**dict(source.fingerprint), model=name)

    def plan(self, source: Source) -> Plan:
        """What there is to do."""
        warm_up(self.space.device)  # beside reading all weights
        plan = self.admission.plan
        inputs = planning.Inputs.of(source.every, plan, self.config, self.task_folder)
        return planning.load(self.space.run(planning.STAGE, inputs).folder)

    def calibration(self, source: Source, planned: Plan) -> CalibrationSet:
        """The calibration windows and those held out."""
        return calibration_tokens(
            self.config.calibration,
            source.folder,
            seed=self.config.seed,
            rows=planned.vocab_size,
        )

    def evaluation(self, source: Source, planned: Plan) -> Mapping[str, Tensor]:
        """Windows int64 [S, T] of every text that is evaluated; raises as calibration does."""
        return evaluation_windows(self.config.evaluation, source.folder, rows=planned.vocab_size)

    def profile(
        self, source: Source, planned: Plan, tokens: CalibrationSet
    ) -> SensitivityProfile | None:
        """The profile, kept for later jobs by its id; None where the job needs none."""
        config = profile.needed(self.config, planned, self.environment)
        if config is None:
            return None
        origin = ProfileOrigin(config, source.digest, tokens.digest)
        windows = tokens.tokens[: self.config.calibration.profiled]
        inputs = profile.Inputs.of(
            source,
            planned,
            windows,
            origin,
            self.environment,
            self.profiles,
            self._kept_weights(source, planned, tokens),
        )
        made = profile.load(self.space.run(profile.STAGE, inputs).folder, origin)
        if self.space.group.first and self.profiles is not None:
            kept = self.profiles / made.key
            if not kept.exists():
                ProfiledModel(made, planned, self.model_of(source)).save(kept)
        return made

    def allocate(
        self,
        source: Source,
        planned: Plan,
        tokens: CalibrationSet,
        profiled: SensitivityProfile | None,
    ) -> Allocated:
        """The bit-width map, and what was measured of it."""
        inputs = allocate.Inputs.of(
            source, planned, self.config, tokens, profiled, self.environment
        )
        return allocate.load(self.space.run(allocate.STAGE, inputs).folder)

    def search(
        self,
        source: Source,
        planned: Plan,
        tokens: CalibrationSet,
        profiled: SensitivityProfile | None,
        target: float,
    ) -> tuple[Allocated, str]:
        """The smallest map within a target of loss, and how it was found."""
        assert profiled is not None, "a target of loss is met by the knapsack, which has a profile"
        start = BitWidthMap.uniform(planned.shapes, 2, self.config.allocation.order)
        inputs = search.Inputs(
            target=target,
            allocation=self.config.allocation,
            profile=profiled,
            refining=self._refining(source, planned, tokens, profiled, start),
        )
        folder = self.space.run(search.STAGE, inputs).folder
        return search.load(folder)

    def refine(
        self,
        source: Source,
        planned: Plan,
        tokens: CalibrationSet,
        profiled: SensitivityProfile | None,
        bit_widths: BitWidthMap,
    ) -> Refined:
        """Codes, scales and zeros of every linear."""
        inputs = self._refining(source, planned, tokens, profiled, bit_widths)
        refined = Refined.of(self.space.run(refine.STAGE, inputs).folder, planned)
        for kept in (inputs.weights, inputs.kept):
            if kept is not None:
                kept.remove()
        return refined

    def _refining(
        self,
        source: Source,
        planned: Plan,
        tokens: CalibrationSet,
        profiled: SensitivityProfile | None,
        bit_widths: BitWidthMap,
    ) -> Refining:
        return Refining.of(
            source,
            planned,
            tokens,
            bit_widths,
            profiled,
            self.config,
            self.environment,
            self._kept_weights(source, planned, tokens),
            KeptBlocks(self.space.root / BLOCKS_FOLDER),
        )

    def _kept_weights(
        self, source: Source, planned: Plan, tokens: CalibrationSet
    ) -> KeptWeights | None:
        """Where one backward pass serves profile and refinement; None where they are apart."""
        if not self.config.weighs_in_profile:
            return None
        known = source.planned(planned), planned, tokens.tokens, self.environment
        return KeptWeights(self.space.root / WEIGHTS_FOLDER, sha256_json(content(known)))

    def resume(self, planned: Plan, bit_widths: BitWidthMap, learned: LearnedParameters) -> Refined:
        """Stage `refine` of a job that takes over what an earlier one learned; trains nothing."""
        inputs = resuming.Inputs(learned, planned, bit_widths)
        return Refined.of(self.space.run(resuming.STAGE, inputs).folder, planned)

    def pack(
        self, source: Source, planned: Plan, bit_widths: BitWidthMap, refined: Refined
    ) -> Made:
        """The packed folder."""
        inputs = pack.Inputs.of(source, planned, bit_widths, refined)
        return self.space.run(pack.STAGE, inputs)

    def verify(self, planned: Plan, packed: Made, refined: Refined) -> None:
        """Read back what was packed; raises `VerificationError`."""
        inputs = verifying.Inputs(packed, planned, refined, self.config.budget)
        self.space.run(verifying.STAGE, inputs)

    def evaluate(
        self,
        source: Source,
        planned: Plan,
        tokens: CalibrationSet,
        profiled: SensitivityProfile | None,
        allocated: Allocated,
        packed: Made,
        refined: Refined,
        notes: Sequence[str],
        windows: Mapping[str, Tensor],
    ) -> QualityReport:
        """The quality report."""
        inputs = evaluate.Inputs.of(
            self.config,
            source,
            planned,
            tokens,
            profiled,
            allocated,
            packed,
            refined,
            self.environment,
            self.task_folder,
            notes,
            windows,
            self._source_outputs(source, planned, windows),
        )
        return evaluate.load(self.space.run(evaluate.STAGE, inputs).folder)

    def _source_outputs(
        self, source: Source, planned: Plan, windows: Mapping[str, Tensor]
    ) -> Path | None:
        """Where the source's outputs for evaluation are; None for a job that shares no stages."""
        if self.space.shared is None or not windows:
            return None
        inputs = source_outputs.Inputs(source.planned(planned), planned, windows, self.environment)
        return self.space.run(source_outputs.STAGE, inputs).folder

    def publish(
        self,
        planned: Plan,
        profiled: SensitivityProfile | None,
        bit_widths: BitWidthMap,
        packed: Made,
        quality: QualityReport,
        learned_for: LearnedFor,
        made_for: MadeFor | None,
    ) -> Result:
        """Put the packed folder in place, with its reports and manifest."""
        assert self.output is not None
        allocation = self.config.allocation
        inputs = publish.Inputs(
            output=str(self.output.absolute()),
            packed=packed,
            quality=quality,
            profiled=publish.Profiled.of(profiled, planned, allocation, bit_widths),
            learned_for=learned_for if quality.blocks else None,
            made_for=made_for,
        )
        there = publish.is_there(self.space.root / publish.STAGE.name, self.output)
        if not self.space.group.broadcast(there):
            self.space.forget(publish.STAGE.name)
        self.space.run(publish.STAGE, inputs)
        return Result.read(self.output, profiled.key if profiled else None)


def run_job(
    config: QuantizationConfig,
    model_folder: Path,
    job_dir: Path,
    output_dir: Path,
    *,
    gguf: str | None = None,
    profile_folder: Path | None = None,
    task_folder: Path | None = None,
    stage_folder: Path | None = None,
    turns: Turns | None = None,
    device: str | torch.device = "cpu",
    group: Ranks = SINGLE,
    model_name: str | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Run all stages; a run that was killed goes on where it was.

    model_folder: local files of the source; gguf: name of the GGUF file in it.
    task_folder: task files for `evaluation.tasks`; they may run code, so trust their author.
    stage_folder: where equal stages of several jobs, which may run at once, are made once. turns:
    hands stages out between folders that are not the same, or None.
    group: the ranks that call this with the same arguments, `devices` of them
    (`runtime/launch.py`). model_name: what the model is called in records and warnings, by default
    as its folder or GGUF file is. Raises a `BitmillError`; nothing of `output_dir` exists until the
    last stage ends. Settings of the process are the caller's again then.
    """
    return _run(
        Job(
            config=config,
            model_folder=model_folder,
            space=Workspace(
                job_dir, on_progress, should_stop, group, device_of(device), stage_folder, turns
            ),
            output=output_dir,
            gguf=gguf,
            profiles=profile_folder,
            task_folder=task_folder,
            model_name=model_name,
        ),
        _whole,
    )


def run_profile(
    config: QuantizationConfig,
    model_folder: Path,
    job_dir: Path,
    *,
    gguf: str | None = None,
    profile_folder: Path | None = None,
    device: str | torch.device = "cpu",
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> ProfiledModel:
    """Run the stages up to `profile`, as `run_job` does.

    Raises `SpecError` where the configuration needs no profile.
    """
    job = Job(
        config=config,
        model_folder=model_folder,
        space=Workspace(job_dir, on_progress, lambda: False, SINGLE, device_of(device)),
        output=None,
        gguf=gguf,
        profiles=profile_folder,
    )
    return _run(job, _up_to_profile)


def _run(job: Job, stages: Callable[[Job], T]) -> T:
    devices, size = job.config.devices, job.space.group.size
    if size != devices:
        raise SpecError(
            f"devices is {devices}, the job was started on {size}: start it by "
            "`bitmill quantize --devices` or a worker, or give the number it runs on",
            param="devices",
        )
    threads = max(1, job.config.threads // size) if job.config.threads else None
    try:
        with computing(threads):
            job.check_folders()
            if isinstance(job.config.calibration.text, FileText):
                check_text_file(job.config.calibration.text)
            job.check_machine()
            job.drop_former()
            return stages(job)
    except STOPS:
        raise
    except BaseException as error:
        job.raise_out_of_memory(error)
        raise_resource_error(error)
        raise


def _up_to_profile(job: Job) -> ProfiledModel:
    source = job.resolve()
    planned = job.plan(source)
    found = job.profile(source, planned, job.calibration(source, planned))
    if found is None:
        allocation = job.config.allocation
        raise SpecError(
            f"allocation method {allocation.method!r} with order {allocation.order!r} needs no "
            "profile: ask for method 'knapsack' or 'sba'",
            param="allocation.method",
        )
    return ProfiledModel(found, planned, job.model_of(source))


def _whole(job: Job) -> Result:
    source = job.resolve()
    planned = job.plan(source)
    tokens = job.calibration(source, planned)
    windows = job.evaluation(source, planned)  # what is wrong with them is told before the work
    learned_for = LearnedFor.of_job(job.config, model=source.digest, calibration=tokens.digest)
    learned = _learned_earlier(job.config, learned_for)
    model, given, notes = job.model_of(source), job.config.allocation.map, []
    made_for = model if given is None else given.made_for
    if given is not None and (foreign := foreign_map(made_for, model)):
        job.space.warn("allocate", foreign)
        notes.append(foreign)
    profiled = job.profile(source, planned, tokens)
    if (target := job.config.budget.max_loss_increase) is not None:
        allocated, searched = job.search(source, planned, tokens, profiled, target)
        notes.append(searched)
    else:
        allocated = job.allocate(source, planned, tokens, profiled)
    bit_widths = allocated.bit_widths
    if learned is None:
        refined = job.refine(source, planned, tokens, profiled, bit_widths)
    else:
        refined = job.resume(planned, bit_widths, learned)
    packed = job.pack(source, planned, bit_widths, refined)
    job.verify(planned, packed, refined)
    quality = job.evaluate(
        source, planned, tokens, profiled, allocated, packed, refined, notes, windows
    )
    told = allocated.corrected(profiled)
    return job.publish(planned, told, bit_widths, packed, quality, learned_for, made_for)


def _learned_earlier(config: QuantizationConfig, asked: LearnedFor) -> LearnedParameters | None:
    """The learned parameters that the job takes over, after all checks but that of the map."""
    given = config.method.resumed
    if given is None:
        return None
    learned = LearnedParameters.open(given)
    learned.learned_for.check(asked)
    return learned
