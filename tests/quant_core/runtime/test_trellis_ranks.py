"""Trellis codes by several ranks, which divide tiles: real processes over gloo, or on GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from bitmill.calibration.kept_weights import KeptWeights
from bitmill.errors import ResourceError
from bitmill.quant.tensors import Quantized
from bitmill.refinement.model import WEIGHTS_NAME, RefinedModel
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.solvers.solver import Correction, Linear
from bitmill.solvers.trellis import TrellisSolver
from bitmill_kernels.trellis.layout import TILE
from rank_function import on_ranks
from ranks_job import assert_near, bytes_of, ranks_job
from tiny import tiny_llama

SIBLINGS = {"a": (57, (2, 3, 2)), "b": (40, (3, 3, 4)), "c": (7, (2, 4, 1))}
"""Rows and rates of linears of 272 columns: four tiles, three and one, the last ones not full."""


def solved_siblings(group: Ranks, device: str) -> dict[str, Quantized]:
    """`SIBLINGS`, of which the ranks solve their tiles, with corrections that win."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(900, 272, generator=draw) * torch.exp(torch.randn(272, generator=draw))
    H, linears = (x.T @ x / 900).to(device), []
    for name, (N, widths) in SIBLINGS.items():
        W = torch.randn(N, 272, generator=draw) * torch.rand(N, 1, generator=draw)
        part = group.part(N, unit=TILE)
        own = W[part].to(device)

        def judge(candidate: Tensor, own: Tensor = own) -> Tensor:
            R = candidate - 1.3 * own
            return ((R @ H) * R).sum(dtype=torch.float64)

        correction = Correction(0.3 * own @ H, torch.arange(len(own), device=device), judge)
        linears.append(Linear(name, own, widths, correction))
    solved = TrellisSolver().solve(linears, H, group)
    results = {result.name: result for _, result in solved.read(group)}
    assert all(result.asymmetric for result in results.values())
    found = zip(SIBLINGS.items(), solved.weights, strict=True)
    return {name: weight.gathered(group, N) for (name, (N, _)), weight in found}


def tensors_of(weights: dict[str, Quantized]) -> dict[str, Tensor]:
    return {
        key: tensor.cpu()
        for name, weight in weights.items()
        for key, tensor in weight.pack().tensors(name).items()
    }


def solve_siblings(group: Ranks, out: str, device: str = "cpu") -> None:
    found = tensors_of(solved_siblings(group, device))
    Path(out, f"{group.rank}.safetensors").write_bytes(safetensors.torch.save(found))


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("count", [1, 16, 17, 57, 400])
def test_parts_are_whole_units_and_take_everything_once(size: int, count: int) -> None:
    parts = [Ranks(rank, size).part(count, unit=TILE) for rank in range(size)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert all(part.start % TILE == 0 or part.start == count for part in parts)
    assert parts[0].stop == max(part.stop - part.start for part in parts)


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_find_the_codes_and_scales_of_one(tmp_path: Path, size: int) -> None:
    """Of two ranks one has no row of the last linear, of five one has none of any."""
    on_ranks(size, solve_siblings, tmp_path)
    expected = tensors_of(solved_siblings(SINGLE, "cpu"))
    for rank in range(size):
        found = safetensors.torch.load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values of a single tile, 250 rows in sixteen."""
    changes = {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 250}
    return tiny_llama(tmp_path_factory.mktemp("model"), **changes)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RefinedModel]:
    out = tmp_path_factory.mktemp("alone")
    return out, ranks_job(model, out, code="trellis")


def job(group: Ranks, model: str, out: str, die: str | None = None) -> None:
    ranks_job(Path(model), Path(out), group, None if die is None else int(die), code="trellis")


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks make undisturbed."""
    out = tmp_path_factory.mktemp("pair")
    on_ranks(2, job, model, out)
    return out


def assert_like_one_rank(out: Path, alone: tuple[Path, RefinedModel]) -> None:
    """The same orders and nearly the same weights of tokens, costs and first codes; sums over
    tokens are rounded otherwise, which grows from block to block."""
    folder, one = alone
    for mine, other in assert_near(out, alone, costs=1e-3, codes=0.95):
        assert mine.relative_error == pytest.approx(other.relative_error, rel=0.05), mine.name
    files = [at / "refine" / WEIGHTS_NAME for at in (out, folder)]
    weights, expected = map(safetensors.torch.load_file, files)
    assert weights.keys() == expected.keys()
    loaded = KeptWeights(out / "weights", "these windows").load(one.plan.block_count)
    assert loaded is not None
    kept = loaded.tensors()
    assert kept.keys() == weights.keys()
    for name, weight in expected.items():
        assert torch.equal(kept[name], weights[name][: len(kept[name])])
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.e2e
def test_two_ranks_do_what_one_does_and_repeat_it_byte_for_byte(
    model: Path, alone: tuple[Path, RefinedModel], pair: Path, tmp_path: Path
) -> None:
    assert_like_one_rank(pair, alone)
    on_ranks(2, job, model, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(pair)


@pytest.mark.e2e
def test_three_ranks_with_fewer_tiles_and_held_out_windows_than_ranks(
    model: Path, alone: tuple[Path, RefinedModel], tmp_path: Path
) -> None:
    on_ranks(3, job, model, tmp_path)
    assert_like_one_rank(tmp_path, alone)


@pytest.mark.e2e
def test_the_next_run_goes_on_at_the_last_finished_block_with_the_weights_of_the_first(
    model: Path, pair: Path, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match="rank 1 of 2 was ended by signal 9"):
        on_ranks(2, job, model, tmp_path, 1)
    kept = [tmp_path / "refine" / name for name in (WEIGHTS_NAME, "block-00000.safetensors")]
    written = [file.stat().st_mtime_ns for file in kept]
    on_ranks(2, job, model, tmp_path)
    assert [file.stat().st_mtime_ns for file in kept] == written
    assert bytes_of(tmp_path) == bytes_of(pair)


def gpu_job(group: Ranks, model: str, out: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ranks_job(Path(model), Path(out), group, code="trellis", device=device)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_leave_the_errors_of_one_and_repeat_every_byte(
    model: Path, tmp_path: Path
) -> None:
    """Products of other row counts may round otherwise, so codes are not held to one GPU's."""
    folders = [tmp_path / name for name in ("solved", "solved-again", "job", "job-again", "alone")]
    for folder in folders:
        folder.mkdir()
    for folder in folders[:2]:
        on_ranks(2, solve_siblings, folder, "cuda", device="cuda")
    ranks = [folder / f"{rank}.safetensors" for folder in folders[:2] for rank in (0, 1)]
    assert len({file.read_bytes() for file in ranks}) == 1
    found, expected = safetensors.torch.load_file(ranks[0]), solved_siblings(SINGLE, "cuda:0")
    for name, weight in expected.items():
        several = type(weight).from_tensors(name, found, weight.N, weight.K, weight.widths)
        whole = weight.packed_values().cpu()
        apart = several.packed_values() - whole
        assert apart.square().mean() < 0.01 * whole.square().mean()
    for folder in folders[2:4]:
        on_ranks(2, gpu_job, model, folder, device="cuda")
    assert bytes_of(folders[2]) == bytes_of(folders[3])
    one = ranks_job(model, folders[4], code="trellis", device=torch.device("cuda", 0))
    several = RefinedModel(folders[2] / "refine", one.plan)
    for mine, other in zip(several.reports()[0], one.reports()[0], strict=True):
        assert (mine.name, mine.tokens) == (other.name, other.tokens)
        assert mine.relative_error == pytest.approx(other.relative_error, rel=0.1), mine.name
