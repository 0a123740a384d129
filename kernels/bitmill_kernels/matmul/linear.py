"""The product of activations with stacked packed linears, by the fastest way at hand.

    y[t, n] = sum_k x[t, order[k]] * w[n, k] + bias[n]

On CUDA, by the number of tokens T: the compiled decode kernel up to 32, Triton up to
`DEQUANTIZE_ABOVE`, above it dequantized weights and the vendor's product. On Hopper the batch
kernel takes more tokens than `decode_tokens` says, as far as `batch_tokens` says. Where the CUDA
kernels are not available, Triton decodes and dequantizes. fp32 activations always take the last, in
fp32.
On a CPU: `cpu.py`. The backend `reference`, asked for by name or by BITMILL_BACKEND, multiplies
with a dequantized copy of the weight in the dtype of the activations and in source column order:
as fast as the original linear, as large, and equal to it bit for bit.

The product is the custom operator `bitmill::mixed_linear`, so `torch.compile` treats it as one
opaque call and CUDA graphs capture it. It takes a name, not the tensors: layouts and workspaces
are built once, at load, and no call allocates anything but its result.

The gradient for x is dx = dy W, from weights that are dequantized some rows at a time; packed codes
themselves have none.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bitmill_kernels.backend import interpreted, resolve_backend, wants_reference
from bitmill_kernels.matmul.runtime import (
    PackedWeight,
    RuntimeWeight,
    build_runtime,
    in_source_order,
)
from bitmill_kernels.pack import unpack_codes
from bitmill_kernels.reference import dequantize
from bitmill_kernels.workspace import workspace

if TYPE_CHECKING:
    from bitmill_kernels.matmul.dequantize_triton import RowRun

DEQUANTIZE_ABOVE = 64
SCRATCH_ELEMENTS = 1 << 26
RUN_ROWS = 4096
"""Rows that are dequantized at a time, where they are no more than `SCRATCH_ELEMENTS`: of 4096
columns they are still in an H200's cache when they are multiplied."""

_LOG = logging.getLogger(__name__)
_LINEARS: WeakValueDictionary[str, MixedLinear] = WeakValueDictionary()
_PROCESS = secrets.token_hex(8)
_NUMBERS = itertools.count()


class Product(Protocol):
    """y = x W^T + bias, and its gradient for x."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [T, N] of x [T, K] with contiguous rows and bias [N] or None, all of one dtype."""

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W [T, K] of dy [T, N] with contiguous rows, in the dtype of dy."""


class MixedLinear:
    """Packed linears that read the same input, stacked by rows, ready to multiply.

    `outputs` holds the rows of each; the result of a call is theirs side by side. Activations
    must be on `device`.
    """

    def __init__(
        self,
        weights: Sequence[PackedWeight],
        device: torch.device,
        *,
        backend: str = "auto",
        name: str | None = None,
    ) -> None:
        """Build the layout on `device`.

        name: what compiled graphs call the linear by, the same in every process that is to run
        them; without one, a name of this process that no other has. Raises ValueError where the
        linears do not stack, or another linear of the name is in use.
        """
        self.outputs = tuple(weight.N for weight in weights)
        self.N, self.K = sum(self.outputs), weights[0].K
        self.device = device
        self._product: Product = _build_product(weights, device, backend)
        self.name = f"{_PROCESS}-{next(_NUMBERS)}" if name is None else name
        if self.name in _LINEARS:
            raise ValueError(
                f"a linear named {self.name!r} is in use: give each linear a name of its own"
            )
        _LINEARS[self.name] = self

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., N] of x [..., K] and bias [N], all of one dtype."""
        y: Tensor = torch.ops.bitmill.mixed_linear(x, bias, self.name, self.N)
        return y

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the operator calls; no shape is checked by the kernels."""
        if x.shape[-1] != self.K:
            raise ValueError(f"x has {x.shape[-1]} columns: the weight has {self.K}")
        rows = x.reshape(-1, self.K)
        y = self._product(rows if rows.stride(-1) == 1 else rows.contiguous(), bias)
        return y.view(*x.shape[:-1], self.N)

    def run_gradient(self, dy: Tensor) -> Tensor:
        """What the operator of the gradient calls: dx [..., K] of dy [..., N]."""
        rows = dy.reshape(-1, self.N)
        dx = self._product.input_gradient(rows if rows.stride(-1) == 1 else rows.contiguous())
        return dx.view(*dy.shape[:-1], self.K)


def _named(name: str) -> MixedLinear:
    found = _LINEARS.get(name)
    if found is None:
        raise LookupError(
            f"no packed linear is named {name!r} in this process: graphs that were compiled in "
            "another one need linears of the same names (`MixedLinear(..., name=)`)"
        )
    return found


@torch.library.custom_op("bitmill::mixed_linear", mutates_args=())
def _mixed_linear(x: Tensor, bias: Tensor | None, name: str, outputs: int) -> Tensor:
    return _named(name).run(x, bias)


@_mixed_linear.register_fake
def _(x: Tensor, bias: Tensor | None, name: str, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.custom_op("bitmill::mixed_linear_input_gradient", mutates_args=())
def _input_gradient(dy: Tensor, name: str, columns: int) -> Tensor:
    return _named(name).run_gradient(dy)


@_input_gradient.register_fake
def _(dy: Tensor, name: str, columns: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], columns))


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor | None, str, int], output: Tensor) -> None:
    x, bias, ctx.name, _ = inputs
    ctx.columns, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.linear = _LINEARS.get(ctx.name)  # kept, though its module may move before the gradient


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    dx = torch.ops.bitmill.mixed_linear_input_gradient(dy, ctx.name, ctx.columns)
    wants_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
    db = dy.flatten(0, -2).sum(0).to(ctx.bias_dtype) if wants_bias else None
    return dx, db, None, None


_mixed_linear.register_autograd(_backward, setup_context=_remember)


def _remember_gradient(ctx: Any, inputs: tuple[Tensor, str, int], output: Tensor) -> None:
    dy, ctx.name, _ = inputs
    ctx.outputs, ctx.linear = dy.shape[-1], _LINEARS.get(ctx.name)


def _backward_gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.bitmill.mixed_linear(ddx, None, ctx.name, ctx.outputs), None, None


_input_gradient.register_autograd(_backward_gradient, setup_context=_remember_gradient)


def _build_product(weights: Sequence[PackedWeight], device: torch.device, backend: str) -> Product:
    if wants_reference(backend):
        return _DenseProduct(weights, device)
    if resolve_backend(backend, device) == "triton":
        return _AcceleratedProduct(build_runtime(weights, device))
    from bitmill_kernels.matmul.cpu import CpuProduct

    return CpuProduct(weights, device)


class _DenseProduct:
    """The reference: one dequantized copy [N, K] for each dtype that is used."""

    def __init__(self, weights: Sequence[PackedWeight], device: torch.device) -> None:
        _say_dense()
        self._weight = torch.cat([_source_weight(weight).to(device) for weight in weights])
        self._casts: dict[torch.dtype, Tensor] = {torch.float32: self._weight}

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, self._cast(x.dtype), bias)

    def input_gradient(self, dy: Tensor) -> Tensor:
        return dy @ self._cast(dy.dtype)

    def _cast(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._casts:
            self._casts[dtype] = self._weight.to(dtype)
        return self._casts[dtype]


def _source_weight(weight: PackedWeight) -> Tensor:
    """Weight f32 [N, K] in source column order."""
    codes = unpack_codes(weight.tensors, weight.widths, weight.N, weight.K)
    values = dequantize(codes, weight.scales(), weight.zeros(), weight.widths)
    return in_source_order(values, weight.order)


class _AcceleratedProduct:
    """Chooses a kernel by the number of tokens; everything is built here."""

    def __init__(self, weight: RuntimeWeight) -> None:
        from bitmill_kernels.hopper.building import HOPPER
        from bitmill_kernels.hopper.schedule import batch_tokens, decode_tokens
        from bitmill_kernels.matmul import (
            batch_cuda,
            cuda_library,
            decode_cuda,
            dequantize_cuda,
            tiles,
        )
        from bitmill_kernels.matmul.decode_triton import TritonDecoder
        from bitmill_kernels.matmul.dequantize_triton import Dequantizer

        device = weight.planes.device
        properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        gpu, processors = "", 1
        if properties:
            gpu, processors = properties.name, properties.multi_processor_count
        self._weight, self._drops = weight, weight.dropped
        self._wide = TritonDecoder(
            weight, tiles.triton_tiles(weight, gpu, processors), asm=not interpreted()
        )
        self._narrow: decode_cuda.CudaDecoder | None = None
        compiled = properties is not None and cuda_library.available(device)
        self._batch: batch_cuda.CudaBatch | None = None
        self._decode_tokens = self._batch_tokens = 0
        if properties and compiled:
            shared = properties.shared_memory_per_multiprocessor
            shapes = tiles.block_shapes(weight, gpu, shared)
            if (properties.major, properties.minor) == HOPPER:
                launches = tiles.batch_shapes(weight)
                self._batch = batch_cuda.CudaBatch(weight, launches)
                size = weight.N * weight.K
                self._decode_tokens = decode_tokens(size)
                self._batch_tokens = batch_tokens(size, max(launches))
                shapes = {
                    tokens: shapes[tokens] for tokens in shapes if tokens <= self._decode_tokens
                }
            self._narrow = decode_cuda.CudaDecoder(weight, shapes) if shapes else None
        _say_choice(str(device), compiled)
        rows = rows_of_a_run(weight.N, weight.K)
        self._dequantizer = (
            dequantize_cuda.CudaDequantizer(weight, rows)
            if compiled
            else Dequantizer(weight, rows, tiles.dequantize_tile(weight, gpu))
        )
        self._scratch_rows = max(run.rows for run in self._dequantizer.runs)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.empty(x.shape[0], self._weight.N, dtype=x.dtype, device=x.device)
        T = x.shape[0]
        if T == 0:
            return y
        if x.dtype != torch.float32 and self._decode_tokens < T <= self._batch_tokens:
            assert self._batch is not None
            self._batch(x, bias, y)
        elif x.dtype == torch.float32 or T > DEQUANTIZE_ABOVE:
            self._multiply_dequantized(x, bias, y)
        elif self._narrow is not None and self._narrow.max_tokens >= T:
            self._narrow(x, bias, y)
        else:
            self._wide(x, bias, y)
        return y

    def input_gradient(self, dy: Tensor) -> Tensor:
        packed = torch.zeros(len(dy), self._weight.K, dtype=torch.float32, device=dy.device)
        for run, weight in self._dequantized_runs(dy.dtype):
            packed += dy[:, run.first : run.first + run.rows] @ weight
        return in_source_order(packed, self._weight.order).to(dy.dtype)

    def _dequantized_runs(self, dtype: torch.dtype) -> Iterator[tuple[RowRun, Tensor]]:
        """Runs of rows and their weights [rows, K] in packed order, each good until the next."""
        K, device = self._weight.K, self._weight.planes.device
        size = self._scratch_rows * K
        scratch = workspace("dequantized", size * dtype.itemsize, device)
        rows = scratch.view(dtype)[:size].view(-1, K)
        for run in self._dequantizer.runs:
            if self._drops:
                rows[: run.rows].zero_()
            self._dequantizer(run, rows)
            yield run, rows[: run.rows]

    def _multiply_dequantized(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        order = self._weight.order
        inputs = x if order is None else x.index_select(1, order)
        for run, rows in self._dequantized_runs(x.dtype):
            weight = rows.t()
            out = y[:, run.first : run.first + run.rows]
            if bias is None:
                torch.mm(inputs, weight, out=out)
            else:
                torch.addmm(bias[run.first : run.first + run.rows], inputs, weight, out=out)


def rows_of_a_run(N: int, K: int) -> int:
    """Rows of [N, K] that are dequantized at a time: all in runs of nearly equal length."""
    most = min(RUN_ROWS, max(1, SCRATCH_ELEMENTS // K))
    return -(-N // -(-N // most))


@cache
def _say_dense() -> None:
    _LOG.warning(
        "packed linears run on the reference backend, which keeps a dequantized copy of each: "
        "the model takes as much memory as the original in the compute dtype"
    )


@cache
def _say_choice(device: str, compiled: bool) -> None:
    kernels = "the compiled CUDA kernels" if compiled else "the Triton kernels"
    _LOG.info("packed linears on %s run in %s", device, kernels)
