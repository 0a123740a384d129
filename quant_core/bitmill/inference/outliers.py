"""What outlier columns add to a packed linear's product: a dense product of a few inputs.

y[..., n] += sum_j x[..., column_j] * value[n, j]
"""

from __future__ import annotations

import torch
from torch import Tensor


class OutlierProduct:
    """The outlier columns of one linear on one device.

    columns: i32 [k], packed ones where there is an `order` i32 [K], else the source's. values: f16
    [N, k].
    """

    def __init__(
        self, columns: Tensor, values: Tensor, order: Tensor | None, device: torch.device
    ) -> None:
        columns = columns.long()
        inputs = columns if order is None else order[columns.to(order.device)].long()
        self.device, self.inputs, self.values = device, inputs.to(device), values.to(device)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., N] of x [..., K] with what the outliers make of x; in the dtype of x."""
        return y + x.index_select(-1, self.inputs) @ self.values.to(x.dtype).T
