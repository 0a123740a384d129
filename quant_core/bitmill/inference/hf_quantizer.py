"""Packed checkpoints in transformers: `import bitmill.hf`, then `from_pretrained` as usual.

transformers finds quantizers in a registry and has no entry point for packages, so this module
registers one when it is imported. Without the import transformers only warns and fills every
quantized linear with random numbers; `bitmill.load` imports it and refuses such a model.

transformers would leave memory as it is where a packed tensor is missing, so the headers of a
checkpoint are held against the model first.

Loading replaces each linear named in `quantization_config` by an empty `QuantizedLinear` on the
meta device (the input embedding by a `QuantizedEmbedding`, a head tied to it by a `TiedHead`), lets
transformers read the tensors, then hands out the shared column orders. Where peft is installed, its
LoRA knows packed linears from then on (`adapters.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitmill.config.bit_width_map import LinearShape
from bitmill.errors import FormatError
from bitmill.formats.packed.checkpoint import PackedCheckpoint
from bitmill.formats.packed.config import QUANT_METHOD, PackedConfig, PackedLinear, require_affine
from bitmill.inference.adapters import register_adapters
from bitmill.inference.embedding import QuantizedEmbedding, ScaledEmbedding, TiedHead
from bitmill.inference.linear import QuantizedLinear, join_siblings
from bitmill.io.safetensors import read_header
from bitmill.models.dtypes import as_dtype
from bitmill.models.experts import unfuse_experts
from bitmill.plan.architectures import HEAD, architecture
from bitmill.quant.tensors import KINDS
from bitmill.registry import load_object

register_adapters()


@register_quantization_config(QUANT_METHOD)
class BitmillConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model; its attributes are exactly the stored keys."""

    def __init__(self, **stored: Any) -> None:
        self.__dict__.update(PackedConfig.from_dict(stored).to_dict())

    def packed(self) -> PackedConfig:
        """The checked, typed form."""
        return PackedConfig.from_dict(self.to_dict())


@register_quantizer(QUANT_METHOD)
class BitmillQuantizer(HfQuantizer):
    """Swaps linears for `QuantizedLinear`; only packed checkpoints can be loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        self._renames = architecture(model.config.model_type).renames
        if self._has_experts():
            unfuse_experts(model)
        modules, packed = dict(model.named_modules()), self.quantization_config.packed()
        stored = _stored(packed, checkpoint_files)
        for linear in packed.linears.values():
            if _lies_in_absent_head(linear.name, model):
                continue
            name = local_name(linear.name, model)
            module = modules.get(name)
            if stored is not None and isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                stored.check_linear(LinearShape(linear.name, *_rows_columns(module)), linear)
            if module is not None and module is model.get_input_embeddings():
                _replace_embedding(model, name, module, linear, dtype)
            elif isinstance(module, nn.Linear | Conv1D):
                kind = load_object(KINDS[linear.code].module)
                model.set_submodule(name, _empty_twin(kind, module, linear, dtype))
            else:
                raise FormatError(
                    f"linear {linear.name} of the checkpoint is not in the model "
                    f"{type(model).__name__}: load it with the class it was made from",
                    param=linear.name,
                )
        _forget_ties(model)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        for linear in self.quantization_config.packed().linears.values():
            if linear.order is not None and not linear.owns_order:
                order = model.get_buffer(local_name(linear.order, model))
                module = model.get_submodule(local_name(linear.name, model))
                module.share_order(order.to(next(module.buffers()).device))
        join_siblings(quantized_linears(model).items())
        if self._has_experts() or isinstance(model.get_input_embeddings(), QuantizedEmbedding):
            # Saving would undo the renamings of loading, and so part packed tensors from the
            # names in config.json.
            model._weight_conversions = []
        return model

    def update_weight_conversions(self, weight_conversions: Any, *model: PreTrainedModel) -> Any:
        """Those of transformers, but experts are read one by one: kept ones lie as linears here.

        model: older transformers, as those beside vLLM and SGLang (5.19), name none.
        """
        found = super().update_weight_conversions(weight_conversions, *model)
        if not self._has_experts() or not self._renames:
            return found
        plain = [one for one in found if isinstance(one, WeightRenaming)]
        named = [one for one in self._renames if "experts" in one[0]]
        return plain + [WeightRenaming(*one) for one in named]

    def _has_experts(self) -> bool:
        return any(".experts." in name for name in self.quantization_config.linears)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> Any:
        target = as_dtype(dtype or torch.float32)
        head = model.get_output_embeddings()
        for name, module in quantized_linears(model).items():
            if not isinstance(module, QuantizedEmbedding):
                model.set_submodule(name, _plain_linear(module, target))
                continue
            embedding = _plain_embedding(module, target)
            model.set_submodule(name, embedding)
            if isinstance(head, TiedHead):
                model.set_output_embeddings(_tied_linear(embedding, head.bias))
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors back, byte for byte."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes cannot be trained."""
        return False


def _stored(packed: PackedConfig, files: Sequence[str] | None) -> PackedCheckpoint | None:
    """The headers of the files that are loaded; None where tensors come from elsewhere."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        return None
    headers = {name: info for file in files for name, info in read_header(Path(file)).items()}
    return PackedCheckpoint(Path(files[0]).parent, headers, packed)


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The packed linears of a model by their module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def local_name(name: str, model: PreTrainedModel) -> str:
    """A name of the checkpoint as the model has it: a headless base model lacks the prefix."""
    prefix = f"{model.base_model_prefix}."
    headless = model.base_model_prefix and not hasattr(model, model.base_model_prefix)
    return name.removeprefix(prefix) if headless else name


def _lies_in_absent_head(name: str, model: PreTrainedModel) -> bool:
    """Whether the checkpoint's module is the head, which a headless base model does not have."""
    return local_name(name, model) == name == HEAD and model.get_output_embeddings() is None


def _replace_embedding(
    model: PreTrainedModel,
    name: str,
    module: nn.Embedding,
    linear: PackedLinear,
    dtype: torch.dtype | None,
) -> None:
    """Put an empty packed embedding in place, and a tied head where the head is tied to it."""
    require_affine(linear)
    try:
        packed = QuantizedEmbedding(
            module.embedding_dim,
            module.num_embeddings,
            linear.widths,
            dtype=dtype,
            device="meta",
            multiplier=getattr(module, "scalar_embed_scale", None),
        )
    except ValueError as error:
        raise FormatError(f"embedding {linear.name}: {error}", param=linear.name) from error
    head = model.get_output_embeddings()
    tied = f"{name}.weight" in model.all_tied_weights_keys.values()
    model.set_submodule(name, packed)
    if tied and isinstance(head, nn.Linear):
        model.set_output_embeddings(TiedHead(packed, head.bias))


def _forget_ties(model: PreTrainedModel) -> None:
    """Keep transformers from tying parameters that packed modules do not have."""
    if isinstance(model.get_input_embeddings(), QuantizedEmbedding):
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}


def _plain_embedding(module: QuantizedEmbedding, dtype: torch.dtype) -> ScaledEmbedding:
    embedding = ScaledEmbedding(module.out_features, module.in_features, device="meta")
    embedding.multiplier = module.multiplier
    embedding.weight = nn.Parameter(module.dequantize().to(dtype), requires_grad=False)
    return embedding


def _tied_linear(embedding: nn.Embedding, bias: nn.Parameter | None) -> nn.Linear:
    rows, columns = embedding.weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = embedding.weight
    linear.register_parameter("bias", bias)
    return linear


def _rows_columns(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear or embedding; a Conv1D holds its weight transposed."""
    first, second = cast(Tensor, module.weight).shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def _empty_twin(
    kind: type[QuantizedLinear],
    module: nn.Linear | Conv1D,
    linear: PackedLinear,
    dtype: torch.dtype | None,
) -> QuantizedLinear:
    rows, columns = _rows_columns(module)
    order = None
    if linear.order is not None:
        order = "own" if linear.owns_order else "shared"
    try:
        return kind(
            columns,
            rows,
            linear.widths,
            bias=module.bias is not None,
            order=order,
            outliers=linear.outliers,
            dtype=dtype,
            device="meta",
        )
    except ValueError as error:
        raise FormatError(f"linear {linear.name}: {error}", param=linear.name) from error


def _plain_linear(module: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(
        module.in_features, module.out_features, bias=module.bias is not None, device="meta"
    )
    linear.weight = nn.Parameter(module.dequantize().to(dtype), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return linear
