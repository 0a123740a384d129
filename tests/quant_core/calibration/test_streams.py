"""Hidden states are the same wherever they live, and files leave with their owner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitmill.calibration.streams import HiddenStates
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import parse_config
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from tiny import tiny_llama

SPEC = parse_config({"budget": {"code_bits": 3}})
TOKENS = torch.randint(2, 258, (7, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> StreamedModel:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    folder = tiny_llama(tmp_path_factory.mktemp("model"))
    device = torch.device(request.param)
    return StreamedModel(folder, make_plan(folder, SPEC), device=device, dtype=torch.float32)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_windows_are_embedded_in_any_memory(
    model: StreamedModel, tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitmill.calibration.streams.free_device_bytes", lambda _: 0)
    expected = model.embed(TOKENS).cpu()
    with HiddenStates(model.device, tmp_path, turn=0, host_bytes=limit) as states:
        found = states.embed(model, TOKENS, 3)
        assert found.device.type == "cpu"
        assert found.is_pinned() == (limit > 0 and model.device.type == "cuda")
        assert torch.equal(found, expected)
        assert states.embed(model, TOKENS[:0], 3).shape == (0, 32, model.plan.hidden_size)
        assert len(list(tmp_path.iterdir())) == (limit == 0)
    assert list(tmp_path.iterdir()) == []


def test_an_accelerator_keeps_what_a_turn_takes(
    model: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = TOKENS.numel() * model.plan.hidden_size * model.dtype.itemsize
    monkeypatch.setattr("bitmill.calibration.streams.free_device_bytes", lambda _: 10 * size)
    for turn, stays in ((8 * size, True), (8 * size + 1, False)):
        with HiddenStates(model.device, tmp_path, turn=turn, host_bytes=0) as states:
            states.embed(model, TOKENS, 3)
            assert (list(tmp_path.iterdir()) == []) == stays


def refine(model: StreamedModel, folder: Path, host_bytes: int | None) -> RefinedModel:
    folder.mkdir()
    widths = {shape.name: (3,) * shape.groups for shape in model.plan.shapes}
    calibration = CalibrationSet(TOKENS[:5], TOKENS[5:], "")
    inputs = RefineInputs(calibration, BitWidthMap(linears=widths), {})

    def on_unit(*_: object) -> None:
        assert len(list(folder.glob("block-inputs-*"))) == (host_bytes == 0)

    refine_model(model, inputs, SPEC.method, folder, seed=0, on_unit=on_unit, host_bytes=host_bytes)
    return RefinedModel(folder, model.plan)


def test_refinement_with_streams_in_files_gives_the_same_bytes(
    model: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = refine(model, tmp_path / "memory", None)
    monkeypatch.setattr("bitmill.calibration.streams.free_device_bytes", lambda _: 0)
    spilled = refine(model, tmp_path / "files", 0)
    assert spilled.digest == plain.digest
    assert not list((tmp_path / "files").glob("block-inputs-*"))
