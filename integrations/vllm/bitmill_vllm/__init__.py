"""vLLM plug-in: `quant_method: bitmill` becomes a quantization method of vLLM.

vLLM calls `register` through the entry point group `vllm.general_plugins` in every process that
it starts: server, engine core, workers, and the one that inspects model classes.
"""

from __future__ import annotations


def register() -> None:
    """Register once per process; a further call does nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if "bitmill" not in QUANTIZATION_METHODS:
        import bitmill_vllm.config  # noqa: F401
