"""Bitmill: mixed-precision quantization of language models to exactly the size asked for.

Importing this package loads no tensor library; a name loads its module at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "Allocated": "allocation.profiled",
    "Allocation": "config.quantization",
    "BitWidthMap": "config.bit_width_map",
    "BitmillError": "errors",
    "Budget": "config.quantization",
    "Calibration": "config.quantization",
    "Cancelled": "errors",
    "Evaluation": "config.quantization",
    "GPTQ": "config.methods",
    "Manifest": "io.manifest",
    "OmniQuant": "config.methods",
    "PackedTensor": "quant.tensors",
    "ProfiledModel": "allocation.profiled",
    "Progress": "pipeline.progress",
    "QuantizationConfig": "config.quantization",
    "QuantizedLinear": "inference.linear",
    "QuantizedWeight": "quant.tensors",
    "RTN": "config.methods",
    "Refinement": "config.quantization",
    "Result": "pipeline.result",
    "allocate": "library.profiles",
    "check_folder": "io.manifest",
    "evaluate": "library.evaluate",
    "export": "library.export",
    "load": "inference.load",
    "load_tokenizer": "models.tokenizer",
    "profile": "library.profiles",
    "push": "library.push",
    "quantize": "library.quantize",
    "read_slim_map": "config.slim_llm",
    "refine": "library.quantize",
    "sweep": "library.quantize",
    "verify_folder": "pipeline.verify",
}

__all__ = [
    "GPTQ",
    "RTN",
    "Allocated",
    "Allocation",
    "BitWidthMap",
    "BitmillError",
    "Budget",
    "Calibration",
    "Cancelled",
    "Evaluation",
    "Manifest",
    "OmniQuant",
    "PackedTensor",
    "ProfiledModel",
    "Progress",
    "QuantizationConfig",
    "QuantizedLinear",
    "QuantizedWeight",
    "Refinement",
    "Result",
    "__version__",
    "allocate",
    "check_folder",
    "evaluate",
    "export",
    "load",
    "load_tokenizer",
    "profile",
    "push",
    "quantize",
    "read_slim_map",
    "refine",
    "sweep",
    "verify_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
