"""SGLang's server on a CPU against `bitmill.load` on the same packed folders."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

import pytest
import torch

import bitmill
from tiny import tiny_llama
from trellis_models import pack_trellis
from weights import pack_model

LIMIT = 1e-5
"""Of a log-probability, in fp32."""
NEW = 24
MODELS: dict[str, dict[str, Any]] = {
    "own widths, natural order": {},
    "tied packed embedding, orders": {"order": "activation", "embeddings": "quantize"},
    "packed embedding and head": {"embeddings": "quantize", "tied": False},
    "one width": {"order": "activation", "cycle": (4,)},
    "trellis codes": {"code": "trellis"},
    "trellis codes, tied packed embedding": {"code": "trellis", "embeddings": "quantize"},
    "trellis codes, packed embedding and head": {
        "code": "trellis",
        "embeddings": "quantize",
        "tied": False,
    },
    "two ranks, orders and tails": {"order": "activation", "embeddings": "quantize", "ranks": 2},
}


@contextmanager
def served(folder: Path, ranks: int) -> Iterator[int]:
    """The port of a server that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    log = folder.parent / "server.log"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder)),
            *("--host", "127.0.0.1", "--port", str(port), "--tp-size", str(ranks)),
            *("--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native"),
            *("--disable-cuda-graph", "--disable-overlap-schedule", "--disable-radix-cache"),
            *("--max-total-tokens", "2048"),
        ],
        env=os.environ
        | {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
        | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"[: 2 * ranks - 1]},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait()


def generated(port: int, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens, and log-probabilities of every token behind the first one of the prompt."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        said = json.load(answer)
    about = said["meta_info"]
    steps = about["input_token_logprobs"][1:] + about["output_token_logprobs"]
    return said["output_ids"], [step[0] for step in steps]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_log_probabilities_are_those_of_bitmill(tmp_path: Path, name: str) -> None:
    options = dict(MODELS[name])
    ranks, tied = options.pop("ranks", 1), options.pop("tied", True)
    source = tiny_llama(
        tmp_path / "source", head_dim=64, intermediate_size=448, tie_word_embeddings=tied
    )
    if options.pop("code", None):
        folder = pack_trellis(source, tmp_path / "packed", **options)
    else:
        folder = pack_model(source, tmp_path / "packed", **options).folder
    model, largest, count = bitmill.load(folder).eval(), 0.0, 0
    with served(folder, ranks) as port:
        for prompt in ([5, 81, 17, 200, 33], [9], [100, 101, 102]):
            new, found = generated(port, prompt)
            ids = torch.tensor([prompt + new])
            with torch.no_grad():
                expected = model(ids).logits[0].float().log_softmax(-1)
            assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == new
            steps = expected[:-1].gather(1, ids[0, 1:, None])[:, 0]
            largest = max(largest, float((steps - torch.tensor(found)).abs().max()))
            count += len(new)
    print(f"{name}: {count} tokens, {largest:.1e}")  # noqa: T201
    assert largest < LIMIT
