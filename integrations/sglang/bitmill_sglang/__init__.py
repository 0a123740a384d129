"""SGLang plug-in: `quant_method: bitmill` becomes a quantization method of SGLang.

SGLang calls `register` through the entry point group `sglang.srt.plugins` in every process that it
starts, before it reads a model's configuration. It has no function that registers a method. Up to
0.5.23 its methods are a dictionary of classes; later they are a mapping of names to "module:class",
`specs`, of which classes are imported when they are asked for. SGLang logs what a plug-in raises
and goes on; it then refuses the checkpoint, whose method it does not know.
"""

from __future__ import annotations


def register() -> None:
    """Register once per process; a further call does nothing."""
    from sglang.srt.layers import quantization

    # On a CPU with AMX the second table is asked too.
    for methods in (quantization.QUANTIZATION_METHODS, quantization.CPU_QUANTIZATION_METHODS):
        if "bitmill" in methods:
            continue
        if hasattr(methods, "specs"):
            methods.specs["bitmill"] = "bitmill_sglang.config:BitmillConfig"
        else:
            from bitmill_sglang.config import BitmillConfig

            methods["bitmill"] = BitmillConfig
