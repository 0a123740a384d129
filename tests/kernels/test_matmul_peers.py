"""How `benchmarks/matmul_peers.py` tells right peers from wrong and absent ones; what it packs."""

from __future__ import annotations

import ctypes
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
PACKAGES = {
    "humming": "humming",
    "gemlite": "gemlite",
    "exl2": "exllamav2",
    "exl3": "exllamav3",
    "marlin": "gptqmodel",
    "marlin symmetric": "gptqmodel",
}
"""By what peers are called in errors."""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("EXL2", "EXL3", "MARLIN"):
        monkeypatch.delenv(f"BITMILL_{name}_LIBRARY", raising=False)
    return importlib.import_module("matmul_peers")


@pytest.fixture
def on_cpu(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(peers, "DEVICE", CPU)
    return peers


def plain(call: Callable[[], Tensor]) -> Tensor:
    """In place of a graph, where there is no GPU."""
    return call()


def test_products_that_fail_or_are_wrong_are_named_by_their_tokens(on_cpu: ModuleType) -> None:
    weight = torch.randn(48, 64)

    def product(x: Tensor) -> Tensor:
        if len(x) == 8:
            raise TypeError("no kernel\n  of 8 tokens")
        y = x @ weight.half().T
        return y.add(1) if len(x) >= 32 else y

    peer = on_cpu.Peer("one", [product], lambda: weight, most_tokens=100)
    found = on_cpu.faults(peer, 64, [1, 8, 32, 64, 128], plain)
    assert found.keys() == {8, 32, 64}
    assert found[8] == "TypeError: no kernel of 8 tokens"
    assert found[32].startswith("relative error ")
    assert on_cpu.faults(peer, 64, [128], plain) == {}


def test_a_product_of_not_a_number_is_wrong(on_cpu: ModuleType) -> None:
    weight = torch.randn(48, 64)
    peer = on_cpu.Peer("one", [lambda x: (x @ weight.half().T) * torch.nan], lambda: weight)
    assert on_cpu.faults(peer, 64, [4], plain).keys() == {4}


def test_what_a_graph_writes_is_checked_and_why_there_is_none_is_named(on_cpu: ModuleType) -> None:
    weight = torch.randn(48, 64)

    def left_out_or_refused(call: Callable[[], Tensor]) -> Tensor:
        y = call().fill_(torch.nan)
        if len(y) == 8:
            raise RuntimeError("in a CUDA graph: not permitted (900)")
        return y

    peer = on_cpu.Peer("one", [lambda x: x @ weight.half().T], lambda: weight)
    assert on_cpu.faults(peer, 64, [4, 8], plain) == {}
    found = on_cpu.faults(peer, 64, [4, 8], left_out_or_refused)
    assert found[4].startswith("relative error nan")
    assert found[8] == "RuntimeError: in a CUDA graph: not permitted (900)"


@pytest.mark.parametrize(("bits", "without"), [(4, set()), (3, {"gemlite", "marlin"})])
def test_peers_that_are_not_there_are_named_with_the_reason(
    on_cpu: ModuleType, bits: int, without: set[str]
) -> None:
    found, absent = on_cpu.peers(256, 256, bits, [bits, bits], 1)
    expected = {name for name in PACKAGES if name.split()[0] not in without}
    assert expected <= absent.keys() <= {*expected, "tinygemm"}
    assert {peer.name for peer in found} <= {"tinygemm 4-bit"}
    for name in expected & {"exl3", "marlin"}:
        assert PACKAGES[name] in absent[name]
        assert "is not on the path: " in absent[name]
    versions = on_cpu.versions()
    assert versions.keys() == {"humming-kernels", *PACKAGES.values()} - {"humming"}
    assert all(text.startswith("absent, ") for text in versions.values())


def test_absent_peers_are_rows_of_the_result(peers: ModuleType) -> None:
    matmul = importlib.import_module("matmul")
    rows = matmul.absent_rows("4-bit", {"one": "no nvcc"}, {"two": {}, "three": {8: "wrong"}})
    assert rows == [
        {"case": "4-bit", "peer": "one", "tokens": "all", "reason": "no nvcc"},
        {"case": "4-bit", "peer": "three", "tokens": 8, "reason": "wrong"},
    ]
    text = matmul.markdown({"provenance": {"gpu": "one"}, "batch": [], "absent": rows})
    assert "| 4-bit | three | 8 | wrong |" in text


def test_what_there_is_of_a_result_is_written(peers: ModuleType, tmp_path: Path) -> None:
    matmul = importlib.import_module("matmul")
    result = {"provenance": {"gpu": "one"}, "batch": []}
    for case in ("first", "second"):
        result["batch"].append({"case": case})
        text = matmul.write(result, tmp_path / "made" / "matmul-one")
        assert json.loads((tmp_path / "made" / "matmul-one.json").read_text()) == result
        assert f"| {case} |" in text
        assert (tmp_path / "made" / "matmul-one.md").read_text() == text + "\n"


def test_scales_and_zero_points_lie_in_marlins_order(peers: ModuleType) -> None:
    marlin = peers.marlin_kernels
    scales = torch.arange(128 * 3).view(128, 3)
    found = marlin.scales_in_order(scales)
    for group, row, place in ((0, 0, 0), (1, 8, 1), (2, 1, 8), (0, 63, 63), (1, 64 + 17, 64 + 10)):
        assert found[group, place] == scales[row, group]
    zeros = torch.randint(0, 16, (128, 3), dtype=torch.uint8)
    nibbles = [
        (marlin.packed_zeros(zeros) >> shift & 15).unsqueeze(-1) for shift in range(0, 32, 4)
    ]
    places = torch.cat(nibbles, -1).view(3, 16, 8)
    eights = marlin.scales_in_order(zeros).view(3, 16, 8)
    assert torch.equal(places[..., :4], eights[..., 0::2].int())
    assert torch.equal(places[..., 4:], eights[..., 1::2].int())


def test_a_weight_in_the_original_basis_multiplies_as_rotated_inputs_and_outputs(
    peers: ModuleType,
) -> None:
    def rotated(x: Tensor) -> Tensor:
        blocks = x.view(-1, 128)
        for half in (1, 2, 4, 8, 16, 32, 64):
            pairs = blocks.view(len(blocks), -1, 2, half)
            blocks = torch.stack(
                [pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2
            )
        return blocks.reshape(x.shape) / 128**0.5

    torch.manual_seed(0)
    x, W = torch.randn(5, 256), torch.randn(256, 384)
    suh, svh = torch.randn(256), torch.randn(384)
    exact = rotated(rotated(x * suh) @ W) * svh
    found = x @ peers.exl3_kernels.in_original_basis(W, suh, svh)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiled by nvcc: not on this machine")
def test_what_a_check_said_is_raised_and_sources_that_do_not_compile_are_refused(
    tmp_path: Path, peers: ModuleType
) -> None:
    library = importlib.import_module("peer_library")
    (tmp_path / "one.cu").write_text(
        "#include <ATen/ATen.h>\n"
        'extern "C" const char* checked(int K) {\n'
        '    return said(nullptr, [&] { TORCH_CHECK(K % 16 == 0, "K is ", K) });\n'
        "}\n"
    )
    made = library.compiled(tmp_path / "one.so", [tmp_path / "one.cu"], library.STAND_IN, [])
    checked = ctypes.CDLL(str(made)).checked
    checked.restype = ctypes.c_char_p
    with pytest.raises(RuntimeError, match=r"K % 16 == 0 does not hold\. K is 17"):
        library.check(checked(17))
    (tmp_path / "one.cu").write_text("nonsense")
    with pytest.raises(RuntimeError, match=r"one\.cu"):
        library.compiled(tmp_path / "two.so", [tmp_path / "one.cu"], library.STAND_IN, [])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiled by nvcc: not on this machine")
def test_empty_tensors_of_the_stand_in_free_nothing(tmp_path: Path, peers: ModuleType) -> None:
    library = importlib.import_module("peer_library")
    (tmp_path / "one.cu").write_text(
        "#include <cuda_runtime.h>\n"
        "#include <cstdlib>\n"
        "static int frees;\n"
        "static cudaError_t on_host(void** at, size_t n) { *at = malloc(n); return cudaSuccess; }\n"
        "static cudaError_t counted(void* at) { frees++; free(at); return cudaSuccess; }\n"
        "#define cudaMalloc on_host\n"
        "#define cudaFree counted\n"
        "#include <ATen/ATen.h>\n"
        'extern "C" int freed(int K) { { at::Tensor made = at::empty({K}); } return frees; }\n'
    )
    made = library.compiled(tmp_path / "one.so", [tmp_path / "one.cu"], library.STAND_IN, [])
    freed = ctypes.CDLL(str(made)).freed
    assert [freed(0), freed(3), freed(0)] == [0, 1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_call_that_is_none_for_a_graph_is_refused_and_harms_no_later_one(
    peers: ModuleType,
) -> None:
    trial = importlib.import_module("trial_graph")
    x = torch.randn(64, 64, device="cuda")

    def waits() -> Tensor:
        y = x @ x
        torch.cuda.synchronize()
        return y

    def elsewhere() -> Tensor:
        y = torch.empty_like(x)
        with torch.cuda.stream(torch.cuda.default_stream()):
            return y.copy_(x)

    before = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="captur"):
            trial.replayed(waits)
        assert torch.cuda.current_stream() == before
        assert trial.replayed(elsewhere).isnan().all()
        torch.testing.assert_close(trial.replayed(lambda: x @ x), x @ x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.rand_like(x) + 1
    graph.replay()
    assert (y >= 1).all()
    assert torch.rand_like(x).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_peers_that_are_there_are_right(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    peers = importlib.import_module("matmul_peers")
    found, absent = peers.peers(512, 1024, bits, [bits] * 8, 1)
    if not found:
        pytest.skip(str(absent))
    for peer in found:
        assert peers.faults(peer, 1024, [1, 3, 20, 70, 200, 1100]) == {}, peer.name
