"""Reading tensors of a folder, whole and in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitmill.errors import ModelError
from bitmill.models.reader import CheckpointSource, check_finite, finite
from bitmill.plan.model_plan import PlannedLinear, Source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "plain": torch.randn(4, 6, generator=generator).to(torch.bfloat16),
        "stack": torch.randn(3, 8, 5, generator=generator),
        "count": torch.arange(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_tensors_come_in_their_own_dtype_and_shape(folder: Path) -> None:
    with CheckpointSource(folder) as source:
        assert source.read("plain").dtype == torch.bfloat16
        assert source.read("plain").shape == (4, 6)
        assert source.read("count").tolist() == [0, 1, 2]


def test_parts_and_transposes(folder: Path) -> None:
    source = CheckpointSource(folder)
    plain, stack = source.read("plain"), source.read("stack")
    assert torch.equal(source.read_source(Source(tensor="plain", transposed=True)), plain.T)
    part = source.read_source(Source(tensor="stack", index=2, rows=(4, 8)))
    assert torch.equal(part, stack[2, 4:8])
    assert torch.equal(source.read_source(Source(tensor="stack", index=1)), stack[1])


def test_unknown_tensor_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="no tensor 'other'"):
        CheckpointSource(folder).read("other")


def test_a_closed_source_opens_again(folder: Path) -> None:
    source = CheckpointSource(folder)
    first = source.read("plain")
    source.close()
    assert torch.equal(source.read("plain"), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_rows_are_counted(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(5, 3, dtype=dtype)
    check_finite("w", tensor)
    tensor[1, 2] = tensor[4, 0] = value
    with pytest.raises(ModelError, match=r"w has NaN .* 2 of 5 rows \(first: row 1\)"):
        check_finite("w", tensor)


def test_large_finite_values_are_fine_though_their_sum_overflows() -> None:
    check_finite("w", torch.full((4, 4), 3e38))
    check_finite("w", torch.full((70, 1000), 65504.0, dtype=torch.float16))
    with pytest.raises(ModelError, match=r"1 of 4 rows \(first: row 2\)"):
        check_finite("w", torch.full((4, 4), 3e38).index_fill(0, torch.tensor([2]), torch.inf))
    with pytest.raises(ModelError, match=r"1 of 1 rows"):
        check_finite("w", torch.tensor(float("nan")))


def test_every_tensor_of_a_folder_is_checked(folder: Path, tmp_path: Path) -> None:
    source = CheckpointSource(folder)
    assert {name for name, _ in finite(source, source.headers)} == set(source.headers)
    bad = tmp_path / "bad"
    bad.mkdir()
    save_file(
        {"ok": torch.ones(2), "w": torch.tensor([[1.0], [torch.inf]])}, bad / "model.safetensors"
    )
    with pytest.raises(ModelError, match="row 1") as caught:
        list(finite(CheckpointSource(bad), CheckpointSource(bad).headers))
    assert caught.value.param == "w"
    assert [name for name, _ in finite(CheckpointSource(bad), ["ok"])] == ["ok"]
    linear = PlannedLinear(
        name="w", block=0, rows=2, columns=1, dtype="F32", source=Source(tensor="w")
    )
    with pytest.raises(ModelError, match="row 1"):
        CheckpointSource(bad).weight(linear)
