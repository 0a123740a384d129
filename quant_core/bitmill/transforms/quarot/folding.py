"""QuaRot's rotations that fold into weights: the same function, with weights near Gaussian.

    stream x:          x' = x Q,   reader W' = W diag(g) Q,   writer W' = Q^T W, b' = Q^T b
    head of values v:  v' = v R,   v_proj  W' = R^T W, b' = R^T b,   o_proj W' = W R

g are the factors of the norm that the reader reads through, which are 1 afterwards. (Ashkboos et
al., "QuaRot", arXiv 2404.00456, section 4, stage 1.) An RMSNorm commutes with every rotation. A
LayerNorm takes the mean off, which a rotation keeps that leaves (1, ..., 1) alone; its bias b
becomes (b / g) Q. Hence

    Q = S H   behind RMSNorms,      Q = H S H with S[0] = 1   behind LayerNorms

S is a diagonal of signs, which follow from the number of a channel, H a symmetric orthogonal matrix
whose first row is constant: Sylvester's for the power of two in the size, times the discrete
Hartley transform for the odd rest. All is computed in float64 and rounded to the source's
dtype (to halves through float32, as torch does: `findings/float64-to-halves-rounds-twice.sh`).
Given up: random signs, and rotations that are made while the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from transformers import AutoConfig

from bitmill.errors import ModelError
from bitmill.plan.architectures import ROUTERS, step_of
from bitmill.plan.model_plan import Source
from bitmill.plan.parameters import HEAD_WEIGHT
from bitmill.plan.source_model import SourceModel
from bitmill.plan.source_tensors import Placed
from bitmill.quant.rotation import signs
from bitmill.transforms.quarot.settings import STREAMS, QuaRot, Stream, places, stored_name

_ROWS = 2048
"""Rows that are in float64 at once."""
_LARGEST_FACTOR = 64
_SMALLEST_GAIN = 1e-4
"""Of a LayerNorm with a bias, as a share of its largest."""
_STACKED = ("qkv_proj", "attn.c_attn")
"""Endings of projections whose last rows are the values."""


@dataclass(frozen=True)
class Turn:
    """Q of a size. keeps_mean: whether it leaves (1, ..., 1) alone."""

    size: int
    keeps_mean: bool = False

    def rows(self, W: Tensor, gain: Tensor | None = None) -> Tensor:
        """W diag(gain) Q of W [..., size] in any dtype; gain f64 [size]."""
        parts = []
        for part in W.reshape(-1, self.size).split(_ROWS):
            x = part.double() if gain is None else part.double() * gain
            parts.append(self._turned(x).to(W.dtype))
        return torch.cat(parts).reshape(W.shape)

    def columns(self, W: Tensor) -> Tensor:
        """Q^T W of W [size, K], or of a vector [size]."""
        return self.rows(W.T.contiguous()).T if W.dim() > 1 else self.rows(W)

    def _turned(self, x: Tensor) -> Tensor:
        s = signs(self.size, x.device).to(x.dtype)
        if not self.keeps_mean:
            return _symmetric(x * s)
        return _symmetric(_symmetric(x) * s * s[0])


def _symmetric(x: Tensor) -> Tensor:
    """x f64 [n, K] times H."""
    before = 1
    for factor in _factors(x.shape[1]):
        parts = x.reshape(len(x), before, factor, -1)
        x = torch.einsum("nbfa,fg->nbga", parts, _matrix(factor)).reshape(len(x), -1)
        before *= factor
    return x


def _factors(size: int) -> list[int]:
    """Powers of two, then what is odd."""
    power, found = size & -size, []
    odd = size // power
    while power > 1:
        found.append(min(power, _LARGEST_FACTOR))
        power //= found[-1]
    return found + [odd] * (odd > 1)


@cache
def _matrix(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, the Hartley transform of an odd size; f64, orthogonal
    and symmetric."""
    if size % 2:
        angles = torch.outer(torch.arange(size), torch.arange(size)) % size
        angles = angles.double() * (2 * math.pi / size)
        return torch.cos(angles).add(torch.sin(angles)) / math.sqrt(size)
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(size)


class Folding:
    """QuaRot as a `SourceRewriting` (`transforms/transform.py`)."""

    def __init__(self, settings: QuaRot) -> None:
        self.settings = settings

    def tensors(
        self, source: SourceModel, read: Callable[[Source], Tensor]
    ) -> Callable[[str], Tensor]:
        """See `SourceRewriting`."""
        return _Folded(self.settings, source, read).tensor


class _Folded:
    def __init__(
        self, settings: QuaRot, source: SourceModel, read: Callable[[Source], Tensor]
    ) -> None:
        self.source, self.parts, self.read = source, settings.parts, read
        self.placed = places(source)
        self.modules = {stored_name(source, one): name for name, one in self.placed.items()}
        found = STREAMS[source.architecture.model_type]
        self.stream = found if isinstance(found, Stream) else None
        self._gains: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """One tensor of the model that is made."""
        module = self.modules.get(name) or self.source.architecture.renamed(name)
        value = self._read(module)
        turned = self.source.architecture.transposed and value.dim() == 2 and self._inside(module)
        value = value.T if turned else value
        if "values" in self.parts and self._inside(module):
            value = self._with_values(module, value)
        if "residual" in self.parts and self.stream is not None:
            value = self._in_stream(self.stream, module, value)
        return (value.T if turned else value).contiguous()

    def _read(self, module: str) -> Tensor:
        """As transformers has it; a tied pair is stored once, or twice."""
        pair = {HEAD_WEIGHT: self.source.architecture.embedding}
        pair |= {name: head for head, name in pair.items()}
        place = self.placed.get(module) or self.placed[pair[module]]
        return self.read(_source_of(place))

    def _inside(self, module: str) -> bool:
        return module.startswith(f"{self.source.architecture.blocks}.")

    def _in_stream(self, stream: Stream, module: str, value: Tensor) -> Tensor:
        path, _, leaf = module.rpartition(".")
        if module in stream.embeddings:
            return self.turn.rows(value)
        if module == HEAD_WEIGHT:
            return self.turn.rows(value, self._gain(stream.last))
        parent, _, last = path.rpartition(".")
        in_block = self._inside(module) and parent.rpartition(".")[0] == self._blocks
        if path == stream.last or (in_block and last in stream.norms):
            return self._norm(path, leaf, value)
        step = 2 if last in ROUTERS else step_of(path)[0]
        if step in (0, 2) and leaf == "weight" and self._inside(module):
            return self.turn.rows(value, self._gain(self._norm_before(stream, module, step)))
        if step in (1, 3) and self._inside(module):
            return self.turn.columns(value)
        return value

    def _norm(self, path: str, leaf: str, value: Tensor) -> Tensor:
        if leaf == "weight":
            return torch.ones_like(value)
        gain = self._gain(path)
        if bool((gain.abs() < _SMALLEST_GAIN * gain.abs().amax()).any()):
            raise ModelError(
                f"transform 'quarot' cannot fold {path}: some of its factors are 0, or nearly so, "
                "and its bias would have to be divided by them: give parts ['values']",
                code="transform_refuses",
                param=f"{path}.weight",
            )
        return self.turn.rows((value.double() / gain)[None])[0].to(value.dtype)

    def _norm_before(self, stream: Stream, module: str, step: int) -> str:
        """The norm that a linear of a block reads through."""
        block = ".".join(module.split(".")[: self._blocks.count(".") + 2])
        names = [f"{block}.{name}" for name in stream.norms]
        return next(n for n in (names[step // 2], names[0]) if f"{n}.weight" in self.placed)

    def _gain(self, path: str) -> Tensor:
        if path not in self._gains:
            self._gains[path] = self._read(f"{path}.weight").double()
        return self._gains[path]

    def _with_values(self, module: str, value: Tensor) -> Tensor:
        path, _, leaf = module.rpartition(".")
        head = Turn(self.columns_of_head)
        if path.endswith(".v_proj"):
            return _by_head(head, value)
        if path.endswith(_STACKED):
            begin = (len(value) + self._heads * head.size) // 2
            return torch.cat([value[:begin], _by_head(head, value[begin:])])
        if step_of(path)[0] == 1 and leaf == "weight":
            return head.rows(value)
        return value

    @property
    def _blocks(self) -> str:
        return self.source.architecture.blocks

    @cached_property
    def turn(self) -> Turn:
        """Of the stream."""
        assert self.stream is not None
        size = self.placed[f"{self.stream.last}.weight"].shape[0]
        return Turn(size, keeps_mean=f"{self.stream.last}.bias" in self.placed)

    @cached_property
    def _heads(self) -> int:
        config = AutoConfig.for_model(**self.source.settings)
        return int(config.num_attention_heads)

    @cached_property
    def columns_of_head(self) -> int:
        """Of queries and values."""
        shapes = self.source.architecture.parameters(self.source.settings).shapes
        name = next(n for n in shapes if n.endswith(".weight") and _writes_attention(n))
        inputs = shapes[name][0 if self.source.architecture.transposed else 1]
        return inputs // self._heads


def _writes_attention(name: str) -> bool:
    return step_of(name.removesuffix(".weight"))[0] == 1


def _by_head(head: Turn, value: Tensor) -> Tensor:
    """R^T of every head's rows of value [heads * size, K] or [heads * size]."""
    if value.dim() == 1:
        return head.rows(value)
    turned = head.rows(value.T.contiguous())
    return turned.T


def _source_of(place: Placed) -> Source:
    return Source(tensor=place.stored.name, index=place.index, rows=place.rows)
