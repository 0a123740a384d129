"""The code of docs/extending_inside.md: its architecture on a tiny model, its kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitmill.config.quantization import parse_config
from bitmill.errors import ModelError
from bitmill.models.skeleton import build_skeleton, skeleton_parameters
from bitmill.models.streamed import StreamedModel
from bitmill.plan import architectures, parameters
from bitmill.plan.model_plan import make_plan
from tiny import VOCABULARY, save_tiny
from tiny_architectures import COMMON, COVERED, GROUPED, tiny_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending_inside.md"
CODE = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL))
SPEC = parse_config({"budget": {"code_bits": 3}})


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model of the page's architecture, which is declared as the page says."""
    written = dict(vars(parameters))
    exec(CODE["quant_core/bitmill/plan/parameters.py"], written)  # noqa: S102
    name, covered = eval(CODE["tests/tiny_architectures.py"], {"GROUPED": GROUPED})
    monkeypatch.setitem(COVERED, name, covered)
    folder = save_tiny(tmp_path / name, tiny_config(name))
    with pytest.raises(ModelError, match=f"'{name}' is not supported"):
        make_plan(folder, SPEC)
    declared = eval(
        CODE["quant_core/bitmill/plan/architectures.py"],
        {"Architecture": architectures.Architecture, "parameters": SimpleNamespace(**written)},
    )
    monkeypatch.setitem(architectures.ARCHITECTURES, name, declared)  # type: ignore[call-overload]
    return folder


def test_the_architecture_is_that_of_transformers(source: Path) -> None:
    declared = architectures.ARCHITECTURES[source.name]
    for changes in ({}, {"attention_bias": True}, {"num_key_value_heads": None}):
        config = COMMON | GROUPED | {"model_type": source.name} | changes
        skeleton = skeleton_parameters(build_skeleton(config, torch.float32))
        assert declared.parameters(config) == skeleton


def test_a_model_of_the_architecture_runs_block_by_block(source: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(source).eval()
    plan = make_plan(source, SPEC)
    assert len(plan.block_linears(0)) == COVERED[source.name][1]
    first = [[name.rpartition(".")[2] for name in names] for names in plan.siblings(0)]
    assert first == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    model = StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.embed(tokens)
        for i in range(model.block_count):
            hidden = model.run_block(i, model.load_block(i), hidden)
        difference = model.logits(hidden) - reference(tokens).logits
    assert difference.abs().max() < 1e-5


CASES = """
import bitmill_kernels, torch
bitmill_kernels.__path__.append({folder!r})
from bitmill_kernels.row_scale.row_scale import row_scale

g = torch.Generator().manual_seed(0)
torch.use_deterministic_algorithms(True)  # results are laid over NaN
for shape, dtype in (((1, 1), torch.float32), ((3, 1025), torch.float16), ((9, 33), torch.float16)):
    x, factor = torch.randn(shape, generator=g).to(dtype), torch.randn(shape[0], generator=g)
    x = x.T.contiguous().T
    found = row_scale(x, factor, backend="triton")
    assert torch.equal(found, row_scale(x, factor, backend="reference")), shape
"""


def test_the_kernel_is_its_twin(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for path in ("row_scale.py", "row_scale_triton.py"):
        target = tmp_path / "row_scale" / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(CODE[f"kernels/bitmill_kernels/row_scale/{path}"])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CASES.format(folder=str(tmp_path))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
