import hashlib
from dataclasses import replace

import pytest
import torch

from bitmill.errors import FormatError
from bitmill.quant.rewrites import ColumnOrder, Rewrites
from bitmill.quant.rotation import Rotation
from bitmill.quant.trellis import TrellisTensor, trellis_shapes


def random_tensor(N=37, K=300, widths=(3, 7, 2), seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for key, (dtype, shape) in trellis_shapes(N, K, widths).items():
        octets = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        made[f"x.{key}"] = octets if dtype == torch.uint8 else octets.half() / 256
    rewrites = Rewrites([ColumnOrder(torch.randperm(K, generator=draw).int()), Rotation()])
    return TrellisTensor.from_tensors("x", made, N, K, widths, rewrites)


def test_tensors_are_read_back():
    weight = random_tensor()
    again = TrellisTensor.from_tensors(
        "x", weight.tensors("x"), 37, 300, weight.widths, weight.rewrites
    )
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.codes_sha256() == hashlib.sha256(weight.codes.numpy().tobytes()).hexdigest()


def test_weights_are_values_times_both_scales_rotated_back():
    weight = random_tensor()
    plain = replace(
        weight,
        row_scales=torch.ones_like(weight.row_scales),
        group_scales=torch.ones_like(weight.group_scales),
    ).packed_values()
    per_column = weight.group_scales.float().repeat_interleave(128)[:300]
    expected = weight.row_scales.float()[:, None] * plain * per_column
    torch.testing.assert_close(weight.packed_values(), expected)
    torch.testing.assert_close(weight.rewrites.weights(weight.dequantize()), expected)


def test_groups_of_one_rate_keep_their_sequence():
    weight = random_tensor(K=512, widths=(2, 3, 2, 3))
    values = weight.packed_values()
    swapped = {k: v.flip(0) if k == "codes_r2" else v for k, v in weight.circles.items()}
    other = replace(
        weight, circles=swapped, group_scales=weight.group_scales[[2, 1, 0, 3]]
    ).packed_values()
    assert torch.equal(other[:, :128], values[:, 256:384])
    assert torch.equal(other[:, 128:256], values[:, 128:256])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("x.codes_r7"), r"x\.codes_r7 is missing"),
        (lambda t: t.update({"x.row_scales": -t["x.row_scales"]}), r"x\.row_scales holds -"),
        (lambda t: t.update({"x.group_scales": t["x.group_scales"][:2]}), r"x\.group_scales is"),
        (lambda t: t.update({"x.codes_tail": t["x.codes_tail"].half()}), r"x\.codes_tail is"),
    ],
)
def test_illegal_tensors_are_refused_by_name(change, message):
    weight = random_tensor()
    tensors = weight.tensors("x")
    change(tensors)
    with pytest.raises(FormatError, match=message):
        TrellisTensor.from_tensors("x", tensors, 37, 300, weight.widths, weight.rewrites)


def test_rows_cannot_change_places():
    weight = random_tensor()
    assert weight.with_rows(torch.arange(37)) is weight
    with pytest.raises(FormatError, match="cannot change places"):
        weight.with_rows(torch.arange(37).flip(0))
