"""What of SGLang a quantization plug-in sees, to stand for it where SGLang is not installed.

Written after sglang 0.5.23 from PyPI: the order in which layers set their fields and call
`create_weights` (`srt/layers/linear.py`, `srt/layers/vocab_parallel_embedding.py`), what names and
shards weights are loaded by (`srt/model_loader/auto_loader.py`), what `from_config` is given
(`srt/model_loader/weight_utils.py`), its table of methods (`srt/layers/quantization/__init__.py`);
and after that table in its repository since (`_LazyMethodMap`, with `registry.py`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

PADDING = 64
STACKED = (
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
)


class QuantizeMethodBase:
    """Of one layer."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing."""


class LinearMethodBase(QuantizeMethodBase):
    """Of a linear layer."""


class UnquantizedLinearMethod(LinearMethodBase):
    """Of a linear layer that is kept."""

    def create_weights(self, layer: nn.Module, *sizes: Any, **named: Any) -> None:
        """A weight for the sizes that one rank has."""
        rows, columns = sum(named["output_partition_sizes"]), named["input_size_per_partition"]
        layer.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)


class QuantizationConfig:
    """Of a model."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any) -> str | None:
        """Asked of every method for every checkpoint."""
        return None


@dataclass(eq=False)
class Group:
    """The ranks that a layer is divided over; `whole` is what a gather of their inputs gives."""

    rank_in_group: int
    world_size: int
    whole: Tensor | None = None

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """All inputs, of which this rank's is `x`."""
        assert dim == -1
        assert self.whole is not None
        assert torch.equal(self.whole.chunk(self.world_size, -1)[self.rank_in_group], x)
        return self.whole


class LinearBase(nn.Module):
    """A linear layer. SGLang's subclasses set their group before it is made."""

    def __init__(self, input_size: int, output_size: int, config: Any, prefix: str) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.quant_method = config.get_quant_method(self, prefix=prefix)

    def _create(self, columns: int, rows: list[int]) -> None:
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=columns,
            output_partition_sizes=rows,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=torch.float32,
            weight_loader=self._refuse,
        )

    def _refuse(self, *_: Any) -> None:
        raise AssertionError("a packed parameter has a loader of its own")

    def forward(self, x: Tensor) -> Tensor:
        """Without a bias and what ranks exchange afterwards."""
        y: Tensor = self.quant_method.apply(self, x, None)
        return y


class MergedColumnParallelLinear(LinearBase):
    """Several linears of one input, whose rows are divided."""

    def __init__(self, columns: int, rows: list[int], config: Any, prefix: str, group: Any) -> None:
        self.tp_group = group
        super().__init__(columns, sum(rows), config, prefix)
        ranks = 1 if group is None else group.world_size
        self._create(columns, [size // ranks for size in rows])


class QKVParallelLinear(LinearBase):
    """Queries, keys and values; ranks that are more than key heads hold copies of these."""

    def __init__(
        self,
        columns: int,
        head: int,
        heads: tuple[int, int],
        config: Any,
        prefix: str,
        group: Any,
        keys: Any = None,
    ) -> None:
        self.tp_group, self.kv_tp_group = group, keys or group
        ranks = 1 if group is None else group.world_size
        own = heads[0] // ranks, max(1, heads[1] // ranks)
        rows = [own[0] * head, own[1] * head, own[1] * head]
        self.num_kv_head_replicas = max(1, ranks // heads[1])
        super().__init__(columns, sum(rows) * ranks, config, prefix)
        self._create(columns, rows)


class RowParallelLinear(LinearBase):
    """A linear whose columns are divided."""

    def __init__(self, columns: int, rows: int, config: Any, prefix: str, group: Any) -> None:
        self.tp_group = group
        super().__init__(columns, rows, config, prefix)
        self._create(columns // (1 if group is None else group.world_size), [rows])


class VocabParallelEmbedding(nn.Module):
    """An embedding, whose rows are divided and padded."""

    def __init__(self, rows: int, columns: int, config: Any, prefix: str, group: Any) -> None:
        super().__init__()
        rank, ranks = (0, 1) if group is None else (group.rank_in_group, group.world_size)
        padded = -(-rows // PADDING) * PADDING
        share = padded // ranks
        self.org_vocab_size = rows
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=min(rank * share, rows),
            org_vocab_end_index=min((rank + 1) * share, rows),
        )
        self.quant_method = config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            self, columns, [share], columns, padded, params_dtype=torch.float32, weight_loader=None
        )


class LazyMethodMap(Mapping[str, Any]):
    """Names to "module:class"; a class is imported when it is asked for."""

    def __init__(self) -> None:
        self.specs: dict[str, str] = {"fp8": "nowhere:Fp8Config"}

    def __getitem__(self, name: str) -> Any:
        module, _, found = self.specs[name].rpartition(":")
        return getattr(importlib.import_module(module), found)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def install(patch: pytest.MonkeyPatch, *, lazy: bool) -> ModuleType:
    """Let `import sglang...` find these; returns the package with the table of methods."""
    quantization = _module(
        "srt.layers.quantization",
        QUANTIZATION_METHODS=LazyMethodMap() if lazy else {"fp8": object},
        CPU_QUANTIZATION_METHODS=LazyMethodMap() if lazy else {"fp8": object},
    )
    layers = _module("srt.layers", quantization=quantization)
    made = {
        "sglang": ModuleType("sglang"),
        "sglang.srt": _module("srt", layers=layers),
        "sglang.srt.layers": layers,
        "sglang.srt.layers.linear": _module("srt.layers.linear", LinearBase=LinearBase),
        "sglang.srt.layers.quantization": quantization,
        "sglang.srt.layers.quantization.base_config": _module(
            "srt.layers.quantization.base_config",
            QuantizationConfig=QuantizationConfig,
            QuantizeMethodBase=QuantizeMethodBase,
            LinearMethodBase=LinearMethodBase,
        ),
        "sglang.srt.layers.quantization.unquant": _module(
            "srt.layers.quantization.unquant", UnquantizedLinearMethod=UnquantizedLinearMethod
        ),
        "sglang.srt.layers.vocab_parallel_embedding": _module(
            "srt.layers.vocab_parallel_embedding", VocabParallelEmbedding=VocabParallelEmbedding
        ),
    }
    for name, module in made.items():
        patch.setitem(sys.modules, name, module)
    return quantization


def load_weights(
    layers: nn.ModuleDict, names: Mapping[str, str], weights: Mapping[str, Tensor]
) -> None:
    """Hand every tensor to its parameter, as SGLang's Llama does; it leaves out what has none.

    names: of the layers in the model.
    """
    parameters: dict[str, Any] = {
        f"{name}.{key}": value
        for place, name in names.items()
        for key, value in layers[place].named_parameters()
    }
    for name, tensor in weights.items():
        for joined, one, shard in STACKED:
            if one in name:
                target = parameters.get(name.replace(one, joined))
                if target is not None:
                    target.weight_loader(target, tensor, shard)
                break
        else:
            if name in parameters:
                parameters[name].weight_loader(parameters[name], tensor)


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(f"sglang.{name}")
    vars(module).update(names)
    return module
