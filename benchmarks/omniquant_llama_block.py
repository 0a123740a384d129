"""Time of one decoder block of LLaMA-7B's shape through GPTQ and learning, extrapolated to 32.

    python benchmarks/omniquant_llama_block.py --work DIR --out block.json

Weights and inputs are random: time does not depend on them. 64 calibration and 16 held-out
sequences of 2048 tokens, bf16, widths 2 and 3 in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import transformers

from bitmill.calibration.hooks import run_windows
from bitmill.calibration.statistics import Stream
from bitmill.config.methods import GPTQ
from bitmill.config.quantization import parse_config
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.quant.tensors import affine
from bitmill.refinement.block import RefineSettings, refine_block
from bitmill.refinement.omniquant.block import BlockData, learn_block
from bitmill.refinement.omniquant.metric import fisher_metric
from bitmill.refinement.omniquant.settings import LearningSettings
from bitmill.solvers.solver import solver_of

BLOCKS = 32
SPEC = {"budget": {"code_bits": 3}}


def make_model(folder: Path, hidden: int, intermediate: int) -> None:
    """One block of LLaMA-7B with a small vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", default="omniquant_llama_block.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--held", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=LearningSettings().epochs)
    args = parser.parse_args()
    folder, device = Path(args.work) / "llama-block", torch.device(args.device)
    if not folder.exists():
        make_model(folder, args.hidden, args.intermediate)
    plan = make_plan(folder, parse_config(SPEC))
    model = StreamedModel(folder, plan, device=device, dtype=torch.bfloat16)
    count = args.sequences
    tokens = torch.randint(
        0, 256, (count + args.held, args.length), generator=torch.Generator().manual_seed(0)
    )
    hidden = torch.cat([model.embed(t) for t in tokens.split(8)]) * 30
    block = model.load_block(0)
    targets = run_windows(model, 0, block, hidden, batch=8)
    widths = {
        linear.name: tuple(2 + g % 2 for g in range(linear.shape.groups)) for linear in plan.linears
    }
    refine = RefineSettings(solver_of(GPTQ(asymmetric=False)))
    began = time.perf_counter()
    found, _ = refine_block(model, 0, block, Stream(hidden[:count]), widths, refine)
    starts = affine(found)
    refined = time.perf_counter()
    data = BlockData(hidden[:count], targets[:count], hidden[count:], targets[count:])
    settings = LearningSettings(epochs=args.epochs)
    metric = fisher_metric(torch.eye(args.hidden, device=device), settings.shrink)
    report = learn_block(model, 0, block, starts, data, settings, seed=0, metric=metric).report
    learned = time.perf_counter()
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "gptq_seconds": refined - began,
        "learning_seconds": learned - refined,
        "steps": report.steps,
        "minutes_for_32_blocks": (learned - began) * BLOCKS / 60,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    Path(args.out).write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
