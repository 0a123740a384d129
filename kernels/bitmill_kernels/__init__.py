"""Tensor kernels of Bitmill: packing, mixed-width matmul, GPTQ inner loop, Hessian accumulation.

Everything here works on plain tensors and integers and knows nothing of models, jobs or files.
Each fast operation has an obvious twin in `bitmill_kernels.reference`.

Importing this package loads neither torch nor triton; a name loads its module at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "GROUP_SIZE": "layout",
    "PLANES": "layout",
    "WIDTHS": "layout",
    "code_tensor_shapes": "layout",
    "group_columns": "layout",
    "group_count": "layout",
    "zero_bits": "layout",
    "zero_tensor_shapes": "layout",
    "pack_codes": "pack",
    "pack_zeros": "pack",
    "unpack_codes": "pack",
    "unpack_zeros": "pack",
    "dequantize": "reference",
    "gptq_block": "gptq.block",
    "hessian_update": "linalg.hessian",
    "resolve_backend": "backend",
}

__all__ = [
    "GROUP_SIZE",
    "PLANES",
    "WIDTHS",
    "code_tensor_shapes",
    "dequantize",
    "gptq_block",
    "group_columns",
    "group_count",
    "hessian_update",
    "pack_codes",
    "pack_zeros",
    "resolve_backend",
    "unpack_codes",
    "unpack_zeros",
    "zero_bits",
    "zero_tensor_shapes",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
