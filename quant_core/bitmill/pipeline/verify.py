"""What was written, read back from disk and held against what was computed. Fails closed.

Run it in a fresh process, so that nothing but the files is seen. For every linear:

    codes      SHA-256 of the unpacked codes equals the one recorded when they were computed
    forward    |y - y'| <= limit * |y'|,  y of the packed module, y' = x W^T of the dequantized
               weight in fp64, x random normal times a power of two that brings y' near 1: what
               is judged is the product, not fp16's range

and for the folder: tensors as the format and the plan say, every stored byte as it was handed to
the writer, and the size, code bits or stored bits within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Budget
from bitmill.errors import BitmillError, InputError, VerificationError, raise_resource_error
from bitmill.formats.accounting import (
    Footprint,
    checkpoint_tensors,
    describe,
    footprint,
    limit,
    measure_map,
)
from bitmill.formats.codec import Checkpoint, open_checkpoint
from bitmill.formats.writing import sha256_of_tensor
from bitmill.inference.load import check_loads
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.model_plan import Plan
from bitmill.quant.rewrites import NO_REWRITES
from bitmill.quant.tensors import Stored
from bitmill.registry import load_object
from bitmill.runtime.memory import spare_host_bytes

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3}
LARGEST_PROBE = 2.0**12
"""Most that inputs are multiplied by: their largest values stay below fp16's."""
ROWS = 4
"""Random inputs per linear and dtype."""


class VerifyReport(BaseModel):
    """What was checked and measured.

    forward_error: largest relative error of a packed forward by compute dtype.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    linears: int
    tensors: int
    file_bytes: int
    code_bits: float
    bits: float
    forward_error: dict[str, float]


def verify_folder(
    folder: Path,
    expected_code_hashes: Mapping[str, str],
    budget: Budget,
    plan: Plan,
    *,
    tensor_hashes: Mapping[str, str],
    solved: Callable[[str, Stored], Stored] = lambda _, packed: packed,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> VerifyReport:
    """Check a packed folder against the plan, the recorded hashes and the budget.

    expected_code_hashes: `QuantizedWeight.codes_sha256` by linear
    tensor_hashes: what the codec's `write` returned
    solved: a linear as it was when its codes were hashed, of its name and what is stored, see
    `transforms/transform.py`

    Raises VerificationError for the first difference, naming the tensor or the limit.
    """
    try:
        checkpoint = open_checkpoint(folder)
        bit_widths = checkpoint.bit_widths
        checkpoint.check_linears(plan.shapes)
        _check_map(bit_widths, expected_code_hashes)
        specs = checkpoint_tensors(plan, bit_widths.linears, bit_widths.order, bit_widths.outliers)
        _check_tensors(checkpoint, specs, tensor_hashes)
        spent = _check_budget(checkpoint, bit_widths, plan, budget)
        expected = _Expected(expected_code_hashes, solved)
        errors = _check_linears(checkpoint, plan, expected, torch.device(device), seed)
        _check_loads(folder, plan)
    except InputError as error:  # a stored file that cannot be read is a difference too
        raise VerificationError(error.message, param=error.param) from error
    return VerifyReport(
        linears=len(plan.shapes),
        tensors=len(specs),
        file_bytes=spent.size,
        code_bits=spent.code_bits,
        bits=spent.bits,
        forward_error=errors,
    )


def forward_error(packed: Stored, x: Tensor) -> float:
    """Relative error of the packed forward of x [T, K] against the dequantized one in fp64.

    x comes near 1 and is scaled so that the largest output does too, as far as inputs allow. What
    still lies below the smallest step of x's dtype counts as that step.
    """
    device = x.device
    module = _module(packed, device)
    weight = packed.unpack().dequantize().to(device).double()
    x = x * _near_one(float((x.double() @ weight.t()).abs().max()))
    expected = x.double() @ weight.t()
    y = module(x).double()
    norm = float(expected.norm())
    unseen = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps * math.sqrt(y.numel())
    error = max(0.0, float((y - expected).norm()) - unseen)
    return error / norm if norm > 0 else error


def _module(packed: Stored, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What computes with a linear, behind the rewrites that it does not apply itself."""
    make = load_object(packed.module).from_packed
    if {one.name for one in packed.rewrites} <= packed.applies:
        module: Callable[[Tensor], Tensor] = make(packed).to(device)
        return module
    bare = make(packed.rewritten(NO_REWRITES)).to(device)
    return lambda x: packed.rewrites.forward(x, bare)


def _near_one(largest: float) -> float:
    """The power of two that brings `largest` into [0.5, 1), at most `LARGEST_PROBE`."""
    if largest == 0:
        return 1.0
    return min(LARGEST_PROBE, math.ldexp(1.0, -math.frexp(largest)[1]))


def _check_loads(folder: Path, plan: Plan) -> None:
    """What transformers itself says against the folder is a difference, too."""
    modules = {tensor.name: tensor.module for tensor in plan.tensors}
    try:
        check_loads(folder, modules, room=spare_host_bytes())
    except BitmillError:
        raise
    except Exception as error:
        raise_resource_error(error)
        raise VerificationError(
            f"transformers cannot load the packed folder: {' '.join(str(error).split())[:500]}",
            param=folder.name,
        ) from error


def _check_map(bit_widths: BitWidthMap, hashes: Mapping[str, str]) -> None:
    different = sorted(hashes.keys() ^ bit_widths.linears.keys())
    if different:
        raise VerificationError(
            f"linear {different[0]} was computed or stored, not both", param=different[0]
        )


def _check_tensors(
    checkpoint: Checkpoint, specs: list[TensorInfo], hashes: Mapping[str, str]
) -> None:
    """Names, dtypes, shapes and bytes of every stored tensor."""
    different = sorted({spec.name for spec in specs} ^ checkpoint.headers.keys())
    if different:
        raise VerificationError(
            f"tensor {different[0]} is planned or stored, not both", param=different[0]
        )
    for spec in specs:
        found = checkpoint.headers[spec.name]
        if (found.dtype, found.shape) != (spec.dtype, spec.shape):
            raise VerificationError(
                f"tensor {spec.name} is {found.dtype} of shape {found.shape}: "
                f"planned was {spec.dtype} of shape {spec.shape}",
                param=spec.name,
            )
        digest = sha256_of_tensor(checkpoint.tensor(spec.name))
        if digest != hashes.get(spec.name):
            raise VerificationError(
                f"tensor {spec.name} has other bytes on disk than were written", param=spec.name
            )


@dataclass(frozen=True)
class _Expected:
    """Codes as they were computed: their hashes, and how to undo what was folded since."""

    hashes: Mapping[str, str]
    solved: Callable[[str, Stored], Stored]

    def check(self, name: str, packed: Stored) -> None:
        if self.solved(name, packed).unpack().codes_sha256() != self.hashes[name]:
            raise VerificationError(
                f"linear {name} has other codes on disk than were computed", param=name
            )


def _check_linears(
    checkpoint: Checkpoint,
    plan: Plan,
    expected: _Expected,
    device: torch.device,
    seed: int,
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    worst = dict.fromkeys(LIMITS, 0.0)
    for shape in plan.shapes:
        packed = checkpoint.linear(shape)
        expected.check(shape.name, packed)
        x = torch.randn(ROWS, shape.columns, generator=generator)
        for dtype, most in LIMITS.items():
            error = forward_error(packed, x.to(device, dtype))
            if not error <= most:
                raise VerificationError(
                    f"linear {shape.name}: the packed forward differs from the dequantized one "
                    f"by {error:.2e} in {dtype}, the limit is {most:.0e}",
                    param=shape.name,
                )
            worst[dtype] = max(worst[dtype], error)
    return {str(dtype).removeprefix("torch."): error for dtype, error in worst.items()}


def _check_budget(
    checkpoint: Checkpoint,
    bit_widths: BitWidthMap,
    plan: Plan,
    budget: Budget,
) -> Footprint:
    spent = footprint(plan, bit_widths)
    if checkpoint.file_bytes != spent.size:
        raise VerificationError(
            f"safetensors files take {checkpoint.file_bytes} bytes, predicted were {spent.size}"
        )
    measured = measure_map(plan, bit_widths, budget.kind)
    if measured > limit(plan, budget):
        raise VerificationError(
            f"the checkpoint has {budget.kind} {describe(plan, budget.kind, measured)}, "
            f"the budget is {budget.value}",
            param=f"budget.{budget.kind}",
        )
    return spent
