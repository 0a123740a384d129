"""One backward pass through a model of which a single block is on the accelerator at a time.

    forward    block by block, inputs of every s-th block kept on the host (`block_inputs.py`)
    head       dL/dh at the last block's output, positions in slices so that logits stay small;
               from L to the logits by the formula dL/dlogits = softmax(logits) - label
    backward   from the last block to the first: run the block on its input again, with gradients,
               and hand on dL/d(input)

L is the sum of the next-token losses of all windows, in nats. While a block runs, hooks hand every
linear's input x and gradient g = dL/dy to the observer; the mean of g g^T is the empirical Fisher
matrix.

The state between blocks is the gradient [S, T, D]. It can be saved and given back, so a killed run
goes on at the block it reached, after a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitmill.calibration.block_inputs import (
    BlockInputs,
    HostMemory,
    choose_every,
    least_inputs,
)
from bitmill.calibration.hooks import batches, embed_windows, run_windows
from bitmill.errors import CalibrationError
from bitmill.models.streamed import StreamedModel
from bitmill.plan.block_memory import backward_bytes
from bitmill.plan.model_plan import Plan
from bitmill.runtime.memory import free_device_bytes, spare_host_bytes
from bitmill.runtime.process import deterministic
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.runtime.timer import timed

LOGIT_VALUES = 3 << 24
"""Values of one slice of logits: 192 MiB in fp32."""


@dataclass(frozen=True)
class PassSettings:
    """How the pass is run; only the batch changes results, by rounding.

    batch: windows per run of a block. host_bytes: limit of what is kept in host memory; None takes
    the accelerator's where it has room for them (`input_room`), else half of what the host has
    free. every: keep every s-th block input; None chooses s from the limit.
    """

    batch: int = 4
    host_bytes: int | None = None
    every: int | None = None


def input_room(plan: Plan, free: int, element: int, tokens: int) -> int:
    """Bytes for block inputs of `free` ones on an accelerator, 0 or less where there are none.

    A tenth stays free and so does what one block's turn takes; element: bytes of a value; tokens:
    of one batch.
    """
    return free - free // 10 - backward_bytes(plan, element, tokens)


class BlockObserver(Protocol):
    """Receives what the linears of one block see, batch by batch."""

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """A linear's input [T, K] and the loss gradient [T, N] at its output, same tokens."""


class Together:
    """Several observers of one block."""

    def __init__(self, *observers: BlockObserver) -> None:
        self._observers = observers

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """See `BlockObserver`."""
        for one in self._observers:
            one.seen(name, x, gradient)


class GradientPass:
    """The pass over one set of windows.

    tokens: int64 [S, T]. group: ranks of which each passes its own windows through; they share the
    host's memory. predictions: of all windows.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokens: Tensor,
        settings: PassSettings,
        *,
        scratch: Path | None = None,
        group: Ranks = SINGLE,
    ) -> None:
        if tokens.shape[1] < 2:
            raise CalibrationError(
                f"windows of {tokens.shape[1]} token have no next token: use at least 2"
            )
        self._model, self._settings = model, settings
        self._tokens = group.shard(tokens)
        self._ranks = group.size
        self._passed: tuple[int, nn.Module] | None = None
        self._scratch = scratch
        self.predictions = tokens.shape[0] * (tokens.shape[1] - 1)

    def run(
        self,
        observer_of: Callable[[int], BlockObserver | None],
        *,
        resume: tuple[int, Tensor] | None = None,
        on_block: Callable[[int, Tensor], None] | None = None,
        on_forward: Callable[[int], None] | None = None,
    ) -> None:
        """Forward, then backward through all blocks.

        observer_of(i): who watches block i, or None. on_block(i, gradient) after block i, with
        the gradient [S, T, D] at its input (of this rank's windows), valid during the call;
        on_forward(i) after a forward run of block i. resume: (i, that gradient) as given to
        on_block before: goes on at i - 1.
        """
        shape = (*self._tokens.shape, self._model.plan.hidden_size)
        size = self._tokens.numel() * self._model.plan.hidden_size * self._model.dtype.itemsize
        limit, where = self._room(size)
        with HostMemory(limit, self._scratch, where) as memory:
            first = memory.empty(shape, self._model.dtype)
            embed_windows(self._model, self._tokens, batch=self._settings.batch, out=first)
            every = self._settings.every or choose_every(self._model.block_count, size, limit)
            inputs = BlockInputs(
                first,
                self._model.block_count,
                min(every, self._model.block_count),
                memory,
                self._step(on_forward),
            )
            top, gradient = self._start(first, inputs, memory, resume)
            for i in reversed(range(top)):
                self._backward(i, inputs.take(i), gradient, observer_of(i))
                if on_block:
                    on_block(i, gradient)

    def source_block(self, i: int) -> nn.Module:
        """Block i: the one just gone through backward, or a fresh one."""
        if self._passed is not None and self._passed[0] == i:
            return self._passed[1]
        return self._model.load_block(i)

    def _room(self, size: int) -> tuple[int, torch.device]:
        """Bytes for block inputs of `size` bytes each, and the memory to take them from."""
        device, limit = self._model.device, self._settings.host_bytes
        tokens = self._settings.batch * self._tokens.shape[1]
        free = free_device_bytes(device)
        spare = input_room(self._model.plan, free, self._model.dtype.itemsize, tokens) - size
        if limit is None and spare >= least_inputs(self._model.block_count) * size:
            return spare, device
        limit = spare_host_bytes() if limit is None else limit
        return limit // self._ranks, torch.device("cpu")

    def _start(
        self,
        first: Tensor,
        inputs: BlockInputs,
        memory: HostMemory,
        resume: tuple[int, Tensor] | None,
    ) -> tuple[int, Tensor]:
        """Number of blocks still to go through, and the gradient at the output of the last."""
        if resume is None:
            output = inputs.forward()
            gradient = torch.empty_like(output)
            with timed("head"):
                self._head_gradient(output, gradient)
            memory.free(output)
            return self._model.block_count, gradient
        top, gradient = resume
        if top:
            memory.free(inputs.forward(top))
        return top, gradient.to(first.device, self._model.dtype)

    def _parts(self) -> Iterator[slice]:
        return batches(len(self._tokens), self._settings.batch)

    def _step(self, on_forward: Callable[[int], None] | None) -> Callable[..., None]:
        def step(i: int, x: Tensor, y: Tensor) -> None:
            block = self._model.load_block(i)
            run_windows(self._model, i, block, x, batch=self._settings.batch, out=y)
            if on_forward:
                on_forward(i)

        return step

    def _head_gradient(self, output: Tensor, gradient: Tensor) -> None:
        """Write dL/d(output) [S, T, D]; the last position of a window predicts nothing."""
        tokens, transfers = self._tokens.to(self._model.device), self._model.transfers
        length = tokens.shape[1]
        for part, (x,) in transfers.batches([output], self._parts()):
            targets, found = tokens[part], torch.zeros_like(x)
            span = max(1, LOGIT_VALUES // (len(targets) * self._model.plan.vocab_size))
            for start in range(0, length - 1, span):
                place = slice(start, min(start + span, length - 1))
                labels = targets[:, place.start + 1 : place.stop + 1]
                found[:, place] = self._slice_gradient(x[:, place], labels)
            transfers.store(gradient[part], found)

    def _slice_gradient(self, x: Tensor, labels: Tensor) -> Tensor:
        """dL/dx [B, T, D] of x [B, T, D] at the labels int64 [B, T]."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._model.logits(x)
        received = logits.detach().softmax(-1, torch.float32)
        place = labels[..., None]
        received.scatter_(-1, place, received.gather(-1, place) - 1)
        return torch.autograd.grad(logits, x, received.to(logits.dtype))[0]

    def _backward(
        self, i: int, inputs: Tensor, gradient: Tensor, observer: BlockObserver | None
    ) -> None:
        """Replace the gradient at block i's output by that at its input, in place."""
        self._passed = None
        block = self._model.load_block(i).requires_grad_(False)
        modules = self._model.linears(block, i)
        largest = torch.zeros((), device=self._model.device)
        transfers = self._model.transfers
        for part, (given, received) in transfers.batches([inputs, gradient], self._parts()):
            x = given.detach().requires_grad_()
            with deterministic(), _watching(modules, observer), torch.enable_grad():
                y = self._model.run_block(i, block, x)
                with timed("backward"):
                    torch.autograd.backward(y, received.to(y.dtype))
            assert x.grad is not None
            largest = torch.maximum(largest, torch.linalg.vector_norm(x.grad, ord=math.inf))
            transfers.store(gradient[part], x.grad)
        if not math.isfinite(float(largest)):
            raise CalibrationError(
                f"the loss gradient at the input of block {i} is not finite: the calibration "
                "text drives the model out of range; use other text or a wider dtype",
                code="non_finite_gradient",
            )
        self._passed = i, block


@contextmanager
def _watching(modules: Mapping[str, nn.Module], observer: BlockObserver | None) -> Iterator[None]:
    """While open, report input and output gradient of every call of the named linears."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()

            def received(gradient: Tensor) -> None:
                assert observer is not None
                rows = gradient.detach().reshape(-1, gradient.shape[-1])
                observer.seen(name, x.reshape(-1, x.shape[-1]), rows)

            if output.requires_grad:
                output.register_hook(received)

        return hook

    if observer is None:
        yield
        return
    handles = [m.register_forward_hook(hook_of(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
