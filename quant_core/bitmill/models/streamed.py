"""A language model run one decoder block at a time, with weights read from disk on demand.

The model's skeleton is built by transformers on the meta device. Everything outside the decoder
blocks (embedding, final norm, head) is loaded; the blocks stay empty. What the model hands to its
blocks besides the hidden states (masks, rotary embeddings, windows) is learned by running it with
blocks that only record their arguments, so no architecture needs hand-written glue:

    embed  = the input of the first recording block
    block  = a copy of the skeleton's block, filled from disk, called with the recorded arguments
    logits = the same run with the last recording block answering the hidden states asked about

Recorded arguments depend on the batch's shape only (there is no padding); the latest few shapes
are remembered. No key-value cache is ever made.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.pytorch_utils import Conv1D

from bitmill.errors import ModelError
from bitmill.models.experts import unfuse_experts
from bitmill.models.fused_norms import fuse_norms
from bitmill.models.fused_rotary import fuse_rotary
from bitmill.models.prefetch import BlockPrefetcher
from bitmill.models.reader import CheckpointSource, check_finite
from bitmill.models.skeleton import build_skeleton
from bitmill.plan.config_json import read_config
from bitmill.plan.model_plan import Plan, Source
from bitmill.runtime.staging import Staging
from bitmill.runtime.timer import timed
from bitmill.runtime.transfers import Transfers

_REMEMBERED_SHAPES = 4

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def weight_of(module: nn.Module) -> Tensor:
    """A linear's weight [N, K]: a view, transposed for a Conv1D."""
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Overwrite a linear's weight by `weight` [N, K], cast to the module's dtype and device."""
    weight_of(module).copy_(weight)


def capture_inputs(
    modules: Mapping[str, nn.Module],
    run: Callable[[], object],
    sink: Callable[[str, Tensor], None],
) -> None:
    """Call `run` and hand every input of the named modules to `sink` as [T, K], detached.

    Of modules that read the same input, name one.
    """

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            sink(name, args[0].detach().reshape(-1, args[0].shape[-1]))

        return hook

    handles = [m.register_forward_pre_hook(hook_of(name)) for name, m in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


class _TupleOutputs(Exception):
    """The model takes element 0 of what a block returns."""


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, and no inference tensors either: those could not be used in a backward pass."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class StreamedModel:
    """A causal language model of which one decoder block at a time is in memory.

    device, dtype: where and in what precision embedding, head and blocks are loaded.
    prefetch: load one block ahead in a thread; by default on accelerators.
    Raises `ModelError` for a parameter that the folder lacks, unlike when it was planned, or whose
    shape differs.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        prefetch: bool | None = None,
    ) -> None:
        self.plan, self.device, self.dtype = plan, device, dtype
        self.block_count = plan.block_count
        self.source = CheckpointSource(folder)
        settings, _ = read_config(folder)
        self._sources: dict[str, Source] = {f"{li.name}.weight": li.source for li in plan.matrices}
        for tensor in plan.tensors:
            self._sources[tensor.module] = self._sources[tensor.name] = tensor.source
        self._skeleton = build_skeleton(settings, dtype)
        self.config: Any = self._skeleton.config
        self._blocks = cast(nn.ModuleList, self._skeleton.get_submodule(plan.block_prefix))
        self._seen: OrderedDict[tuple[int, int], list[Arguments]] = OrderedDict()
        self._recorder = _Recorder(self._blocks)
        self._staging = Staging(device)
        self.transfers = Transfers(device)
        self._load_outside_blocks()
        self._tuples = False
        self._tuples = self._finds_tuples()
        self._ahead: BlockPrefetcher | None = None
        if prefetch or (prefetch is None and device.type != "cpu"):
            self._ahead = BlockPrefetcher(self._load_block, plan.block_count, device)

    def close(self) -> None:
        """Unmap the weight files; the model loads no block after this."""
        if self._ahead is not None:
            self._ahead.close()
        self.source.close()

    @property
    def head(self) -> nn.Module:
        """The output head."""
        return cast(nn.Module, self._skeleton.get_output_embeddings())

    def is_head(self, name: str) -> bool:
        """Whether the matrix of the module `name` is the head's, be it tied or its own."""
        return self._skeleton.get_submodule(name).weight is self.head.weight

    def with_matrices(self, matrices: Mapping[str, Tensor]) -> StreamedModel:
        """The same model with other embeddings or heads [V, D], by full name of their module.

        Tied matrices stay tied. Everything else is shared with this model; close only one of them.
        """
        if not matrices:
            return self
        other = copy.copy(self)
        shared = (*self._skeleton.parameters(), *self._skeleton.buffers())
        other._skeleton = copy.deepcopy(self._skeleton, {id(value): value for value in shared})
        for name, matrix in matrices.items():
            old = other._skeleton.get_parameter(f"{name}.weight")
            new = nn.Parameter(matrix.to(old), requires_grad=False)
            for module in other._skeleton.modules():
                for leaf, value in module._parameters.items():
                    if value is old:
                        module._parameters[leaf] = new
        return other

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        source = self._sources[name]
        value = self.source.read_source(source)
        if source.transposed:
            value = value.T
        if value.shape != shape:
            raise ModelError(
                f"{name} has the shape {tuple(value.shape)}, the config asks for {tuple(shape)}",
                code="bad_shape",
                param=name,
            )
        value = self._staging.to_device(value)
        check_finite(name, value)
        on_device = self.device.type != "cpu"
        return value.to(self.dtype, copy=not on_device)

    def _parameter(self, name: str, shape: torch.Size) -> nn.Parameter:
        """A frozen parameter from the source, marked so that transformers leaves it alone."""
        parameter = nn.Parameter(self._read(name, shape), requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        return parameter

    def _fill(self, module: nn.Module, prefix: str, skip: tuple[str, ...] = ()) -> None:
        """Give the parameters and persistent buffers on the meta device below `module` values."""
        for path, child in module.named_modules():
            full = ".".join(part for part in (prefix, path) if part)
            if full.startswith(skip):
                continue
            for leaf, value in list(child.named_parameters(recurse=False)):
                if value.is_meta:
                    setattr(child, leaf, self._parameter(f"{full}.{leaf}", value.shape))
            self._fill_buffers(child, full)

    def _fill_buffers(self, module: nn.Module, full: str) -> None:
        computed = False
        for leaf, value in list(module.named_buffers(recurse=False)):
            if leaf in module._non_persistent_buffers_set:
                computed = True
                module._buffers[leaf] = torch.empty_like(value, device=self.device)
            else:
                data = self._read(f"{full}.{leaf}", value.shape)
                module._buffers[leaf] = data.to(value.dtype)
        if computed:
            with initialization.guard_torch_init_functions():
                self._skeleton._init_weights(module)

    def _tie(self) -> None:
        """Share tied weights; a tie is followed only where the source lacks one side."""
        for target, origin in self._skeleton.get_expanded_tied_weights_keys(True).items():
            if target in self._sources and origin in self._sources:
                continue
            if target in self._sources:
                target, origin = origin, target
            parent, _, leaf = target.rpartition(".")
            setattr(
                self._skeleton.get_submodule(parent), leaf, self._skeleton.get_parameter(origin)
            )

    def _load_outside_blocks(self) -> None:
        with _plain_tensors():
            for names in self._skeleton.get_expanded_tied_weights_keys(True).items():
                for name in names:
                    parent, _, leaf = name.rpartition(".")
                    module = self._skeleton.get_submodule(parent)
                    if name in self._sources:
                        shape = getattr(module, leaf).shape
                        setattr(module, leaf, self._parameter(name, shape))
            self._tie()
            self._fill(self._skeleton, "", skip=(self.plan.block_prefix + ".",))

    def _logits(self, answer: Tensor) -> Tensor:
        tokens = torch.zeros(answer.shape[:2], dtype=torch.int64, device=self.device)
        with self._recorder.recording(answer, self._tuples):
            return cast(Tensor, self._skeleton(input_ids=tokens, use_cache=False).logits)

    def _finds_tuples(self) -> bool:
        probe = torch.zeros(2, 3, self.plan.hidden_size, device=self.device, dtype=self.dtype)
        try:
            with _plain_tensors():
                return self._logits(probe).dim() != 3
        except _TupleOutputs:
            return True

    @_plain_tensors()
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, T] -> the first block's input [B, T, D]."""
        arguments = self._record(tokens.to(self.device))
        args, kwargs = arguments[0]
        return cast(Tensor, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def _record(self, tokens: Tensor) -> list[Arguments]:
        self.plan.check_length(tokens.shape[1], "length")
        with self._recorder.recording(None, self._tuples) as arguments:
            self._skeleton.base_model(input_ids=tokens, use_cache=False)
        key = (tokens.shape[0], tokens.shape[1])
        self._seen.pop(key, None)
        self._seen[key] = [_without_hidden(args, kwargs) for args, kwargs in arguments]
        while len(self._seen) > _REMEMBERED_SHAPES:
            self._seen.popitem(last=False)
        return arguments

    def load_block(self, i: int) -> nn.Module:
        """A fresh copy of block i on the device, in evaluation mode; the caller drops it.

        Stacked experts come as one linear per matrix (`bitmill.models.experts.ExpertList`).
        """
        with timed("read"):
            return self._load_block(i) if self._ahead is None else self._ahead.get(i)

    def _load_block(self, i: int) -> nn.Module:
        with _plain_tensors():
            block = copy.deepcopy(self._blocks[i])
            self._recorder.restore(block)
            unfuse_experts(block)
            self._fill(block, f"{self.plan.block_prefix}.{i}")
            if self.device.type != "cpu" and self.dtype.itemsize == 2:
                fuse_norms(block)
                fuse_rotary(block)
        return block.eval()

    def run_block(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Block i's input [B, T, D] -> its output [B, T, D] in float of `dtype`; differentiable."""
        key = (hidden.shape[0], hidden.shape[1])
        if key not in self._seen:
            with _plain_tensors():
                self._record(torch.zeros(key, dtype=torch.int64, device=self.device))
        args, kwargs = self._seen[key][i]
        with timed("forward"):
            x = hidden.to(device=self.device, dtype=self.dtype, non_blocking=True)
            output = block(x, *args, **kwargs)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def logits(self, hidden: Tensor) -> Tensor:
        """The last block's output [B, T, D] -> logits [B, T, V]; differentiable.

        Positions are independent, so a slice of T gives that slice of the logits.
        """
        return self._logits(hidden.to(device=self.device, dtype=self.dtype))

    def linears(self, block: nn.Module, i: int) -> dict[str, nn.Module]:
        """Full name -> module of the linears of block i that the plan quantizes, in its order."""
        prefix = f"{self.plan.block_prefix}.{i}."
        names = [linear.name for linear in self.plan.block_linears(i)]
        return {name: block.get_submodule(name.removeprefix(prefix)) for name in names}


def _without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    if "hidden_states" in kwargs:
        return args, {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return args[1:], kwargs


class _Recorder:
    """Stands in for the forward pass of every block of the skeleton."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._arguments: list[Arguments] | None = None
        self._answer: Tensor | None = None
        self._tuples = False
        last = len(blocks) - 1
        for i, block in enumerate(blocks):
            block.forward = self._stub(i == last)

    def _stub(self, last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if hidden.dim() != 3:
                raise _TupleOutputs
            if self._arguments is not None:
                self._arguments.append((args, kwargs))
            if last and self._answer is not None:
                hidden = self._answer
            return (hidden,) if self._tuples else hidden

        return forward

    @staticmethod
    def restore(block: nn.Module) -> None:
        """Give a copied block its own forward pass back."""
        del block.forward

    @contextmanager
    def recording(self, answer: Tensor | None, tuples: bool) -> Iterator[list[Arguments]]:
        """Collect the blocks' arguments; the last block answers `answer` where one is given."""
        arguments: list[Arguments] = []
        self._arguments, self._answer, self._tuples = arguments, answer, tuples
        try:
            yield arguments
        finally:
            self._arguments = self._answer = None
