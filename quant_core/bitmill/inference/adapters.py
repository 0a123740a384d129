"""Low-rank adapters (peft) on packed linears.

peft asks for a class of its own for every kind of linear. `register_adapters` names one for packed
linears in every `LoraConfig`, also in those that peft reads back from a saved adapter. Name the
modules in `target_modules`: "all-linear" finds only linears of torch.

An adapter is trained and applied beside the packed weight. It cannot be merged into codes: merge
it into a dequantized copy of the model.
"""

from __future__ import annotations

import warnings
from functools import wraps
from importlib.util import find_spec
from typing import Any

from bitmill.errors import InputError
from bitmill.inference.linear import QuantizedLinear


def register_adapters() -> None:
    """Let peft put LoRA on packed linears; nothing where peft is not installed."""
    if find_spec("peft") is None:
        return
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    class LoraPackedLinear(Linear):
        """LoRA beside a packed linear."""

        def __init__(self, *args: Any, **options: Any) -> None:
            with warnings.catch_warnings():  # peft reads the sizes and doubts the class
                warnings.filterwarnings("ignore", "Unsupported layer type")
                super().__init__(*args, **options)

        def merge(self, *_: Any, **__: Any) -> None:
            """Raises InputError: the sum of codes and adapter has no codes."""
            raise InputError(
                "an adapter cannot be merged into packed codes: keep it beside them, or load the "
                "adapter onto `model.dequantize()` and merge it there",
                code="packed_weight",
                param="merge",
            )

    original = LoraConfig.__post_init__

    @wraps(original)
    def with_packed_linears(config: Any) -> None:
        original(config)
        config._register_custom_module({QuantizedLinear: LoraPackedLinear})

    LoraConfig.__post_init__ = with_packed_linears
