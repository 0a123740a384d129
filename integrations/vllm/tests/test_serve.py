"""`serve-demo`: what a user types, on a tiny packed folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from test_engine import packed_model
from transformers import AutoTokenizer

import bitmill

SCRIPT = Path(__file__).parents[1] / "serve-demo"
PROMPT = "The river crosses"


def test_the_endpoint_completes_as_bitmill_does(tmp_path: Path) -> None:
    folder = packed_model(tmp_path, order="activation", embeddings="quantize")
    done = subprocess.run(
        [SCRIPT, folder, PROMPT],
        env=os.environ | {"BITMILL_VLLM_ENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = bitmill.load(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    made = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert done.stdout == tokenizer.decode(made, skip_special_tokens=True) + "\n"
