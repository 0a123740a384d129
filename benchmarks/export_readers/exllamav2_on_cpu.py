"""exllamav2's own loader and model on a CPU, where its CUDA extension cannot be compiled.

Its Python is run as it is: what it reads of config.json, its table of architectures, names of
tensors, norms, rotary embeddings, windows and attention. `Extension` stands for the functions of
its extension that this needs, in torch and in fp16 as its kernels compute. Not run: its kernels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Matrix:
    """weight: f16 [N, K] as it multiplies. rows: where its rows come from if they were moved, as
    those of up and gate are to where down has their channels."""

    weight: Tensor
    bias: Tensor | None
    rows: Any


class Extension(ModuleType):
    """The module `exllamav2_ext`. Handles are places in `matrices`."""

    def __init__(self, weight: Any) -> None:
        """weight: dequantizes the five tensors of a linear."""
        super().__init__("exllamav2_ext")
        self._weight = weight
        self.matrices: dict[int, Matrix] = {}
        self._rows: Any = None

    def __getattr__(self, name: str) -> Any:
        """Functions that make what this model never asks: its layers compute in torch without."""
        if name.startswith(("make_q_attn", "make_q_mlp", "make_group_map", "set_", "stfiles_")):
            return lambda *_: torch.empty(0) if name == "make_group_map" else None
        raise AttributeError(name)

    def stloader_read(self, file: str, start: int, size: int, tensor: Tensor) -> None:
        """Bytes of a file into a tensor."""
        data = np.fromfile(file, np.uint8, size, offset=start)
        tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(data))

    def tensor_remap(self, words: Tensor, rows: Tensor) -> None:
        """Columns of words i32 [W, N] in another order, in place."""
        words.copy_(words[:, rows.long()])
        self._rows = rows.long()

    def tensor_remap_4bit(self, steps: Tensor, rows: Tensor) -> None:
        """The same of nibbles i32 [G, N / 8]."""
        places = torch.arange(0, 32, 4)
        nibbles = (steps[..., None] >> places & 15).reshape(len(steps), -1)[:, rows.long()]
        packed = (nibbles.reshape(len(steps), -1, 8).long() << places).sum(-1)
        steps.copy_(packed.to(torch.int32))

    def make_q_matrix(self, *tensors: Any) -> int:
        """A handle; the scales' largest come divided by 256."""
        words, _, places, steps, largest, groups = tensors[:6]
        weight = self._weight(words, groups, steps, largest * 256)
        if not places.is_meta:
            weight = weight[:, places.long() & 0xFFFF]
        bias, handle = tensors[10], len(self.matrices) + 1
        self.matrices[handle] = Matrix(weight.half(), None if bias.is_meta else bias, self._rows)
        self._rows = None
        return handle

    def gemm_half_q_half(self, x: Tensor, handle: int, out: Tensor, _: bool) -> None:
        """x f16 [T, K] -> out f16 [T, N]."""
        matrix = self.matrices[handle]
        out.copy_(torch.nn.functional.linear(x.half(), matrix.weight, matrix.bias))

    def rms_norm(self, x: Tensor, weight: Tensor, out: Tensor, epsilon: float) -> None:
        """Rows of x by their root mean square."""
        scaled = x.float() * (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        out.copy_(scaled * weight.float())

    def head_norm(
        self, x: Tensor, weight: Tensor, _: Tensor, out: Tensor, epsilon: float, rms: bool
    ) -> None:
        """The same of every head."""
        assert rms
        self.rms_norm(x, weight, out, epsilon)

    def rope_(
        self,
        x: Tensor,
        sin: Tensor,
        cos: Tensor,
        past: int,
        _heads: int,
        head: int,
        _offsets: Tensor,
        halves: bool,
    ) -> None:
        """Rotate x [B, T, heads, head] in place; halves: partners lie half a head apart."""
        assert halves
        steps = slice(past, past + x.shape[1])
        turn = torch.cat([-x[..., head // 2 :], x[..., : head // 2]], -1).float()
        sine, cosine = (part[0, 0, steps, None].float() for part in (sin, cos))
        x.copy_(x.float() * cosine + turn * sine)

    def softcap_(self, x: Tensor, cap: float) -> None:
        """In place."""
        x.copy_((x.float() / cap).tanh() * cap)


def load(folder: Path, weight: Any) -> tuple[Any, dict[str, Tensor]]:
    """What computes logits [B, T, V] of tokens [B, T], and its quantized weights f16 by the names
    of transformers."""
    extension = Extension(weight)
    sys.modules["exllamav2_ext"] = extension
    torch.cuda.synchronize = lambda *_: None
    from exllamav2.config import ExLlamaV2Config
    from exllamav2.device import ExLlamaV2DeviceContext
    from exllamav2.model import ExLlamaV2

    config = ExLlamaV2Config(str(folder))
    config.no_sdpa, config.max_seq_len, config.max_input_len = True, 256, 256
    model = ExLlamaV2(config)
    context = ExLlamaV2DeviceContext.__new__(ExLlamaV2DeviceContext)
    context.model, context.device_idx, context.archparams = model, -1, config.arch.lm
    context.prepare_sincos()
    context.begin_scratch_alloc = lambda: None
    context.get_scratch_slice = lambda _: torch.empty(0)
    model.get_device_context = lambda *_, **__: context
    for module in model.modules:
        module.set_device_idx(-1)
        module.load()
    linears = {
        name.removeprefix(config.arch.lm_prefix): extension.matrices[module.q_handle].weight
        for name, module in model.modules_dict.items()
        if isinstance(getattr(module, "q_handle", None), int)
    }
    for name in [name for name in linears if name.endswith("down_proj")]:
        up, gate = (name.replace("down_proj", f"{part}_proj") for part in ("up", "gate"))
        handle = model.modules_dict[config.arch.lm_prefix + up].q_handle
        back = extension.matrices[handle].rows.argsort()
        linears |= {up: linears[up][back], gate: linears[gate][back], name: linears[name][:, back]}
    return lambda tokens: model.forward(tokens)[..., : config.vocab_size], linears
