"""What activations or cached keys and values of few bits cost a model by themselves.

    python benchmarks/rounded.py NAME=SOURCE ... --windows 4 512 --out benchmarks/results/rounded

SOURCE is a Hugging Face folder. Its float32 weights stay; inputs of the decoder blocks' linears, or
keys and values, are rounded token by token (`bitmill/evaluation/rounded.py`), and the model is
measured against itself on the first windows of both evaluation texts.
"""

from __future__ import annotations

import argparse
import platform
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bitmill.calibration.windows import evaluation_tokens
from bitmill.config.quantization import parse_config
from bitmill.config.rounded import rounded_baselines
from bitmill.evaluation.logits import StreamedLogits, perplexity_and_kl
from bitmill.evaluation.rounded import rounding
from bitmill.io.atomic import write_json
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan

TEXTS = ("wiki_evaluation", "handbook_evaluation")


def measured(source: Path, count: int, length: int, device: str) -> dict[str, Any]:
    """Figures of every text by what is rounded; those of the model itself under "none"."""
    plan = make_plan(source, parse_config({"budget": {"bits": 16}}))
    model = StreamedModel(source, plan, device=torch.device(device), dtype=torch.float32)
    rows: dict[str, Any] = {}
    for text in TEXTS:
        windows = evaluation_tokens(text, source, length=length, sequences=count)
        plain = StreamedLogits(model, remember=True)
        for name, asked in rounded_baselines().items():
            if asked.rule is not None:  # rules look at more than a float model has
                continue
            changed = StreamedLogits(model, replace=partial(rounding(asked), model))
            found = perplexity_and_kl(plain, changed, windows)
            rows.setdefault("none", {})[text] = found.source().model_dump(mode="json")
            rows.setdefault(name, {})[text] = found.candidate().model_dump(mode="json")
            print(text, name, rows[name][text]["perplexity"], rows[name][text]["kl"], flush=True)
    return rows


def markdown(state: dict[str, Any]) -> str:
    """The tables of a results file."""
    count, length = state["windows"]
    lines = [
        "# Activations, keys and values of few bits",
        f"Float32 weights; the first {count} windows of {length} tokens of each text. Command: "
        f"`{state['command']}`. {state['machine']}, commit {state['commit']}.",
    ]
    for model, rows in state["models"].items():
        lines += [
            "",
            f"## {model}",
            "| rounded | wiki perplexity | KL | handbook perplexity | KL |",
        ]
        lines.append("|---" * 5 + "|")
        for name, texts in rows.items():
            told = [
                f"{texts[t]['perplexity']:.2f} | {texts[t]['kl']:.4f} ± {texts[t]['kl_se']:.4f}"
                for t in TEXTS
            ]
            lines.append(f"| {name} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="NAME=SOURCE")
    parser.add_argument("--windows", type=int, nargs=2, default=(4, 512))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of the code, for the record")
    options = parser.parse_args()
    models = {
        name: measured(Path(source), *options.windows, options.device)
        for name, _, source in (one.partition("=") for one in options.sources)
    }
    state = {
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit,
        "windows": options.windows,
        "machine": f"{platform.machine()}, torch {version('torch')}, transformers "
        f"{version('transformers')}, Python {platform.python_version()}",
        "models": models,
    }
    write_json(options.out.with_suffix(".json"), state)
    options.out.with_suffix(".md").write_text(markdown(state))


if __name__ == "__main__":
    main()
