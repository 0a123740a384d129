"""Runs of a block that go on where earlier runs of the same batch have been.

Refinement runs a block once per step, and all that comes before the step does again what it did
then. Some modules hand out what their last linear gives: attention the output projection's, a gated
MLP the down projection's. That linear's input, or its output, is kept, and in a later run

    module(anything) = linear(kept input) = kept output

so a run that resumes takes the same operations on the same tensors as one that does not, and gives
the same bytes. Such modules are found by running the block, not from a list.

What is kept counts only while the weights of all linears that ran before it are the same, and
nothing was added to it in place: autograd's version counters tell, so weights are to be changed
through `set_weight`. What memory does not hold is run again. Given up: routed experts, of which one
runs behind linears of another that are refined later, and what runs behind them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitmill.models.streamed import StreamedModel
from bitmill.runtime.memory import spare_device_bytes, spare_host_bytes

MOST_BYTES = 10 << 30
"""Kept tensors, and three matrices [K, K] of the widest input K that a step works with beside."""


class Tail(NamedTuple):
    """The module at `path` in the block returns the linear's output: alone (size 0), or first of a
    tuple of `size` values of which the others are None.

    inside: the linears of the module; before: those that run before it and inside, without itself.
    """

    path: str
    linear: str
    size: int
    inside: tuple[str, ...]
    before: tuple[str, ...] = ()


class _Run(NamedTuple):
    """What a tensor is kept of: a block, the batch that ran through it, and where it resumes."""

    block: nn.Module
    batch: Hashable
    tail: Tail


class _Kept(NamedTuple):
    """A linear's input or output, and the versions of all that it depends on."""

    tensor: Tensor
    is_output: bool
    versions: tuple[tuple[int, int], ...]


class Replay:
    """What is kept of the runs of one block, and of copies of it with other weights."""

    def __init__(self) -> None:
        self.tails: tuple[Tail, ...] | None = None
        self._kept: dict[_Run, _Kept] = {}
        self._spare = 0

    @torch.no_grad()
    def look(
        self,
        model: StreamedModel,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        hidden: Tensor,
    ) -> None:
        """Finds where block `index` can be resumed, by running it on hidden [B, T, D], once."""
        if self.tails is not None or not len(hidden) or torch.is_inference_mode_enabled():
            return
        plan = model.plan
        trace = _Trace(block, f"{plan.block_prefix}.{index}.", linears)
        with trace:
            model.run_block(index, block, hidden)
        routed = {name for name in linears if plan.by_name[name].routed}
        self.tails = trace.tails(routed)
        on_cpu = model.device.type == "cpu"
        free = spare_host_bytes() // 2 if on_cpu else spare_device_bytes(model.device)
        widest = max((plan.by_name[name].columns for name in linears), default=0)
        self._spare = min(free, MOST_BYTES - 12 * widest**2)

    @contextmanager
    def resumed(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        batch: Hashable,
        *,
        read: Collection[str] = (),
        written: Collection[str] = (),
        fixed: bool = False,
        last: bool = False,
    ) -> Iterator[None]:
        """Within it, a run of `block` on `batch` goes on from what earlier ones kept, and keeps.

        linears: those of this block, by name; read, written: those whose hooks are to see inputs
        and outputs. fixed: no weight will change; last: this batch runs no more, nothing is kept.
        """
        patched: list[nn.Module] = []
        handles = []
        others = {*read, *written}
        for tail in self.tails or ():
            run, linear = _Run(block, batch, tail), linears[tail.linear]
            kept = self._valid(run, linears)
            seen = others.intersection(tail.inside) - {tail.linear}
            if kept and not seen and not (kept.is_output and tail.linear in read):
                patched += _patch(block.get_submodule(tail.path), linear, tail.size, kept)
            if last:
                self._drop(run)
                continue
            if tail.linear in read:
                handles.append(linear.register_forward_pre_hook(self._input_hook(run, linears)))
            if fixed or tail.linear not in read:
                handles.append(linear.register_forward_hook(self._output_hook(run, linears)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in patched:
                del module.forward

    def _input_hook(
        self, run: _Run, linears: Mapping[str, nn.Module]
    ) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._keep(run, args[0], False, linears)

        return hook

    def _output_hook(
        self, run: _Run, linears: Mapping[str, nn.Module]
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._keep(run, output, True, linears)

        return hook

    def _keep(
        self, run: _Run, tensor: Tensor, is_output: bool, linears: Mapping[str, nn.Module]
    ) -> None:
        self._drop(run)
        size = tensor.untyped_storage().nbytes()
        if size <= self._spare:
            self._spare -= size
            versions = _versions(run.tail, tensor, is_output, linears)
            self._kept[run] = _Kept(tensor, is_output, versions)

    def _valid(self, run: _Run, linears: Mapping[str, nn.Module]) -> _Kept | None:
        kept = self._kept.get(run)
        if kept is None:
            return None
        if kept.versions == _versions(run.tail, kept.tensor, kept.is_output, linears):
            return kept
        self._drop(run)
        return None

    def _drop(self, run: _Run) -> None:
        kept = self._kept.pop(run, None)
        if kept is not None:
            self._spare += kept.tensor.untyped_storage().nbytes()


def _versions(
    tail: Tail, tensor: Tensor, is_output: bool, linears: Mapping[str, nn.Module]
) -> tuple[tuple[int, int], ...]:
    """Of a kept tensor, and of the weights that it may depend on."""
    names = (*tail.before, tail.linear) if is_output else tail.before
    values = (tensor, *(linears[name].get_parameter("weight") for name in names))
    return tuple((id(value), value._version) for value in values)


def _patch(module: nn.Module, linear: nn.Module, size: int, kept: _Kept) -> list[nn.Module]:
    """Have `module` answer by what `linear` makes of the kept input, or by the kept output.

    The linear is called in either case, so its hooks see the output. Returns what was patched.
    """

    def forward(*_: Any, **__: Any) -> Any:
        output = linear(kept.tensor)
        return (output, *(None,) * (size - 1)) if size else output

    module.forward = forward
    if not kept.is_output:
        return [module]
    linear.forward = lambda _: kept.tensor
    return [module, linear]


class _Trace:
    """Records a run of a block: linears as they end, and modules that return what these gave.

    prefix: of the linears' names before their path in the block. A context manager.
    """

    def __init__(self, block: nn.Module, prefix: str, linears: Mapping[str, nn.Module]) -> None:
        self._block, self._prefix, self._linears = block, prefix, linears
        self._order: list[str] = []
        self._runs: Counter[str] = Counter()
        self._ends: dict[str, tuple[Tensor, int]] = {}
        self._found: dict[str, Tail] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_hook(self._linear_hook(name)))
        for path, module in self._block.named_modules():
            start = f"{self._prefix}{path}."
            inside = tuple(name for name in self._linears if name.startswith(start))
            if path and inside:
                hook = self._module_hook(path, inside)
                self._handles.append(module.register_forward_hook(hook))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def tails(self, routed: Set[str]) -> tuple[Tail, ...]:
        """The outermost modules that return what a linear gave, of those that ran once, ahead of
        all routed experts."""
        found = []
        for name, tail in self._found.items():
            before = self._order[: self._order.index(name)]
            once = self._runs[tail.path] == self._runs[name] == 1
            if once and routed.isdisjoint((name, *before)):
                found.append(tail._replace(before=tuple(before)))
        return tuple(found)

    def _linear_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._order.append(name)
            self._runs[name] += 1
            self._ends[name] = (output, output._version)

        return hook

    def _module_hook(
        self, path: str, inside: tuple[str, ...]
    ) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._runs[path] += 1
            size = len(output) if isinstance(output, tuple) else 0
            first = output[0] if size else output
            if size and any(other is not None for other in output[1:]):
                return
            for name in inside:
                if name in self._ends and _is_same(first, *self._ends[name]):
                    self._found[name] = Tail(path, name, size, inside)

        return hook


def _is_same(value: Any, output: Tensor, version: int) -> bool:
    """Whether a module's answer is a linear's output, to which nothing was done in place."""
    return (
        isinstance(value, Tensor)
        and value.data_ptr() == output.data_ptr()
        and value.shape == output.shape
        and value.stride() == output.stride()
        and output._version == version
    )
