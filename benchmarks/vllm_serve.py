"""A packed folder behind `vllm serve` on a CPU: its tokens, and its pace beside a dense copy.

    VLLM_ENV/bin/python benchmarks/vllm_serve.py PACKED --name SmolLM2-135M --out OUT.json

VLLM_ENV is what `integrations/vllm/env` makes. Four servers run at once, packed and dequantized in
fp32 and in bf16, and are asked in turn, so that whatever else the machine does falls on all of
them; the fastest of --rounds counts.

    tokens    24 greedy ones of three prompts of 32 tokens of `wiki_evaluation`, of the packed
              server in fp32 against `bitmill.load`
    decode    tokens a second of 1 and of 4 sequences, from the time of 1 + 48 tokens less that of 1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import bitmill
from bitmill.calibration.windows import evaluation_tokens
from bitmill.formats.dequantized.format import Dequantized
from bitmill.pipeline.export import Export

MORE, NEW = 48, 24
DTYPES = ("float32", "bfloat16")


class Server:
    """`vllm serve` in processes of its own."""

    def __init__(self, folder: Path, dtype: str, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [
                *(f"{sys.prefix}/bin/vllm", "serve", str(folder), "--served-model-name", "model"),
                *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", dtype),
                *("--enforce-eager", "--max-model-len", "512", "--no-enable-prefix-caching"),
            ],
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        self._log = log

    def wait(self) -> None:
        """Until it answers; raises where it ended instead."""
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(self._log.read_text()[-2000:])
            try:
                self.call("/health")
                return
            except OSError:
                time.sleep(0.5)

    def call(self, path: str, body: Any = None) -> Any:
        """The JSON of an answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request) as answer:
            said = answer.read()
        return json.loads(said) if said else None

    def complete(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """Greedy tokens of each prompt."""
        body = {
            "model": "model",
            "prompt": prompts,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return [one["token_ids"] for one in self.call("/v1/completions", body)["choices"]]

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait(60)


def seconds(server: Server, prompts: list[list[int]]) -> float:
    """Of MORE tokens of each prompt, prefill not counted."""
    start = time.perf_counter()
    server.complete(prompts, 1)
    first = time.perf_counter() - start
    server.complete(prompts, 1 + MORE)
    return time.perf_counter() - start - 2 * first


def equal_tokens(server: Server, folder: Path, prompts: list[list[int]]) -> list[int]:
    """Of each prompt, how many of NEW tokens are those of the model in this process."""
    model, found = bitmill.load(folder, dtype=torch.float32).eval(), []
    for prompt, tokens in zip(prompts, server.complete(prompts, NEW), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        same = logits.argmax(-1) == torch.tensor(tokens)
        found.append(int(same.cumprod(0).sum()))
    return found


def main() -> None:
    """Measure one packed folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    before, packed = os.getloadavg()[0], options.packed
    prompts = evaluation_tokens("wiki_evaluation", packed, length=32, sequences=4).tolist()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        Export.of(packed, Dequantized(dtype="float32")).write(scratch / "dense", lambda *_: None)
        servers = {}
        for kind, folder in (("packed", packed), ("dense", scratch / "dense")):
            for dtype in DTYPES:
                name = f"{kind}, {dtype}"
                servers[name] = Server(folder, dtype, scratch / f"{kind}-{dtype}.log")
                stack.callback(servers[name].close)
        for server in servers.values():
            server.wait()
        equal = equal_tokens(servers["packed, float32"], packed, prompts[:3])
        times: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for count in (1, 4):
                for name, server in servers.items():
                    found = seconds(server, prompts[:count])
                    times.setdefault(f"{name}, {count}", []).append(found)
    rates = {
        key: round(MORE * int(key.rpartition(" ")[2]) / min(found), 1)
        for key, found in times.items()
    }
    row = {
        "tokens_equal": equal,
        "tokens_per_second": rates,
        "packed_over_dense": {
            f"{dtype}, {count}": round(
                rates[f"packed, {dtype}, {count}"] / rates[f"dense, {dtype}, {count}"], 2
            )
            for dtype in DTYPES
            for count in (1, 4)
        },
        "seconds": {key: [round(one, 3) for one in found] for key, found in times.items()},
        "machine": f"{os.cpu_count()} CPU cores, load average {before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after, Python {platform.python_version()}, vllm-cpu "
        f"{version('vllm-cpu')}, torch {torch.__version__}",
    }
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    stored[options.name] = row
    options.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps({key: row[key] for key in ("tokens_equal", "tokens_per_second")}))


if __name__ == "__main__":
    main()
