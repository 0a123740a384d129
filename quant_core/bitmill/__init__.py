"""Bitmill: mixed-precision quantization of language models to exactly the size asked for.

Importing this package loads no tensor library; a name loads its module at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "BitWidthMap": "config.bit_width_map",
    "BitmillError": "errors",
    "Budget": "config.quantization",
    "Manifest": "io.manifest",
    "PackedTensor": "quant.tensors",
    "QuantizationConfig": "config.quantization",
    "QuantizedLinear": "inference.linear",
    "QuantizedWeight": "quant.tensors",
    "check_folder": "io.manifest",
    "load": "inference.load",
    "load_tokenizer": "models.tokenizer",
    "read_slim_map": "config.slim_llm",
    "verify_folder": "pipeline.verify",
}

__all__ = [
    "BitWidthMap",
    "BitmillError",
    "Budget",
    "Manifest",
    "PackedTensor",
    "QuantizationConfig",
    "QuantizedLinear",
    "QuantizedWeight",
    "__version__",
    "check_folder",
    "load",
    "load_tokenizer",
    "read_slim_map",
    "verify_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
