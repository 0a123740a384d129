"""Verification passes what was written as computed, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.config.quantization import Budget
from bitmill.errors import VerificationError
from bitmill.formats.accounting import footprint
from bitmill.inference.linear import QuantizedLinear
from bitmill.pipeline.verify import VerifyReport, forward_error, verify_folder
from tiny import tiny_llama
from weights import PackedModel, pack_model, random_weight

DOWN = "model.layers.1.mlp.down_proj"
WIDE = Budget(bits=16)
FRESH = """
import json, sys
from pathlib import Path
from bitmill.plan.model_plan import Plan
from bitmill.config.quantization import Budget
from bitmill.pipeline.verify import verify_folder
given = json.loads(Path(sys.argv[1]).read_text())
plan = Plan.model_validate(given["plan"])
report = verify_folder(Path(given["folder"]), given["codes"], Budget(bits=16), plan,
                       tensor_hashes=given["tensors"])
print(report.model_dump_json())
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("verify")
    return pack_model(tiny_llama(folder / "source"), folder / "packed", order="activation")


def verified(packed: PackedModel, folder: Path | None = None, **changes: Any) -> VerifyReport:
    given = {
        "expected_code_hashes": packed.code_hashes,
        "budget": WIDE,
        "plan": packed.plan,
        "tensor_hashes": packed.tensor_hashes,
    }
    return verify_folder(folder or packed.folder, **(given | changes))


def test_a_sound_folder_passes_with_its_measures(packed: PackedModel) -> None:
    report = verified(packed)
    spent = footprint(packed.plan, packed.map)
    assert report.linears == 14
    assert report.file_bytes == (packed.folder / "model.safetensors").stat().st_size
    assert (report.code_bits, report.bits) == (spent.code_bits, spent.bits)
    assert 0 < report.forward_error["float32"] < 1e-5
    assert 0 < report.forward_error["float16"] < 1e-3


def test_it_runs_in_a_fresh_process(packed: PackedModel, tmp_path: Path) -> None:
    given = {
        "folder": str(packed.folder),
        "codes": packed.code_hashes,
        "tensors": packed.tensor_hashes,
        "plan": packed.plan.model_dump(mode="json"),
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    command = [sys.executable, "-c", FRESH, str(tmp_path / "given.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    assert VerifyReport.model_validate_json(done.stdout) == verified(packed)


@pytest.mark.parametrize("kind", ["code_bits", "bits", "size"])
def test_the_budget_is_met_exactly_or_refused(packed: PackedModel, kind: str) -> None:
    spent = getattr(footprint(packed.plan, packed.map), kind)
    assert verified(packed, budget=Budget(**{kind: spent})).linears == 14
    less = spent - 1 if kind == "size" else spent - 1e-6
    with pytest.raises(VerificationError, match=f"has {kind} .*the budget is"):
        verified(packed, budget=Budget(**{kind: less}))


def damaged(packed: PackedModel, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(packed.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _flip(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name].view(torch.uint8).view(-1)[3].bitwise_xor_(1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_flip(f"{DOWN}.codes_b4_p4"), f"{DOWN}.codes_b4_p4"),
        (_flip(f"{DOWN}.scales"), f"{DOWN}.scales"),
        (_flip(f"{DOWN}.zeros_b4"), f"{DOWN}.zeros_b4"),
        (_flip("model.embed_tokens.weight"), "model.embed_tokens.weight"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.pop(f"{DOWN}.scales"), f"{DOWN}.scales"),
        (lambda t: t.update({"model.norm.weight": torch.ones(160).half()}), "model.norm.weight"),
    ],
    ids=["codes", "scales", "zeros", "embedding", "missing", "extra", "no-scales", "dtype"],
)
def test_one_changed_bit_or_tensor_is_refused_by_name(
    packed: PackedModel, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], name: str
) -> None:
    folder = damaged(packed, tmp_path / "damaged", change)
    with pytest.raises(VerificationError) as refusal:
        verified(packed, folder)
    assert refusal.value.param == name


def test_codes_other_than_those_computed_are_refused(packed: PackedModel) -> None:
    hashes = packed.code_hashes | {DOWN: packed.code_hashes["model.layers.0.mlp.down_proj"]}
    with pytest.raises(VerificationError, match=f"linear {DOWN} has other codes"):
        verified(packed, expected_code_hashes=hashes)


@pytest.mark.parametrize("which", ["expected_code_hashes", "tensor_hashes"])
def test_what_was_not_recorded_does_not_pass(packed: PackedModel, which: str) -> None:
    with pytest.raises(VerificationError):
        verified(packed, **{which: {}})


def test_a_map_that_differs_from_the_config_is_refused(packed: PackedModel, tmp_path: Path) -> None:
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    stored = json.loads((folder / "bit_width_map.json").read_text())
    stored["linears"][DOWN] = stored["linears"][DOWN][::-1]
    (folder / "bit_width_map.json").write_text(json.dumps(stored))
    with pytest.raises(VerificationError, match="give different widths"):
        verified(packed, folder)


def test_a_forward_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_weight(16, 200, (3, 4)).pack()
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    assert forward_error(packed, x) < 1e-5
    right = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: right(self, x) * (1 + 1e-4))
    assert forward_error(packed, x) == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("factor", [6e-8, 1e-6, 3e-5, 1e-3, 1.0, 300.0, 6e4])
def test_tiny_and_huge_outputs_are_judged_as_others(factor: float, dtype: torch.dtype) -> None:
    """fp16 holds numbers from 6e-8 to 65504; what a linear puts out may lie beyond both."""
    plain = random_weight(16, 200, (3, 4))
    scales = (plain.scales.float() * factor).clamp(6e-8, 6e4).half()
    packed = replace(plain, scales=scales).pack()
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert forward_error(packed, x) < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 300.0])
def test_a_wrong_forward_is_seen_at_any_size(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = random_weight(16, 200, (3, 4))
    packed = replace(plain, scales=(plain.scales.float() * factor).half()).pack()
    right = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: right(self, x) * (1 + 1e-2))
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert forward_error(packed, x) == pytest.approx(1e-2, rel=0.2)


def test_an_empty_folder_is_refused(packed: PackedModel, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"config\.json"):
        verified(packed, tmp_path)
