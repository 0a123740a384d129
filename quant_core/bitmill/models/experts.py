"""Routed experts as ordinary linears.

transformers keeps all experts of a block in two stacked tensors, gate_up_proj [E, 2I, D] and
down_proj [E, D, I]. Quantization works on one matrix at a time, so the stack is replaced by a list:

    out[t] = sum over the experts e chosen for token t of p[t, e] * down_e(act(gate_e x) * up_e x)

The obvious loop over experts; it gave up the grouped matmul.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated feed-forward network, D -> I -> D, without biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, activation: nn.Module) -> Tensor:
        """x: [T, D] -> [T, D]."""
        return cast(Tensor, self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x)))


class ExpertList(nn.ModuleList):
    """Drop-in for transformers' stacked experts: expert e is the submodule named str(e)."""

    def __init__(self, count: int, hidden: int, intermediate: int, activation: nn.Module) -> None:
        super().__init__([Expert(hidden, intermediate) for _ in range(count)])
        self.act_fn = activation

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [T, D]; top_k_index, top_k_weights: [T, k] -> [T, D].

        An index equal to the number of experts chooses none. Products are summed in float32 or
        the input's wider dtype, as they come, expert by expert.
        """
        result = torch.zeros_like(hidden_states)
        for index in range(self.expert_count):
            tokens, place = torch.where(top_k_index == index)
            if len(tokens) == 0:
                continue
            output = self[index](hidden_states[tokens], self.act_fn)
            weighted = output * top_k_weights[tokens, place, None]
            result = result.index_add(0, tokens, weighted.to(result.dtype))
        return result

    @property
    def expert_count(self) -> int:
        """E."""
        return sum(isinstance(child, Expert) for child in self.children())


def is_expert_stack(module: nn.Module) -> bool:
    """Whether a module is transformers' stack of gated experts."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    return isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.dim() == 3


def unfuse_experts(root: nn.Module) -> list[str]:
    """Replace every stack of experts below `root` by an `ExpertList`; return their paths.

    The new weights are uninitialized, on the device and in the dtype of the stack.
    """
    paths = [path for path, module in root.named_modules() if is_expert_stack(module)]
    for path in paths:
        stack = cast(Any, root.get_submodule(path))
        count, double, hidden = stack.gate_up_proj.shape
        with torch.device("meta"):
            experts = ExpertList(count, hidden, double // 2, stack.act_fn)
        experts.to(stack.gate_up_proj.dtype)
        experts.to_empty(device=stack.gate_up_proj.device)
        root.set_submodule(path, experts)
    return paths
