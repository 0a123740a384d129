"""Values on an accelerator that are asked for now and read later.

`tensor.tolist()` waits for all that was launched before it, whenever that was; a copy begun early
is there once the accelerator has passed that point, whatever was launched since.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ReadLater:
    """Begins to copy `values` to the host; `read` waits for this copy alone."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._done = values, None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._done = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> Any:
        """The values as `Tensor.tolist` gives them."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()
