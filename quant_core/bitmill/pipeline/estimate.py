"""What a job will need, from its plan alone: memory, disk and time. Torch-free.

Memory and disk are sums of the tensors that the stages hold at once, so they are near the truth:

    accelerator  what lies outside the blocks, three blocks (quantized, source, the next), the
                 widest stage's Hessians with factors and the widest linear's working copies, or
                 what finding scales of inputs or learning a block holds, one batch of activations,
                 one slice of logits
    host         hidden states of all windows (twice where the source model runs beside), two blocks
                 per rank of a job, page-locked memory for copies to its accelerator; block inputs
                 of a backward pass wait in files where memory is short and are not counted
    disk         converted source (GGUF), rewritten source (transforms of it), refined blocks, of
                 baselines too, and the packed checkpoint, as large as the budget allows; or blocks
                 of two maps while a search compares them

Hidden states and block inputs move to the accelerator where its free memory has room for them; that
is not counted there, nor taken off the host's share.

Time counts multiply-adds of forward and backward passes, Hessians and GPTQ against an assumed
speed, those of baselines too, and ignores everything else: an order of magnitude, good for choosing
a queue. A search for a target of loss counts as if it took all of its maps and gave up a first one.
Rules of activations that packages add count as if they observed nothing. Of several devices each
needs the accelerator's memory; what they wait for each other is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitmill.config.bit_width_map import DROPPED
from bitmill.config.closed import Closed
from bitmill.config.codes import CODES
from bitmill.config.quantization import FILE_KINDS, QuantizationConfig
from bitmill.config.rounded import OBSERVING_RULES
from bitmill.formats.accounting import footprint, limit, uniform_map
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.block_memory import (
    BATCH_TOKENS,
    LOGIT_BYTES,
    TRANSFER_BYTES,
    WORKING_COPIES,
    activation_bytes,
    block_weights,
    refining_bytes,
    widest_linear,
)
from bitmill.plan.model_plan import Plan, PlannedLinear

OVERHEAD = 512 << 20
CONVERTING_BYTES = 10
"""Host memory for each weight of the largest tensor of a GGUF file while it is converted, or of a
source while it is rewritten."""
ACCELERATOR_LIBRARIES = 5 << 29
"""Host memory of the libraries of CUDA and torch in one process, from a model of 7B on an H100."""
CPU_FLOPS_PER_THREAD = 2.5e10
ACCELERATOR_FLOPS = {2: 4e14, 4: 4e13}
EVALUATION_WINDOWS = 40
BACKWARD_PASSES = 4
"""Work of a backward pass that runs every block again, in forward passes."""
SEARCH_STEPS = 4
"""Maps that are refined and measured at most for a target of loss."""
FIRST_PART = 3
"""The first of them is looked at behind one of so many parts of the blocks, and may be given up."""
FEWEST_BLOCKS = 4
"""In that part; of fewer, whole maps are measured."""


@dataclass(frozen=True)
class Machine:
    """Where a job would run."""

    accelerator: bool = False
    threads: int = 2


class Estimate(Closed):
    """Bytes and seconds of a job; the accelerator's bytes are host bytes on a CPU.

    smallest_size, largest_size: exact bytes of the safetensors files with every group at the
    smallest and at the largest legal width.
    """

    accelerator_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float
    smallest_size: int
    largest_size: int


def _element_bytes(plan: Plan, machine: Machine) -> int:
    half = {linear.dtype for linear in plan.linears} <= {"F16", "BF16"}
    return 2 if machine.accelerator and half else 4


def _uniform_size(plan: Plan, config: QuantizationConfig, width: int) -> int:
    allocation = config.allocation
    return footprint(plan, uniform_map(plan, width, allocation.legal_widths, allocation.order)).size


def _outside_weights(plan: Plan) -> int:
    inside = plan.block_prefix + "."
    kept = sum(math.prod(t.shape) for t in plan.tensors if not t.module.startswith(inside))
    return kept + sum(embedding.shape.weights for embedding in plan.embeddings)


def _source_bytes(plan: Plan) -> int:
    """Of a folder of the source's safetensors."""
    quantized = (TensorInfo(m.name, m.dtype, (m.rows, m.columns)) for m in plan.matrices)
    kept = (TensorInfo(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors)
    return sum(tensor.nbytes for tensor in (*quantized, *kept))


def _largest_tensor(plan: Plan) -> int:
    kept = max((math.prod(t.shape) for t in plan.tensors), default=0)
    return max(kept, widest_linear(plan))


def _learning_bytes(plan: Plan, config: QuantizationConfig, block: int, element: int) -> int:
    """A block that is learned on one batch of windows, or in the turn of tuning all scales."""
    needs = config.method.learning
    if needs is None:
        return 0
    tokens = needs.windows * config.calibration.length
    learned = needs.bytes_per_weight * block_weights(plan, block)
    held = needs.whole_model * plan.weights
    return max(learned, held) + 2 * activation_bytes(plan, block, tokens, element)


def _accelerator_bytes(plan: Plan, config: QuantizationConfig, machine: Machine) -> int:
    element = _element_bytes(plan, machine)
    tokens = max(BATCH_TOKENS, config.calibration.length)
    learning = [
        3 * element * block_weights(plan, i) + _learning_bytes(plan, config, i, element)
        for i in {0, plan.block_count - 1}
    ]
    folded = any(one.folded for one in config.transforms)
    judged = "shift" in config.method.needs
    turn = max(
        refining_bytes(plan, element, tokens, judged=judged, folded=folded),
        max(learning) + WORKING_COPIES * 4 * widest_linear(plan),
    )
    return OVERHEAD + element * _outside_weights(plan) + LOGIT_BYTES + turn


def stream_bytes(plan: Plan, config: QuantizationConfig, machine: Machine) -> int:
    """Hidden states of all windows that refinement carries; files hold them where memory cannot."""
    windows = config.calibration.sequences + config.calibration.held_out
    streams = 2 if config.method.runs_source else 1
    element = _element_bytes(plan, machine)
    return streams * windows * config.calibration.length * plan.hidden_size * element


def fixed_host_bytes(
    plan: Plan, config: QuantizationConfig, machine: Machine, *, gguf: bool = False
) -> int:
    """Host memory that a job cannot do without, whatever the number of its windows."""
    block = 4 * max(block_weights(plan, i) for i in {0, plan.block_count - 1})
    process = ACCELERATOR_LIBRARIES + TRANSFER_BYTES if machine.accelerator else OVERHEAD
    if not machine.accelerator:
        process += _accelerator_bytes(plan, config, machine) - OVERHEAD
    makes_source = gguf or config.source_transforms
    converting = OVERHEAD + CONVERTING_BYTES * _largest_tensor(plan) if makes_source else 0
    return max((2 * block + process) * config.devices, converting)


def packed_bytes(plan: Plan, config: QuantizationConfig) -> int:
    """Bytes of the packed checkpoint at most."""
    largest = _uniform_size(plan, config, config.allocation.legal_widths[-1])
    if config.budget.kind in FILE_KINDS:
        return min(largest, limit(plan, config.budget))
    widths = CODES[config.code_name].widths
    enough = next((width for width in widths if width >= config.budget.value), widths[-1])
    return min(largest, _uniform_size(plan, config, enough))


def _disk_bytes(plan: Plan, config: QuantizationConfig, gguf: bool) -> int:
    packed = packed_bytes(plan, config)
    learning = config.method.learning
    refined = 2 if learning is not None and learning.whole_model else 1
    searches = config.budget.max_loss_increase is not None
    copies = refined + (refined if searches else 1)  # a search has the best blocks and the next
    baselines = sum(
        packed if name == "uniform" else _uniform_size(plan, config, int(name[-1]))
        for name in config.evaluation.refined_baselines
    )
    converted = 4 * (plan.weights + _outside_weights(plan)) if gguf else 0
    rewritten = len(config.source_transforms) * _source_bytes(plan)
    return converted + rewritten + copies * packed + baselines


def first_blocks(plan: Plan) -> int:
    """Blocks behind which the first map of a search is looked at; 0 where it is not."""
    count = plan.block_count // FIRST_PART
    return count if count >= FEWEST_BLOCKS else 0


def _linear_work(linear: PlannedLinear, tokens: float) -> tuple[float, float]:
    """(multiply-adds * 2 of one forward pass, of solving one linear)."""
    weights = float(linear.shape.weights)
    return 2 * weights * tokens, 3 * weights * linear.columns


def _seconds(plan: Plan, config: QuantizationConfig, machine: Machine) -> float:
    speed = CPU_FLOPS_PER_THREAD * machine.threads
    if machine.accelerator:
        speed = ACCELERATOR_FLOPS[_element_bytes(plan, machine)] * config.devices
    tokens = config.calibration.length * (
        config.calibration.sequences + config.calibration.held_out
    )
    active = 1.0 if not plan.experts else min(1.0, 8 / plan.experts)
    forward = solving = hessians = 0.0
    for linear in plan.linears:
        share = active if ".experts." in linear.name else 1.0
        passed, solved = _linear_work(linear, tokens * share)
        forward, solving = forward + passed, solving + solved
    for block in range(plan.block_count):
        for first, *_ in plan.siblings(block):
            share = active if ".experts." in first else 1.0
            hessians += 2.0 * plan.by_name[first].columns ** 2 * tokens * share
    passes: float = 3 if config.method.runs_source else 2
    profiled = config.calibration.length * config.calibration.profiled / tokens
    measured = profiled * (4 * forward + hessians)
    measured *= 1 + len(config.allocation.outliers)
    profile = measured if config.allocation.method != "uniform" else 0.0
    windows = len(config.evaluation.texts) * (config.evaluation.sequences or EVALUATION_WINDOWS)
    share = windows * config.evaluation.length / tokens
    head = 2.0 * plan.vocab_size * plan.hidden_size * tokens
    rows = 2 + len(set(config.evaluation.baselines))
    evaluation = rows * share * (forward + head)
    evaluation += len(config.evaluation.refined_baselines) * (2 * forward + hessians + solving)
    observed = config.calibration.sequences * config.calibration.length / tokens
    rules = [one.rule for one in config.evaluation.rounded.values()]
    every = sum(rule in OBSERVING_RULES for rule in rules) * observed * forward
    evaluation += every * config.devices  # each runs all windows
    if "gradient" in config.method.needs:
        shared = config.weighs_in_profile  # but for what is held out
        own = config.calibration.held_out * config.calibration.length / tokens if shared else 1
        passes += BACKWARD_PASSES * own
    folded = sum(one.folded for one in config.transforms)
    if folded and "shift" in config.method.needs:
        passes += 1  # a folded block is not the one that moves the source on
    refined = passes * forward + hessians + solving + folded * observed * (forward + hessians)
    if config.method.learning is not None:
        share = config.method.learning.tuned_windows * config.calibration.length / tokens
        refined += BACKWARD_PASSES * share * (forward + head)
    allocation = config.allocation
    share = config.calibration.held_out * config.calibration.length / tokens
    measuring = 2 * share * (forward + head)  # of a map and the source
    if config.budget.max_loss_increase is not None:
        refined = (SEARCH_STEPS + first_blocks(plan) / plan.block_count) * (refined + measuring)
    elif DROPPED in allocation.legal_widths and allocation.check != "off":
        # the best maps with and without dropped groups, and the result
        refined = 3 * refined + 2 * measuring
    return (refined + profile + evaluation) / speed


def estimate(
    plan: Plan, config: QuantizationConfig, machine: Machine | None = None, *, gguf: bool = False
) -> Estimate:
    """What the job needs; `gguf`: the source must be converted first."""
    machine = machine or Machine()
    widths = config.allocation.legal_widths
    smallest, largest = (_uniform_size(plan, config, width) for width in (widths[0], widths[-1]))
    fixed = fixed_host_bytes(plan, config, machine, gguf=gguf)
    return Estimate(
        accelerator_bytes=_accelerator_bytes(plan, config, machine),
        host_bytes=fixed + stream_bytes(plan, config, machine),
        disk_bytes=_disk_bytes(plan, config, gguf),
        seconds=_seconds(plan, config, machine),
        smallest_size=smallest,
        largest_size=largest,
    )
