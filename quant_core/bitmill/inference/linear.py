"""A linear layer whose weight stays packed: `QuantizedLinear`, a plain module.

    y[..., n] = sum_k x[..., order[k]] * w[n, k] + bias[n],   w[n, k] = scale * (code - zero)

Its buffers bear the tensor names of the format (docs/format.md), so a state dict of the model is
a packed checkpoint. What a device computes with is a `MixedLinear`, built from the buffers at the
first use on that device and dropped when the module changes; it is never stored.

The buffers themselves stay in host memory: moving a model to an accelerator leaves them, and
buffers that were loaded onto one go back once the layout is built there. So the accelerator
holds the packed weights once, and a model can be saved again at any time.

Packed linears that read the same input are multiplied in one launch. q/k/v and gate/up are separate
modules that a model calls one after the other with the same tensor: the first call multiplies for
all of them and keeps the outputs, each of the others takes its own. Outputs are kept only until
every sibling has come for its part, and a call with another tensor starts anew, so a sibling that
is called alone costs time and is still right. Only accelerators gain from it, as small launches are
what they are slow at, and codes whose inputs must be rotated first (`joins_on_cpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitmill.inference.outliers import OutlierProduct
from bitmill.inference.read_only import ReadOnlyTensor
from bitmill.plan.architectures import sibling_key
from bitmill.quant.outliers import Outliers
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.rotation import packed_rewrites
from bitmill.quant.tensors import KINDS, PackedTensor, Stored, packed_shapes
from bitmill_kernels.matmul.linear import MixedLinear
from bitmill_kernels.matmul.runtime import PackedWeight


class QuantizedLinear(nn.Module):
    """Packed linear of N = `out_features` rows and K = `in_features` columns.

    widths: one bit width per group of 128 columns
    order:  None where columns keep their order, "own" where the column order is stored under
            this linear's name, "shared" where another linear stores it and `share_order` gives it
    outliers: number of columns that are kept in 16 bits beside the codes
    Buffers are empty until a checkpoint is loaded or `fill` is called. `siblings` is the group of
    modules that read the same input, set by `join_siblings`.
    """

    order: Tensor | None
    outlier_columns: Tensor | None
    outliers: Tensor | None
    code = "affine"
    shapes = staticmethod(packed_shapes)
    """Dtype and shape of every buffer but the order, of N, K and widths."""
    joins_on_cpu = False
    """Whether siblings are multiplied together on a CPU too."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        widths: tuple[int, ...],
        *,
        bias: bool = False,
        order: str | None = None,
        outliers: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.widths = widths
        for key, (kind, shape) in self.shapes(out_features, in_features, widths).items():
            self.register_buffer(key, torch.empty(shape, dtype=kind, device=device))
        columns = torch.empty(in_features, dtype=torch.int32, device=device) if order else None
        self.register_buffer("order", columns, persistent=order == "own")
        places, values = (
            torch.empty(shape, dtype=kind, device=device) if outliers else None
            for kind, shape in (
                (torch.int32, (outliers,)),
                (torch.float16, (out_features, outliers)),
            )
        )
        self.register_buffer("outlier_columns", places)
        self.register_buffer("outliers", values)
        self.bias: nn.Parameter | None = None
        if bias:
            empty = torch.empty(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        self._dtype = dtype or torch.get_default_dtype()
        self.siblings: SiblingGroup | None = None
        self._runtime: Any = None
        self._beside: OutlierProduct | None = None

    @classmethod
    def from_packed(cls, packed: Stored, *, bias: Tensor | None = None) -> Self:
        """A module that holds these tensors, on their device."""
        beside = packed.rewrites.tensors("")
        module = cls(
            packed.K,
            packed.N,
            packed.widths,
            bias=bias is not None,
            order="own" if packed.rewrites.order is not None else None,
            outliers=len(beside.get(".outlier_columns", ())),
            device="meta",
        )
        module.fill(packed.tensors("") | beside, bias)
        return module

    def fill(self, tensors: Mapping[str, Tensor], bias: Tensor | None = None) -> None:
        """Take over the buffers' tensors, named as in the format behind a leading dot."""
        for key, tensor in tensors.items():
            setattr(self, key.removeprefix("."), tensor)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self._reset()

    def share_order(self, order: Tensor) -> None:
        """Use the column order i32 [K] that another linear stores."""
        self.order = order
        self._reset()

    def stored(self, name: str = "weight") -> Stored:
        """The buffers as a tensor of the module's code, checked in full; `name` appears in errors.

        Raises FormatError as `Stored.from_tensors` does.
        """
        keys = self.shapes(self.out_features, self.in_features, self.widths)
        tensors = {f"{name}.{key}": getattr(self, key) for key in keys}
        rewrites = packed_rewrites(self.code, self.order)
        if self.outliers is not None and self.outlier_columns is not None:
            rewrites = Rewrites([*rewrites, Outliers(self.outlier_columns, self.outliers)])
        return KINDS[self.code].from_tensors(
            name, tensors, self.out_features, self.in_features, self.widths, rewrites
        )

    def packed(self) -> PackedTensor:
        """The buffers as bit planes."""
        found = self.stored()
        assert isinstance(found, PackedTensor)
        return found

    def dequantize(self) -> Tensor:
        """Weight f32 [N, K] in the source's column order."""
        return self.stored().unpack().dequantize()

    @property
    def weight(self) -> Tensor:
        """Dequantized weight [N, K] in the dtype the module was made for, anew at each access.

        For code that asks a linear for its weight's values or dtype; a write raises InputError.
        """
        weight = self.dequantize().to(self._dtype).as_subclass(ReadOnlyTensor)
        weight._is_hf_initialized = True  # transformers initializes some modules by their parent
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], computed on the device and in the dtype of x."""
        y = self._product(x)
        if self.outliers is None or self.outlier_columns is None:
            return y
        if self._beside is None or self._beside.device != x.device:
            self._beside = OutlierProduct(self.outlier_columns, self.outliers, self.order, x.device)
        return self._beside(x, y)

    def _product(self, x: Tensor) -> Tensor:
        """What the codes make of x, and the bias."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.siblings is not None and (x.is_cuda or self.joins_on_cpu):
            y = self.siblings.output(self, x)
            return y if bias is None else y + bias
        if self._runtime is None or self._runtime.device != x.device:
            self._runtime = self.stacked([self], x.device)
            self.release()
        product: Tensor = self._runtime(x, bias)
        return product

    @staticmethod
    def stacked(modules: Sequence[QuantizedLinear], device: torch.device) -> Any:
        """What multiplies the modules' shared input on a device, their outputs side by side: called
        with x [..., K] and a bias [N] or None."""
        return MixedLinear([module.packed_weight() for module in modules], device)

    def packed_weight(self) -> PackedWeight:
        """The buffers, checked, as the kernels take them."""
        packed = self.packed()
        tensors = packed.planes | {"scales": packed.scales}
        return PackedWeight(tensors, packed.widths, packed.N, packed.K, packed.order)

    def release(self) -> None:
        """Move the buffers to host memory; what was built from them stays where it is."""
        for key, tensor in self._buffers.items():
            if tensor is not None and tensor.is_cuda:
                self._buffers[key] = tensor.cpu()

    def extra_repr(self) -> str:
        """Shape and widths, for printing a model."""
        widths = "".join(map(str, self.widths))
        return f"in_features={self.in_features}, out_features={self.out_features}, widths={widths}"

    def _reset(self) -> None:
        self._runtime = self._beside = None
        if self.siblings is not None:
            self.siblings.reset()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move and cast the bias; of the buffers, follow only a move to the host.

        Scales stay fp16 whatever dtype the model is cast to.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key, old in before.items():
            new = self._buffers[key]
            if old is None or new is None or old.is_meta:
                continue
            if not new.is_cpu:
                self._buffers[key] = old
            elif new.dtype != old.dtype:
                self._buffers[key] = old.to(new.device)
        self._reset()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what was built from the buffers: a copy builds its own."""
        return self.__dict__ | {"_runtime": None, "_beside": None}


class SiblingGroup:
    """Modules that share an input; the stack is built at the first use and dropped by `reset`."""

    def __init__(self, modules: list[QuantizedLinear]) -> None:
        self.modules = modules
        self.reset()

    def reset(self) -> None:
        """Forget the stack: a module has moved or changed."""
        self._stack: Any = None
        self._kept: tuple[Tensor, list[Tensor | None]] | None = None

    def output(self, module: QuantizedLinear, x: Tensor) -> Tensor:
        """y [..., N] of one of the modules, without its bias."""
        index = next(i for i, sibling in enumerate(self.modules) if sibling is module)
        kept = self._kept  # another thread may put its own there
        if kept is None or kept[0] is not x or kept[1][index] is None:
            if self._stack is None or self._stack.device != x.device:
                self._stack = self._build(x.device)
            stack = self._stack
            kept = self._kept = x, list(stack(x).split(stack.outputs, dim=-1))
        outputs = kept[1]
        y = outputs[index]
        assert y is not None
        outputs[index] = None  # a second call with the same tensor multiplies again
        if self._kept is kept and all(output is None for output in outputs):
            self._kept = None
        return y

    def _build(self, device: torch.device) -> Any:
        stack = self.modules[0].stacked(self.modules, device)
        for module in self.modules:
            module.release()
        return stack

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules, "_stack": None, "_kept": None}


def join_siblings(modules: Iterable[tuple[str, QuantizedLinear]]) -> None:
    """Put modules of one code, given by full name, that read the same input into groups."""
    groups: dict[tuple[Any, ...], list[QuantizedLinear]] = {}
    for name, module in modules:
        order = None if module.order is None else module.order.data_ptr()
        key = (*sibling_key(name), module.code, module.in_features, order)
        groups.setdefault(key, []).append(module)
    for members in groups.values():
        if len(members) > 1:
            group = SiblingGroup(members)
            for member in members:
                member.siblings = group
