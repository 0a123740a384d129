"""Linears of exl2 folders in ExLlamaV2's own CUDA kernels: values, and products of random inputs.

    PYTHONPATH=WHEEL python benchmarks/exl2_reader.py NAME=FOLDER [NAME=FOLDER ...]

WHEEL holds exllamav2's sources, or BITMILL_EXL2_LIBRARY names a library made of them
(`exl2_kernels.py`). Needs torch and safetensors alone; of a folder only tensors named `*.q_*` in
its `*.safetensors` are read. Of every linear:

    values    what the reconstruction kernel writes, f16, beside the layout in plain torch
              (`export_readers/exl2_layout.py`) rounded to f16: equal or not, largest difference
    products  |y - xW'| / |xW'| for 1, 4, 17 and 48 tokens, W the f16 values, the sum in fp64; up to
              32 tokens it multiplies packed codes, beyond that a matrix that it writes out

Besides, `--random` makes linears of random codes for every width, for all widths in one, and for
every pair of widths, with orders of columns. Small folders with six widths and a tail in every
linear are `packed_model(FOLDER, "activation", hidden_size=1056, num_attention_heads=33,
intermediate_size=2080)` of `tests/exl2_models.py`, exported.

Results go to benchmarks/results/ (or --out) as JSON and markdown; the exit code is 1 where values
differ or a product is off by more than `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exl2_kernels
import torch
from export_readers.exl2_layout import weight
from safetensors import safe_open
from torch import Tensor

TOKENS = (1, 4, 17, 48)
TOLERANCE = 2e-2
"""Of products: its kernels sum in fp16."""
WIDTHS = (2, 3, 4, 5, 6, 8)
ROWS, GROUPS = 416, 9


def linears(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and tensors (`exl2_kernels.DTYPES`) of every quantized linear in a folder."""
    for place in sorted(folder.glob("*.safetensors")):
        with safe_open(place, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, last = key.rpartition(".")
                if last == "q_weight":
                    parts = exl2_kernels.DTYPES
                    yield name, {part: file.get_tensor(f"{name}.q_{part}") for part in parts}


def values(stored: dict[str, Tensor]) -> Tensor:
    """f16 [N, K] by the layout, columns where inputs have them."""
    names = ("weight", "groups", "scale", "scale_max")
    found = weight(*(stored[name] for name in names))
    return found[:, stored["invperm"].long()].half()


def random_linears() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every width, every pair and all together, in groups that take turns."""
    patterns = [*((width,) for width in WIDTHS), *itertools.combinations(WIDTHS, 2), WIDTHS]
    for pattern in patterns:
        widths = [pattern[group % len(pattern)] for group in range(GROUPS)]
        name = "widths " + ", ".join(map(str, pattern))
        yield name, exl2_kernels.random_linear(ROWS, widths, torch.device("cpu"))


def compare(stored: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """One linear's figures."""
    there = {name: tensor.to(device) for name, tensor in stored.items()}
    exact = values(there)
    N, K = exact.shape
    matrix = exl2_kernels.Matrix(there, torch.empty(N * K, dtype=torch.half, device=device))
    found, errors = matrix.reconstruct(), {}
    for T in TOKENS:
        x = torch.randn(T, K, device=device).half()
        y, product = matrix.product(x).double(), x.double() @ exact.double().T
        errors[str(T)] = float((y - product).norm() / product.norm())
    return {
        "N": N,
        "K": K,
        "widths": "".join(map(str, stored["groups"][0::2].tolist())),
        "moved": not torch.equal(stored["invperm"].long(), torch.arange(K)),
        "equal": torch.equal(found, exact),
        "difference": float((found.float() - exact.float()).abs().nan_to_num(torch.inf).max()),
        "products": errors,
    }


def is_right(row: dict[str, Any]) -> bool:
    """Values bit for bit (0 and -0 alike), products within `TOLERANCE`."""
    return bool(row["equal"]) and all(error < TOLERANCE for error in row["products"].values())


def table(result: dict[str, Any]) -> str:
    """Markdown: a line for each folder."""
    lines = [
        "# exl2 folders in ExLlamaV2's own CUDA kernels",
        "What the columns are is said in `benchmarks/exl2_reader.py`.",
        "",
        f"    {result['command']}",
        "",
        ". ".join(f"{key}: {value}" for key, value in result["machine"].items()) + ".",
        "",
        "| folder | linears | with columns moved | widths | values equal | largest difference | "
        + " | ".join(f"largest error, {T} tokens" for T in TOKENS)
        + " |",
        "|---|---|---|---|---|---|" + "---|" * len(TOKENS),
    ]
    for name, rows in result["folders"].items():
        widths = sorted({width for row in rows.values() for width in row["widths"]})
        cells = [
            name,
            len(rows),
            sum(row["moved"] for row in rows.values()),
            ", ".join(widths),
            f"{sum(row['equal'] for row in rows.values())} of {len(rows)}",
            f"{max(row['difference'] for row in rows.values()):.2g}",
        ]
        for T in map(str, TOKENS):
            cells.append(f"{max(row['products'][T] for row in rows.values()):.1e}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, str]:
    """What ran where."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "GPU": torch.cuda.get_device_name(),
        "exllamav2": exl2_kernels.load().exl2_version().decode(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "Python": platform.python_version(),
        "commit": commit or "not known there",
    }


def main() -> int:
    """Read folders and random linears."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    sources = {"random codes": random_linears()} if options.random else {}
    for one in options.folders:
        name, _, folder = one.partition("=")
        sources[name] = linears(Path(folder))
    device = torch.device("cuda", torch.cuda.current_device())
    folders: dict[str, dict[str, Any]] = {}
    for name, found in sources.items():
        folders[name] = {linear: compare(stored, device) for linear, stored in found}
        if not folders[name]:
            parser.error(f"{name}: no linears (*.q_weight) in its *.safetensors")
    named = ["=".join([one.partition("=")[0]] * 2) for one in options.folders]
    random = ["--random"] if options.random else []
    command = ["python benchmarks/exl2_reader.py", *named, *random]
    result = {"command": " ".join(command), "machine": machine(), "folders": folders}
    options.out.mkdir(parents=True, exist_ok=True)
    place = options.out / "exl2-kernels"
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    place.with_suffix(".md").write_text(table(result))
    print(table(result))
    wrong = {
        f"{name}: {linear}": row
        for name, rows in folders.items()
        for linear, row in rows.items()
        if not is_right(row)
    }
    for linear, row in wrong.items():
        print(linear, json.dumps(row), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
