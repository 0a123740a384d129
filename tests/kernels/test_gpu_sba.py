"""Divergences and a whole SBA search on a CUDA device against plain torch on the CPU."""

import numpy as np
import pytest
import torch

from bitmill.sensitivity.sba import SbaInput, SbaSearch
from bitmill_kernels.divergence.divergence import divergence
from divergences import CASES, case, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("N", [1, 300, 4096, 11008])
@pytest.mark.parametrize("kind", CASES)
def test_divergences_are_those_of_the_definition(N, kind):
    y, d = case(kind, 37, N)
    found = divergence(torch.log_softmax(y, 1).cuda(), d.cuda())
    assert torch.allclose(found.double().cpu(), exact(y, d), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_search_finds_the_divergences_of_the_cpu(dtype):
    generator = torch.Generator().manual_seed(3)
    W = (0.05 * torch.randn(300, 700, generator=generator)).to(dtype).float()
    x = torch.randn(500, 700, generator=generator).to(dtype)
    bias = torch.randn(300, generator=generator)
    order = torch.randperm(700, generator=generator)
    H = x.float().T @ x.float() / len(x)
    records = []
    for device in ("cpu", "cuda"):
        shared = SbaInput.prepare(H.to(device), order.to(device))
        search = SbaSearch(W.to(device), shared, 3, bias=bias.to(device), dtype=dtype)
        for part in x.to(device).split(300):
            search.add(part)
        records.append(search.record())
    assert records[0].salience.tolist() == records[1].salience.tolist()
    assert np.allclose(records[0].kl, records[1].kl, rtol=5e-3)
